"""Putting the blocks of a selection together: whole numpy arrays, torch tensors, or batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.trace.columns import ColumnValues, RaggedRows, dense_dtype
from ml_debugger.trace.dtypes import Array, recorded_dtype, to_torch
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.source import Selection

if TYPE_CHECKING:
    import torch


def allocate(schema: ColumnSchema, rows: int, raw: bool) -> Array:
    """An array for a column's rows, not filled; of objects where they make no one array."""
    if schema.fits_numpy_text:
        return np.empty(rows, schema.extent.numpy_dtype)
    if schema.is_dense:
        return np.empty((rows, *schema.row_shape), dense_dtype(schema, raw))
    return np.empty(rows, object)


def read_arrays(selection: Selection, schemas: list[ColumnSchema], *, raw: bool = False) -> dict[str, Array]:
    """All rows as numpy arrays; memory is taken once, and dense columns are read straight into it."""
    arrays = {schema.name: allocate(schema, selection.rows, raw) for schema in schemas}
    out = {schema.name: arrays[schema.name] for schema in schemas if schema.is_dense}
    row = 0
    for block in selection.blocks(schemas, raw=raw, out=out):
        for schema in schemas:
            if not schema.is_dense:
                _put(arrays[schema.name][row : row + block.rows], block.values[schema.name])
        row += block.rows
    return arrays


def _put(target: Array, values: ColumnValues) -> None:
    """Store texts, bytes or ragged rows; a slice assignment would take sequences apart."""
    if target.dtype != object:
        target[:] = values
        return
    rows = [array for run in values for array in run.arrays()] if _is_ragged(values) else values
    for position, value in enumerate(rows):
        target[position] = value


def _is_ragged(values: ColumnValues) -> bool:
    return isinstance(values, list) and bool(values) and isinstance(values[0], RaggedRows)


def iterate_batches(
    selection: Selection, schemas: list[ColumnSchema], batch_size: int
) -> Iterator[dict[str, Array]]:
    """Rows of a selection in batches; rows that one read gave too many wait for the next batch."""
    kept: dict[str, Array] = {}
    kept_rows = 0
    checks: list[Callable[[], None]] = []
    for block in selection.blocks(schemas, raw=False, max_rows=batch_size):
        arrays = {
            schema.name: _block_array(schema, block.values[schema.name], block.rows) for schema in schemas
        }
        if kept_rows:
            arrays = {name: np.concatenate([kept[name], values]) for name, values in arrays.items()}
        rows = kept_rows + block.rows
        start = 0
        checks.append(block.check_exists)
        while rows - start >= batch_size:
            _check_all(checks)
            yield {name: values[start : start + batch_size].copy() for name, values in arrays.items()}
            start += batch_size
            # What is left is the end of this block.
            checks = [block.check_exists]
        kept, kept_rows = {name: values[start:] for name, values in arrays.items()}, rows - start
    if kept_rows:
        _check_all(checks)
        yield kept


def _check_all(checks: list[Callable[[], None]]) -> None:
    """Rows that were read ahead are not handed out once their epoch is gone."""
    for check in checks:
        check()


def _block_array(schema: ColumnSchema, values: ColumnValues, rows: int) -> Array:
    if isinstance(values, np.ndarray):
        return values
    if schema.is_text:
        extent = type(schema.extent)()
        extent.add([value for value in values if value is not None])
        if extent.fits_numpy and not schema.missing:
            return np.array(values, extent.numpy_dtype)
    array = np.empty(rows, object)
    _put(array, values)
    return array


def read_tensors(selection: Selection, schemas: list[ColumnSchema]) -> dict[str, torch.Tensor | list[Any]]:
    """All rows as torch tensors in the recorded dtype; text, bytes and ragged rows as lists."""
    import torch

    dense = [schema for schema in schemas if schema.is_dense]
    out = {schema.name: allocate(schema, selection.rows, raw=True) for schema in dense}
    tensors: dict[str, torch.Tensor | list[Any]] = {}
    for schema in schemas:
        if not schema.is_dense:
            tensors[schema.name] = []
        elif len(schema.dtypes) == 1:
            tensors[schema.name] = to_torch(out[schema.name], recorded_dtype(schema.dtypes[0]))
        else:
            tensors[schema.name] = torch.from_numpy(out[schema.name])
    for block in selection.blocks(schemas, raw=True, out=out):
        for schema in schemas:
            if not schema.is_dense:
                _extend(tensors[schema.name], block.values[schema.name])
    return tensors


def _extend(rows: torch.Tensor | list[Any], values: ColumnValues) -> None:
    assert isinstance(rows, list)
    if not _is_ragged(values):
        rows.extend(values)
        return
    for run in values:
        assert isinstance(run, RaggedRows)
        rows.extend(None if array is None else to_torch(array.copy(), run.dtype) for array in run.arrays())
