"""One table of an exported ZIP, whatever its members are: npy here, Parquet in `parquet_table`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from ml_debugger.trace.columns import ColumnValues, RaggedRows
from ml_debugger.trace.dtypes import Array, RecordedDtype, narrow, recorded_dtype
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.npy_member import ExportArchive
from ml_debugger.trace.schema import MAX_TEXT_CHARACTERS, ColumnSchema, element_dtype_names


class ExportTable(Protocol):
    """Rows of one table of an export."""

    @property
    def rows(self) -> int:
        """How many rows."""

    def schemas(self) -> dict[str, ColumnSchema]:
        """Fresh schemas by name."""

    def numbers(self, name: str) -> Array:
        """All rows of ``row_id`` or ``n_epoch``."""

    def values(self, schema: ColumnSchema, start: int, keep: Mask, raw: bool) -> ColumnValues:
        """Of the rows from ``start`` on, those that ``keep`` marks."""


def declared_rows(archive: ExportArchive, table: str) -> int:
    """Rows of a table by the manifest."""
    rows = archive.manifest["tables"][table]["rows"]
    if type(rows) is not int or rows < 0:
        raise archive.damaged(f"table {table!r} has {rows!r} rows")
    return rows


def declared_schema(table: str, name: str, entry: dict[str, Any], rows: int) -> ColumnSchema:
    """Schema of a column by the manifest, without what its members tell."""
    recorded = entry["recorded"]
    names: Iterable[Any] = [] if recorded is None else [recorded] if isinstance(recorded, str) else recorded
    labels = [str(one) for one in names]
    return ColumnSchema(name, table, labels, element_dtype_names(labels), rows=rows)


def ragged_dtype(schema: ColumnSchema) -> RecordedDtype:
    """Dtype of the elements of a column whose rows differ in shape."""
    return recorded_dtype(schema.dtypes[0] if len(schema.dtypes) == 1 else schema.written.name)


def ragged_runs(whole: RaggedRows, missing: Mask, keep: Mask) -> list[RaggedRows]:
    """The rows that ``keep`` marks, in runs of rows that have a value and of rows that have none."""
    edges = [0, *(np.flatnonzero(np.diff(missing)) + 1).tolist(), len(keep)]
    runs = []
    for first, last in itertools.pairwise(edges):
        chosen = np.zeros(len(keep), np.bool_)
        chosen[first:last] = keep[first:last]
        run = whole.select(None if chosen.all() else chosen)
        runs.append(RaggedRows(run.values, whole.dtype, run.lengths, run.shapes, present=not missing[first]))
    return runs


class NpyTable:
    """A table whose columns are npy members; see `ExportTable`."""

    def __init__(self, archive: ExportArchive, table: str) -> None:
        self._archive = archive
        self._table = table
        self.rows = declared_rows(archive, table)

    def schemas(self) -> dict[str, ColumnSchema]:
        """Fresh schemas by name."""
        entries = self._archive.manifest["tables"][self._table]["columns"]
        return {name: self._schema(name, entry) for name, entry in entries.items()}

    def numbers(self, name: str) -> Array:
        """All rows of ``row_id`` or ``n_epoch``."""
        return self._column(name)

    def values(self, schema: ColumnSchema, start: int, keep: Mask, raw: bool) -> ColumnValues:
        """Of the rows from ``start`` on, those that ``keep`` marks."""
        if self._is_one_array(schema.name):
            values = self._column(schema.name)[start : start + len(keep)][keep]
            if schema.is_list:
                if values.dtype.kind != "U" or values.ndim != 1:
                    raise self._archive.damaged(f"column {schema.name!r} is of {values.dtype}, expected text")
                return list(values.tolist())
            if values.shape[1:] != schema.row_shape or values.dtype != schema.written:
                raise self._archive.damaged(
                    f"column {schema.name!r} is {values.dtype} {values.shape[1:]}, not what its manifest says"
                )
            single = raw and len(schema.dtypes) == 1
            return narrow(values, recorded_dtype(schema.dtypes[0])) if single else values
        runs = self._ragged(schema, start, keep, raw)
        if not schema.is_list:
            return runs
        return [_decoded(row, schema.is_text) for run in runs for row in run.arrays()]

    def _schema(self, name: str, entry: dict[str, Any]) -> ColumnSchema:
        schema = declared_schema(self._table, name, entry, self.rows)
        one_array = self._is_one_array(name)
        if schema.is_list:
            # Text that was written in parts was too wide for numpy; how wide does not matter.
            schema.extent.characters = 1 if one_array else MAX_TEXT_CHARACTERS + 1
            schema.missing = not one_array
        else:
            schema.row_shapes = [tuple(int(size) for size in entry["shape"]) if one_array else None]
        return schema

    def _is_one_array(self, name: str) -> bool:
        return f"{self._table}/{name}.npy" in self._archive

    def _column(self, name: str) -> Array:
        values = self._archive.array(f"{self._table}/{name}.npy")
        if values.ndim < 1 or len(values) != self.rows:
            raise self._archive.damaged(f"column {name!r} of {self._table!r} has the shape {values.shape}")
        return values

    def _parts(self, name: str) -> tuple[Array, Array, Array]:
        """(values, offsets, shapes) of a column whose rows differ in shape."""
        values, offsets, shapes = (
            self._archive.array(f"{self._table}/{name}.{part}.npy")
            for part in ("values", "offsets", "shapes")
        )
        if (
            values.ndim != 1
            or offsets.shape != (self.rows + 1,)
            or shapes.ndim != 2
            or len(shapes) != self.rows
        ):
            raise self._contradiction(name)
        if (
            offsets.dtype != np.int64
            or shapes.dtype != np.int64
            or offsets[0] != 0
            or offsets[-1] != len(values)
        ):
            raise self._archive.damaged(
                f"the offsets of column {name!r} of {self._table!r} do not fit its values"
            )
        return values, offsets, shapes

    def _ragged(self, schema: ColumnSchema, start: int, keep: Mask, raw: bool) -> list[RaggedRows]:
        values, offsets, shapes = self._parts(schema.name)
        stop = start + len(keep)
        dtype = recorded_dtype("uint8") if schema.is_list else ragged_dtype(schema)
        expected = np.dtype(np.uint8) if schema.is_list else schema.written
        lengths = np.diff(offsets[start : stop + 1])
        part_shapes = shapes[start:stop]
        missing = (lengths == 0) & (part_shapes == -1).all(axis=1)
        products = np.where(part_shapes < 0, 1, part_shapes).prod(axis=1, dtype=np.float64)
        if values.dtype != expected or (lengths < 0).any() or (products != lengths)[~missing].any():
            raise self._contradiction(schema.name)
        part = values[offsets[start] : offsets[stop]]
        if raw and not schema.is_list:
            part = narrow(part, dtype)
        return ragged_runs(RaggedRows(part, dtype, lengths, part_shapes), missing, keep)

    def _contradiction(self, name: str) -> Exception:
        return self._archive.damaged(f"the parts of column {name!r} of {self._table!r} contradict each other")


def _decoded(row: Array | None, is_text: bool) -> Any:
    if row is None:
        return None
    return row.tobytes().decode("utf-8", "strict") if is_text else row.tobytes()
