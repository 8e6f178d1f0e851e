"""`load_export`: the reading face over an exported ZIP, straight from its stored members."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ml_debugger.errors import MlDebuggerError, NotFoundError
from ml_debugger.store import layout
from ml_debugger.trace.arguments import RowFilter
from ml_debugger.trace.columns import ColumnValues
from ml_debugger.trace.export_table import ExportTable, NpyTable
from ml_debugger.trace.header import FEATURES, GROUND_TRUTH, TABLES
from ml_debugger.trace.newest import Mask, NewestRows
from ml_debugger.trace.npy_member import ExportArchive
from ml_debugger.trace.parquet_table import ParquetTable, is_parquet
from ml_debugger.trace.schema import BASE_COLUMNS, ColumnSchema, TextExtent
from ml_debugger.trace.source import RowBlock, Targets, pick_schemas
from ml_debugger.trace.trace import Trace

_BLOCK_BYTES = 8 << 20
_MAX_BLOCK_ROWS = 1 << 16
_INDEXED_BLOCK_BYTES = 1 << 20
_ATTEMPT_SHIFT, _ATTEMPT_MASK = 36, (1 << 13) - 1


def load_export(path: str | os.PathLike[str]) -> Trace:
    """Open an exported ZIP for reading, with the same face as `open_trace`.

    Values are read when they are asked for. Every member is checked against its SHA-256 in the manifest when
    it is first used. Rows that the export left out (``dedupe=True``) are not there. An export with
    ``format="parquet"`` needs pyarrow (``pip install "ml-debugger[arrow]"``).

    Raises:
        NotFoundError: No such file.
        InvalidTypeError: Not a path.
        InvalidInputError: It needs pyarrow, which is not installed.
        CorruptDataError: Not an export, or a damaged one (also raised while reading).
        StorageError: The file cannot be read.
    """
    return Trace(ExportSource(ExportArchive(path)))


class ExportSource:
    """An exported ZIP; see `ml_debugger.trace.source.Source`."""

    def __init__(self, archive: ExportArchive) -> None:
        self.archive = archive
        document = archive.manifest
        try:
            self.model_name = str(document["model_name"])
            self.version_name = str(document["version_name"])
            self.fingerprint = str(document["fingerprint"])
            self._tables = {table: self._open_table(table) for table in TABLES}
            self._columns = {table: self._known_columns(table) for table in TABLES}
        except MlDebuggerError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise archive.damaged(f"its manifest lacks or garbles {error}") from error

    def epochs(self) -> list[int]:
        """Epochs that hold rows, -1 for the rows without one."""
        return [int(epoch) for epoch in np.unique(self._tables[FEATURES].numbers("n_epoch"))]

    def attempts(self) -> list[int]:
        """Numbers of the attempts that the rows come from."""
        row_ids = self._tables[FEATURES].numbers("row_id")
        return [int(attempt) for attempt in np.unique((row_ids >> _ATTEMPT_SHIFT) & _ATTEMPT_MASK)]

    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table."""
        return list(self._columns[table])

    def select(self, table: str, wanted: RowFilter) -> ExportSelection:
        """Rows of a table."""
        keep = np.ones(self._tables[table].rows, np.bool_)
        if wanted.n_epoch is not None:
            keep &= self._tables[table].numbers("n_epoch") == wanted.n_epoch
        if wanted.dataset_type is not None:
            keep &= self._among(table, "dataset_type", frozenset([wanted.dataset_type]))
        if wanted.input_ids is not None:
            keep &= self._among(table, "input_id", wanted.input_ids)
        if wanted.dedupe:
            newest = self._newest
            if table == GROUND_TRUTH:
                newest_ids = self._tables[FEATURES].numbers("row_id")[newest]
                newest = np.isin(self._tables[table].numbers("row_id"), newest_ids)
            keep &= newest
        return ExportSelection(self, table, keep)

    def select_tables(self, wanted: RowFilter) -> tuple[ExportSelection, ExportSelection]:
        """Rows of both tables; see `Source.select_tables`."""
        return self.select(FEATURES, wanted), self.select(GROUND_TRUTH, wanted)

    def health(self) -> dict[str, Any]:
        """What the manifest tells of the recording; see `Source.health`."""
        from ml_debugger.analysis.capture import export_health

        return export_health(self.archive.manifest)

    def table(self, table: str) -> ExportTable:
        """A table."""
        return self._tables[table]

    def _open_table(self, table: str) -> ExportTable:
        if is_parquet(self.archive, table):
            return ParquetTable(self.archive, table)
        return NpyTable(self.archive, table)

    def _known_columns(self, table: str) -> list[str]:
        schemas = self._tables[table].schemas()
        missing = [name for name in BASE_COLUMNS if name not in schemas]
        if missing:
            raise self.archive.damaged(f"table {table!r} has no column {missing[0]!r}")
        return list(schemas)

    def _among(self, table: str, name: str, wanted: frozenset[str]) -> Mask:
        found = map(wanted.__contains__, self._texts(table, name))
        return np.fromiter(found, np.bool_, self._tables[table].rows)

    def _texts(self, table: str, name: str) -> Iterator[str]:
        schema = self._tables[table].schemas()[name]
        everything = ExportSelection(self, table, np.ones(self._tables[table].rows, np.bool_))
        for block in everything.blocks([schema], raw=True):
            yield from block.values[schema.name]

    @functools.cached_property
    def _newest(self) -> Mask:
        epochs = self._tables[FEATURES].numbers("n_epoch")
        samples: dict[int, NewestRows] = {}
        counts = dict(zip(*(found.tolist() for found in np.unique(epochs, return_counts=True)), strict=True))
        keys = zip(
            epochs.tolist(),
            self._texts(FEATURES, "dataset_type"),
            self._texts(FEATURES, "input_id"),
            strict=True,
        )
        for (epoch, dataset_type), group in itertools.groupby(keys, key=lambda key: key[:2]):
            if epoch != layout.NO_EPOCH:
                newest = samples.setdefault(epoch, NewestRows(counts[epoch]))
                newest.add(dataset_type, [input_id for _, _, input_id in group])
        keep = np.ones(len(epochs), np.bool_)
        for epoch, newest in samples.items():
            keep[epochs == epoch] = newest.mask()
        return keep


class ExportSelection:
    """Rows of one table of an export; see `ml_debugger.trace.source.Selection`."""

    def __init__(self, source: ExportSource, table: str, keep: Mask) -> None:
        self._source = source
        self._table = table
        self._keep = keep
        self._rows = int(np.count_nonzero(keep))

    @property
    def rows(self) -> int:
        """How many rows."""
        return self._rows

    def schemas(self, columns: Sequence[str] | None, *, extents: bool) -> list[ColumnSchema]:
        """Schemas of some columns; see `Selection.schemas`."""
        schemas = pick_schemas(self._source.table(self._table).schemas(), columns, self._table)
        for schema in schemas:
            if extents and schema.is_text:
                self._measure(schema)
        return schemas

    def blocks(
        self,
        schemas: Sequence[ColumnSchema],
        *,
        raw: bool,
        out: Targets | None = None,
        max_rows: int | None = None,
    ) -> Iterator[RowBlock]:
        """Read all rows, block by block; see `Selection.blocks`."""
        table = self._source.table(self._table)
        step = min(_rows_a_step(schemas, _BLOCK_BYTES), max_rows or _MAX_BLOCK_ROWS)
        for start in range(0, len(self._keep), step):
            keep = self._keep[start : start + step]
            rows = int(np.count_nonzero(keep))
            if not rows:
                continue
            targets = {} if out is None else out(rows)
            values: dict[str, ColumnValues] = {}
            for schema in schemas:
                values[schema.name] = table.values(schema, start, keep, raw)
                if schema.name in targets:
                    targets[schema.name][...] = values[schema.name]
            yield RowBlock(rows, values, _still_there)

    def row_index(self, schemas: Sequence[ColumnSchema]) -> ExportRows:
        """The same rows by number; see `Selection.row_index`."""
        return ExportRows(self._source, self._table, self._keep, schemas)

    def _measure(self, schema: ColumnSchema) -> None:
        schema.extent, schema.missing = TextExtent(), False
        for block in self.blocks([schema], raw=True):
            texts = [value for value in block.values[schema.name] if value is not None]
            schema.missing = schema.missing or len(texts) < block.rows
            schema.extent.add(texts)


class ExportRows:
    """Rows of an export by number; see `ml_debugger.trace.source.RowIndex`.

    Memory: 8 bytes a row where some were left out. A copy in another process opens the file anew.
    """

    def __init__(self, source: ExportSource, table: str, keep: Mask, schemas: Sequence[ColumnSchema]) -> None:
        self._source: ExportSource | None = source
        self._path = source.archive.path
        self._manifest = source.archive.manifest
        self._table = table
        self._schemas = list(schemas)
        self._total = len(keep)
        self._positions = None if keep.all() else np.flatnonzero(keep)
        self._step = _rows_a_step(schemas, _INDEXED_BLOCK_BYTES)

    def __len__(self) -> int:
        return self._total if self._positions is None else len(self._positions)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": None}

    def locate(self, row: int) -> tuple[int, int]:
        """Which run of rows of the file holds a row, and at which position."""
        return divmod(row if self._positions is None else int(self._positions[row]), self._step)

    def read(self, block: int) -> dict[str, ColumnValues]:
        """Read a run of rows of the file."""
        start = block * self._step
        keep = np.ones(min(self._step, self._total - start), np.bool_)
        table = self._opened().table(self._table)
        return {schema.name: table.values(schema, start, keep, raw=True) for schema in self._schemas}

    def _opened(self) -> ExportSource:
        if self._source is None:
            source = ExportSource(ExportArchive(self._path))
            if source.archive.manifest != self._manifest:
                raise NotFoundError(f"{self._path} is another export than before", "open it again")
            self._source = source
        return self._source


def _rows_a_step(schemas: Sequence[ColumnSchema], step_bytes: int) -> int:
    row_bytes = sum(math.prod(schema.row_shape) * 8 for schema in schemas)
    return max(1, min(_MAX_BLOCK_ROWS, step_bytes // max(row_bytes, 1)))


def _still_there() -> None:
    """An export that is open stays whole, whatever happens to its name."""
