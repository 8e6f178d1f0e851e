"""`load_export`: the reading face over an exported ZIP, straight from its stored members."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ml_debugger.errors import CorruptDataError, StorageError
from ml_debugger.store import layout
from ml_debugger.trace.columns import ColumnValues, RaggedRows
from ml_debugger.trace.dtypes import Array, RecordedDtype, narrow, recorded_dtype
from ml_debugger.trace.header import FEATURES, GROUND_TRUTH, TABLES
from ml_debugger.trace.newest import Mask, NewestRows
from ml_debugger.trace.npy_member import ExportArchive
from ml_debugger.trace.schema import (
    BASE_COLUMNS,
    MAX_TEXT_CHARACTERS,
    ColumnSchema,
    TextExtent,
    element_dtype_names,
)
from ml_debugger.trace.source import RowBlock, pick_schemas
from ml_debugger.trace.trace import Trace

_BLOCK_BYTES = 8 << 20
_MAX_BLOCK_ROWS = 1 << 16
_ATTEMPT_SHIFT, _ATTEMPT_MASK = 36, (1 << 13) - 1


def load_export(path: str | os.PathLike[str]) -> Trace:
    """Open an exported ZIP for reading, with the same face as `open_trace`.

    Values are read when they are asked for. Every member is checked against its SHA-256 in the manifest when
    it is first used. Rows that the export left out (``dedupe=True``) are not there.

    Raises:
        NotFoundError: No such file.
        InvalidTypeError: Not a path.
        CorruptDataError: Not an export, or a damaged one (also raised while reading).
        StorageError: The file cannot be read.
    """
    return Trace(ExportSource(ExportArchive(path)))


class ExportSource:
    """An exported ZIP; see `ml_debugger.trace.source.Source`."""

    def __init__(self, archive: ExportArchive) -> None:
        self._archive = archive
        document = archive.manifest
        try:
            self.model_name = str(document["model_name"])
            self.version_name = str(document["version_name"])
            self.fingerprint = str(document["fingerprint"])
            self._tables = {table: self._schemas(table, document["tables"][table]) for table in TABLES}
        except (StorageError, CorruptDataError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise archive.damaged(f"its manifest lacks or garbles {error}") from error

    def epochs(self) -> list[int]:
        """Epochs that hold rows, -1 for the rows without one."""
        return [int(epoch) for epoch in np.unique(self.column(FEATURES, "n_epoch"))]

    def attempts(self) -> list[int]:
        """Numbers of the attempts that the rows come from."""
        return [
            int(attempt)
            for attempt in np.unique((self.column(FEATURES, "row_id") >> _ATTEMPT_SHIFT) & _ATTEMPT_MASK)
        ]

    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table."""
        return list(self._tables[table])

    def select(
        self, table: str, n_epoch: int | None, dataset_type: str | None, dedupe: bool
    ) -> ExportSelection:
        """Rows of a table."""
        keep = np.ones(self.rows(table), np.bool_)
        if n_epoch is not None:
            keep &= self.column(table, "n_epoch") == n_epoch
        if dataset_type is not None:
            keep &= self._equals(table, "dataset_type", dataset_type)
        if dedupe:
            newest = self._newest()
            if table == GROUND_TRUTH:
                newest = np.isin(self.column(table, "row_id"), self.column(FEATURES, "row_id")[newest])
            keep &= newest
        return ExportSelection(self, table, keep)

    def rows(self, table: str) -> int:
        """Rows of a table."""
        return len(self.column(table, "row_id"))

    def schemas(self, table: str) -> dict[str, ColumnSchema]:
        """Fresh schemas by name."""
        return self._schemas(table, self._archive.manifest["tables"][table])

    def column(self, table: str, name: str) -> Array:
        """The array of a column that makes one array; its rows are those of the table."""
        values = self._archive.array(f"{table}/{name}.npy")
        if values.ndim < 1 or len(values) != self._declared_rows(table):
            raise self._archive.damaged(f"column {name!r} of {table!r} has the shape {values.shape}")
        return values

    def ragged(self, table: str, name: str) -> tuple[Array, Array, Array]:
        """(values, offsets, shapes) of a column whose rows differ in shape."""
        values, offsets, shapes = (
            self._archive.array(f"{table}/{name}.{part}.npy") for part in ("values", "offsets", "shapes")
        )
        rows = self._declared_rows(table)
        if values.ndim != 1 or offsets.shape != (rows + 1,) or shapes.ndim != 2 or len(shapes) != rows:
            raise self._archive.damaged(f"the parts of column {name!r} of {table!r} contradict each other")
        if (
            offsets.dtype != np.int64
            or shapes.dtype != np.int64
            or offsets[0] != 0
            or offsets[-1] != len(values)
        ):
            raise self._archive.damaged(f"the offsets of column {name!r} of {table!r} do not fit its values")
        return values, offsets, shapes

    def is_one_array(self, table: str, name: str) -> bool:
        """Whether a column is one member."""
        return f"{table}/{name}.npy" in self._archive

    def damaged(self, problem: str) -> CorruptDataError:
        """The error for a damaged file."""
        return self._archive.damaged(problem)

    def _declared_rows(self, table: str) -> int:
        rows = self._archive.manifest["tables"][table]["rows"]
        if type(rows) is not int or rows < 0:
            raise self._archive.damaged(f"table {table!r} has {rows!r} rows")
        return rows

    def _schemas(self, table: str, entry: dict[str, Any]) -> dict[str, ColumnSchema]:
        schemas = {name: self._schema(table, name, column) for name, column in entry["columns"].items()}
        missing = [name for name in BASE_COLUMNS if name not in schemas]
        if missing:
            raise self._archive.damaged(f"table {table!r} has no column {missing[0]!r}")
        return schemas

    def _schema(self, table: str, name: str, column: dict[str, Any]) -> ColumnSchema:
        recorded = column["recorded"]
        names = (
            []
            if recorded is None
            else [recorded]
            if isinstance(recorded, str)
            else [str(one) for one in recorded]
        )
        schema = ColumnSchema(name, table, names, element_dtype_names(names), rows=self._declared_rows(table))
        one_array = self.is_one_array(table, name)
        if schema.is_list:
            # Text that was written in parts was too wide for numpy; how wide does not matter.
            schema.extent.characters = 1 if one_array else MAX_TEXT_CHARACTERS + 1
            schema.missing = not one_array
        else:
            schema.row_shapes = [tuple(int(size) for size in column["shape"]) if one_array else None]
        return schema

    def _equals(self, table: str, name: str, text: str) -> Mask:
        if self.is_one_array(table, name):
            mask: Mask = np.asarray(self.column(table, name) == text, np.bool_)
            return mask
        return np.fromiter((value == text for value in self._texts(table, name)), np.bool_, self.rows(table))

    def _texts(self, table: str, name: str) -> Iterator[str]:
        schema = self.schemas(table)[name]
        everything = ExportSelection(self, table, np.ones(self.rows(table), np.bool_))
        for block in everything.blocks([schema], raw=True):
            yield from block.values[schema.name]

    def _newest(self) -> Mask:
        epochs = self.column(FEATURES, "n_epoch")
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
        schemas = pick_schemas(self._source.schemas(self._table), columns, self._table)
        for schema in schemas:
            if extents and schema.is_text:
                self._measure(schema)
        return schemas

    def blocks(
        self,
        schemas: Sequence[ColumnSchema],
        *,
        raw: bool,
        out: dict[str, Array] | None = None,
        max_rows: int | None = None,
    ) -> Iterator[RowBlock]:
        """Read all rows, block by block; see `Selection.blocks`."""
        row_bytes = sum(math.prod(schema.row_shape) * 8 for schema in schemas)
        step = max(1, min(_MAX_BLOCK_ROWS, max_rows or _MAX_BLOCK_ROWS, _BLOCK_BYTES // max(row_bytes, 1)))
        row = 0
        for start in range(0, len(self._keep), step):
            keep = self._keep[start : start + step]
            rows = int(np.count_nonzero(keep))
            if not rows:
                continue
            values: dict[str, ColumnValues] = {}
            for schema in schemas:
                values[schema.name] = self._values(schema, start, keep, raw)
                if out is not None and schema.name in out:
                    out[schema.name][row : row + rows] = values[schema.name]
            yield RowBlock(rows, values, _still_there)
            row += rows

    def _measure(self, schema: ColumnSchema) -> None:
        schema.extent, schema.missing = TextExtent(), False
        for block in self.blocks([schema], raw=True):
            texts = [value for value in block.values[schema.name] if value is not None]
            schema.missing = schema.missing or len(texts) < block.rows
            schema.extent.add(texts)

    def _values(self, schema: ColumnSchema, start: int, keep: Mask, raw: bool) -> ColumnValues:
        if self._source.is_one_array(self._table, schema.name):
            values = self._source.column(self._table, schema.name)[start : start + len(keep)][keep]
            if schema.is_list:
                if values.dtype.kind != "U" or values.ndim != 1:
                    raise self._source.damaged(f"column {schema.name!r} is of {values.dtype}, expected text")
                return list(values.tolist())
            if values.shape[1:] != schema.row_shape or values.dtype != schema.written:
                raise self._source.damaged(
                    f"column {schema.name!r} is {values.dtype} {values.shape[1:]}, not what its manifest says"
                )
            return narrow(values, _only_dtype(schema)) if raw and len(schema.dtypes) == 1 else values
        runs = self._ragged(schema, start, keep, raw)
        if not schema.is_list:
            return runs
        return [_decoded(row, schema.is_text) for run in runs for row in run.arrays()]

    def _ragged(self, schema: ColumnSchema, start: int, keep: Mask, raw: bool) -> list[RaggedRows]:
        values, offsets, shapes = self._source.ragged(self._table, schema.name)
        stop = start + len(keep)
        dtype = recorded_dtype("uint8") if schema.is_list else _ragged_dtype(schema)
        expected = np.dtype(np.uint8) if schema.is_list else schema.written
        lengths = np.diff(offsets[start : stop + 1])
        part_shapes = shapes[start:stop]
        missing = (lengths == 0) & (part_shapes == -1).all(axis=1)
        products = np.where(part_shapes < 0, 1, part_shapes).prod(axis=1, dtype=np.float64)
        if values.dtype != expected or (lengths < 0).any() or (products != lengths)[~missing].any():
            raise self._source.damaged(
                f"the parts of column {schema.name!r} of {self._table!r} contradict each other"
            )
        part = values[offsets[start] : offsets[stop]]
        if raw and not schema.is_list:
            part = narrow(part, dtype)
        whole = RaggedRows(part, dtype, lengths, part_shapes)
        # Runs of rows that have a value, and of rows that have none.
        edges = [0, *(np.flatnonzero(np.diff(missing)) + 1).tolist(), len(keep)]
        runs = []
        for first, last in itertools.pairwise(edges):
            chosen = np.zeros(len(keep), np.bool_)
            chosen[first:last] = keep[first:last]
            run = whole.select(None if chosen.all() else chosen)
            runs.append(RaggedRows(run.values, dtype, run.lengths, run.shapes, present=not missing[first]))
        return runs


def _ragged_dtype(schema: ColumnSchema) -> RecordedDtype:
    return _only_dtype(schema) if len(schema.dtypes) == 1 else recorded_dtype(schema.written.name)


def _only_dtype(schema: ColumnSchema) -> RecordedDtype:
    return recorded_dtype(schema.dtypes[0])


def _decoded(row: Array | None, is_text: bool) -> Any:
    if row is None:
        return None
    return row.tobytes().decode("utf-8", "strict") if is_text else row.tobytes()


def _still_there() -> None:
    """An export that is open stays whole, whatever happens to its name."""
