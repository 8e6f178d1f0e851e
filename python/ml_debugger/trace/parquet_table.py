"""One table of an exported ZIP with ``format="parquet"``, read a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.extras import require
from ml_debugger.trace.arrow import SHAPES_SUFFIX, from_nested, from_ragged
from ml_debugger.trace.columns import ColumnValues, RaggedRows
from ml_debugger.trace.dtypes import Array, narrow, recorded_dtype
from ml_debugger.trace.export_table import declared_rows, declared_schema, ragged_dtype, ragged_runs
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.npy_member import ExportArchive
from ml_debugger.trace.schema import ColumnSchema

if TYPE_CHECKING:
    import pyarrow


def is_parquet(archive: ExportArchive, table: str) -> bool:
    """Whether a table of an export is one Parquet member."""
    return _member(table) in archive


def _member(table: str) -> str:
    return f"{table}.parquet"


class ParquetTable:
    """A table that is a Parquet member; see `ml_debugger.trace.export_table.ExportTable`.

    Keeps the columns of one row group, those that were asked for.

    Raises:
        InvalidInputError: pyarrow is not installed.
        CorruptDataError: Not a Parquet file, or another one than the manifest says.
    """

    def __init__(self, archive: ExportArchive, table: str) -> None:
        pa, parquet = (require(module, "arrow", "this export") for module in ("pyarrow", "pyarrow.parquet"))
        self._pa = pa
        self._archive = archive
        self._table = table
        self.rows = declared_rows(archive, table)
        try:
            self._file = parquet.ParquetFile(pa.BufferReader(pa.py_buffer(archive.member(_member(table)))))
        except (pa.ArrowException, OSError) as error:
            raise archive.damaged(f"{_member(table)} is no Parquet file: {error}") from error
        self._arrow_schema = self._file.schema_arrow
        groups = self._file.metadata
        sizes = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64)) if sizes else np.zeros(0, np.int64)
        if groups.num_rows != self.rows or sum(sizes) != self.rows:
            raise archive.damaged(f"{_member(table)} has {groups.num_rows} rows, the manifest {self.rows}")
        self._group = -1
        self._cached: dict[str, pyarrow.Array] = {}

    def schemas(self) -> dict[str, ColumnSchema]:
        """Fresh schemas by name."""
        entries = self._archive.manifest["tables"][self._table]["columns"]
        return {name: self._schema(name, entry) for name, entry in entries.items()}

    def numbers(self, name: str) -> Array:
        """All rows of ``row_id`` or ``n_epoch``."""
        schema = ColumnSchema(name, self._table, ["int64"], ["int64"], [()])
        everything = [self._dense(schema, part, raw=False) for part in self._parts(name, 0, self.rows)]
        return np.concatenate([np.empty(0, np.int64), *everything])

    def values(self, schema: ColumnSchema, start: int, keep: Mask, raw: bool) -> ColumnValues:
        """Of the rows from ``start`` on, those that ``keep`` marks."""
        dense: list[Array] = []
        others: list[Any] = []
        done = 0
        shapes = None if schema.is_list or schema.is_dense else schema.name + SHAPES_SUFFIX
        for part, part_shapes in zip(
            self._parts(schema.name, start, start + len(keep)),
            self._parts(shapes or schema.name, start, start + len(keep)),
            strict=True,
        ):
            part_keep = keep[done : done + len(part)]
            done += len(part)
            if schema.is_list:
                if part.type != (self._pa.string() if schema.is_text else self._pa.binary()):
                    raise self._contradiction(schema.name)
                others.extend(part.filter(self._pa.array(part_keep)).to_pylist())
            elif schema.is_dense:
                dense.append(self._dense(schema, part, raw)[part_keep])
            else:
                others.extend(self._ragged(schema, part, part_shapes, part_keep, raw))
        if schema.is_list or not schema.is_dense:
            return others
        return dense[0] if len(dense) == 1 else np.concatenate(dense)

    def _schema(self, name: str, entry: dict[str, Any]) -> ColumnSchema:
        schema = declared_schema(self._table, name, entry, self.rows)
        schema.missing = self._arrow_schema.field(name).nullable
        if not schema.is_list:
            shape = entry["shape"]
            schema.row_shapes = [None if shape is None else tuple(int(size) for size in shape)]
        return schema

    def _parts(self, name: str, start: int, stop: int) -> Iterator[pyarrow.Array]:
        """Rows of a column, by row group."""
        group = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[group - 1]) if group else 0
            end = min(stop, int(self._ends[group]))
            yield self._column(group, name).slice(start - first, end - start)
            start, group = end, group + 1

    def _column(self, group: int, name: str) -> pyarrow.Array:
        if group != self._group:
            self._group, self._cached = group, {}
        if name not in self._cached:
            try:
                found = self._file.read_row_group(group, columns=[name], use_threads=False)
                # A dotted name picks the children of a nested column; ours are top-level fields.
                column = found.column(name).combine_chunks()
            except (self._pa.ArrowException, KeyError, OSError) as error:
                raise self._archive.damaged(f"column {name!r} of {_member(self._table)}: {error}") from error
            self._cached[name] = column
        return self._cached[name]

    def _dense(self, schema: ColumnSchema, part: pyarrow.Array, raw: bool) -> Array:
        try:
            values = from_nested(part, schema.written, schema.row_shape)
        except (ValueError, AttributeError, self._pa.ArrowException) as error:
            raise self._contradiction(schema.name) from error
        return narrow(values, recorded_dtype(schema.dtypes[0])) if raw and len(schema.dtypes) == 1 else values

    def _ragged(
        self, schema: ColumnSchema, part: pyarrow.Array, shapes: pyarrow.Array, keep: Mask, raw: bool
    ) -> list[RaggedRows]:
        try:
            found, missing = from_ragged(part, shapes, schema.written)
        except (ValueError, AttributeError, self._pa.ArrowException) as error:
            raise self._contradiction(schema.name) from error
        products = np.where(found.shapes < 0, 1, found.shapes).prod(axis=1, dtype=np.float64)
        if (products != found.lengths)[~missing].any():
            raise self._contradiction(schema.name)
        dtype = ragged_dtype(schema)
        values = narrow(found.values, dtype) if raw else found.values
        return ragged_runs(RaggedRows(values, dtype, found.lengths, found.shapes), missing, keep)

    def _contradiction(self, name: str) -> Exception:
        return self._archive.damaged(
            f"column {name!r} of {_member(self._table)} is not what the manifest says"
        )
