"""Rows as Arrow: the types of columns, record batches made from blocks, and the way back.

A column of numbers whose rows have one shape is a nested list of fixed sizes, one level a dimension: polars
reads that as ``Array(shape=...)``, DuckDB as ``FLOAT[3][2]``, and nobody has to know our metadata. Sizes of 0
make a plain list. Rows of differing shape are two columns, ``<name>`` with the elements in one flat list and
``<name>.shapes``; a row that lacks the column is null in both. A complex element is a pair (real, imaginary).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.errors import StorageError
from ml_debugger.extras import require
from ml_debugger.trace.columns import ColumnValues, RaggedRows
from ml_debugger.trace.dtypes import Array, recorded_dtype
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.schema import ColumnSchema, recorded_label
from ml_debugger.trace.source import RowBlock, Selection

if TYPE_CHECKING:
    import pyarrow

SHAPES_SUFFIX = ".shapes"

_METADATA_KEY = b"ml_debugger"
_MAX_LIST_ELEMENTS = (1 << 31) - 1
_UINT8 = recorded_dtype("uint8")


def pyarrow_module(feature: str = "to_arrow") -> Any:
    """pyarrow, or an InvalidInputError that says how to install it."""
    return require("pyarrow", "arrow", feature)


def arrow_schema(schemas: Sequence[ColumnSchema]) -> pyarrow.Schema:
    """The Arrow schema of some columns. Fields know the recorded type and shape in their metadata."""
    pa = pyarrow_module()
    fields = []
    for schema in schemas:
        metadata = {_METADATA_KEY: json.dumps(_description(schema))}
        if schema.is_list:
            kind = pa.string() if schema.is_text else pa.binary()
        elif schema.is_dense:
            kind = _dense_type(schema)
        else:
            kind = pa.list_(_item(_element_type(schema.written)))
        fields.append(pa.field(schema.name, kind, nullable=schema.missing, metadata=metadata))
        if not schema.is_list and not schema.is_dense:
            shapes = pa.list_(_item(pa.int64()))
            fields.append(pa.field(schema.name + SHAPES_SUFFIX, shapes, nullable=schema.missing))
    return pa.schema(fields)


def read_batches(
    selection: Selection, schemas: Sequence[ColumnSchema], target: pyarrow.Schema, batch_size: int | None
) -> Iterator[pyarrow.RecordBatch]:
    """Record batches of at most ``batch_size`` rows (None: about 8 MiB or one call), in row order."""
    for block in selection.blocks(schemas, raw=False, max_rows=batch_size):
        batch = _batch(schemas, target, block)
        step = batch_size or max(block.rows, 1)
        for start in range(0, block.rows, step):
            block.check_exists()
            yield batch.slice(start, step)


def _batch(schemas: Sequence[ColumnSchema], target: pyarrow.Schema, block: RowBlock) -> pyarrow.RecordBatch:
    pa = pyarrow_module()
    columns = []
    for schema in schemas:
        kind = target.field(schema.name).type
        values = block.values[schema.name]
        if schema.is_list:
            columns.append(_list_column(schema, values, kind))
        elif schema.is_dense:
            assert isinstance(values, np.ndarray)
            columns.append(_nested(np.ascontiguousarray(values), kind))
        else:
            columns.extend(_ragged_columns(schema, values, kind))
    return pa.record_batch(columns, schema=target)


def _description(schema: ColumnSchema) -> dict[str, Any]:
    shape = list(schema.row_shape) if schema.is_dense and not schema.is_list else None
    return {"recorded": recorded_label(schema), "shape": shape}


def _element_type(written: np.dtype[Any]) -> pyarrow.DataType:
    pa = pyarrow_module()
    if written.kind == "c":
        return pa.list_(_item(pa.from_numpy_dtype(_part_dtype(written))), 2)
    return pa.from_numpy_dtype(written)


def _part_dtype(written: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"<f{written.itemsize // 2}")


def _dense_type(schema: ColumnSchema) -> pyarrow.DataType:
    pa = pyarrow_module()
    kind = _element_type(schema.written)
    for size in reversed(schema.row_shape):
        kind = pa.list_(_item(kind), size or -1)
    return kind


def _item(kind: pyarrow.DataType) -> pyarrow.Field:
    return pyarrow_module().field("item", kind, nullable=False)


def _nested(values: Array, kind: pyarrow.DataType) -> pyarrow.Array:
    """Values (rows, ...) as an Arrow array; shares memory, except with bools."""
    pa = pyarrow_module()
    if values.dtype.kind == "c":
        values = values.view(_part_dtype(values.dtype)).reshape(*values.shape, 2)
    if values.ndim == 1:
        return pa.array(values, kind)
    rows, width = values.shape[:2]
    children = _nested(values.reshape(rows * width, *values.shape[2:]), kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(children, type=kind)
    offsets = np.arange(rows + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(offsets, children, type=kind)


def _list_column(schema: ColumnSchema, values: ColumnValues, kind: pyarrow.DataType) -> pyarrow.Array:
    pa = pyarrow_module()
    column = pa.array(values, kind)
    if isinstance(column, pa.ChunkedArray):  # more than 2 GiB in one call
        raise _too_large(schema.name)
    return column


def _ragged_columns(schema: ColumnSchema, runs: ColumnValues, kind: pyarrow.DataType) -> list[pyarrow.Array]:
    pa = pyarrow_module()
    found = [run for run in runs if isinstance(run, RaggedRows)]
    elements = np.concatenate(
        [np.empty(0, schema.written), *(run.values for run in found if run.present)], dtype=schema.written
    )
    absent = np.concatenate([np.full(len(run.lengths), not run.present) for run in found])
    lengths = np.concatenate([run.lengths for run in found])
    dims = np.concatenate([(run.shapes >= 0).sum(axis=1) for run in found])
    sizes = np.concatenate([run.shapes[run.shapes >= 0] for run in found]).astype(np.int64)
    if elements.size > _MAX_LIST_ELEMENTS:
        raise _too_large(schema.name)
    nulls = pa.array(absent) if schema.missing else None
    shapes_kind = pa.list_(_item(pa.int64()))
    return [
        pa.ListArray.from_arrays(
            _offsets(lengths), _nested(elements, kind.value_type), type=kind, mask=nulls
        ),
        pa.ListArray.from_arrays(_offsets(dims), pa.array(sizes), type=shapes_kind, mask=nulls),
    ]


def _offsets(lengths: Array) -> Any:
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return pyarrow_module().array(ends)


def _too_large(name: str) -> StorageError:
    return StorageError(
        f"one call holds more than 2**31 - 1 elements of column {name!r}, the most that an Arrow list takes",
        "read the column by arrays(), or leave it out",
    )


# The way back, for exports


def from_nested(column: pyarrow.Array, written: np.dtype[Any], row_shape: tuple[int, ...]) -> Array:
    """Values (rows, *row_shape) of a dense column."""
    rows = len(column)
    for _ in range(len(row_shape) + (written.kind == "c")):
        column = column.flatten()
    return _elements(column, written).reshape(rows, *row_shape)


def from_ragged(
    column: pyarrow.Array, shapes: pyarrow.Array, written: np.dtype[Any]
) -> tuple[RaggedRows, Mask]:
    """Rows of differing shape, and which of them have no value."""
    missing = np.asarray(column.is_null().to_numpy(zero_copy_only=False), np.bool_)
    lengths = _lengths(column)
    dims = _lengths(shapes)
    ndim = int(dims.max(initial=0))
    padded = np.full((len(column), ndim), -1, np.int64)
    padded[np.arange(ndim) >= ndim - dims[:, None]] = shapes.flatten().to_numpy()
    elements = column.flatten()
    if written.kind == "c":
        elements = elements.flatten()
    return RaggedRows(_elements(elements, written), _UINT8, lengths, padded), missing


def _elements(column: pyarrow.Array, written: np.dtype[Any]) -> Array:
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype != (_part_dtype(written) if written.kind == "c" else written):
        raise ValueError(f"it has elements of {values.dtype}")
    found: Array = np.ascontiguousarray(values).view(written)
    return found


def _lengths(column: pyarrow.Array) -> Array:
    found: Array = column.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    return found
