"""Putting the blocks of a selection together: whole numpy arrays, torch tensors, or batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.trace.columns import ColumnValues, RaggedRows, dense_dtype
from ml_debugger.trace.dtypes import Array, recorded_dtype, to_torch
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.source import RowBlock, Selection, Targets

if TYPE_CHECKING:
    import torch


def allocate(schema: ColumnSchema, rows: int, raw: bool) -> Array:
    """An array for a column's rows, not filled; of objects where they make no one array."""
    if schema.fits_numpy_text:
        return np.empty(rows, schema.extent.numpy_dtype)
    if schema.is_dense:
        return np.empty((rows, *schema.row_shape), dense_dtype(schema, raw))
    return np.empty(rows, object)


def _in_turn(arrays: dict[str, Array]) -> Targets:
    """Rows of arrays that hold a whole selection, one block behind the other."""
    row = 0

    def targets(rows: int) -> dict[str, Array]:
        nonlocal row
        row += rows
        return {name: array[row - rows : row] for name, array in arrays.items()}

    return targets


def read_arrays(selection: Selection, schemas: list[ColumnSchema], *, raw: bool = False) -> dict[str, Array]:
    """All rows as numpy arrays; memory is taken once, and dense columns are read straight into it."""
    arrays = {schema.name: allocate(schema, selection.rows, raw) for schema in schemas}
    out = _in_turn({schema.name: arrays[schema.name] for schema in schemas if schema.is_dense})
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


class _Batch:
    """A batch that fills up: dense columns lie in arrays for all its rows, the others in parts so far.

    Args:
        schemas: Its columns.
        rows: How many it will have.
    """

    def __init__(self, schemas: list[ColumnSchema], rows: int) -> None:
        self._room = rows
        self._dense = {
            schema.name: allocate(schema, rows, raw=False) for schema in schemas if schema.is_dense
        }
        self._parts: dict[str, list[Array]] = {schema.name: [] for schema in schemas if not schema.is_dense}
        self._names = [schema.name for schema in schemas]
        self._filled = 0
        self._checks: list[Callable[[], None]] = []

    @property
    def is_full(self) -> bool:
        """Whether it has all its rows."""
        return self._filled == self._room

    def targets(self, rows: int) -> dict[str, Array]:
        """Where a block is read to that fits in whole; see `Targets`."""
        end = self._filled + rows
        return {} if end > self._room else {name: a[self._filled : end] for name, a in self._dense.items()}

    def take(self, block: RowBlock, arrays: dict[str, Array], start: int) -> int:
        """Take in rows of a block from ``start`` on; returns where the rows begin that did not fit."""
        stop = min(block.rows, start + self._room - self._filled)
        end = self._filled + stop - start
        if stop - start < block.rows:  # a whole block was read to its place
            for name, array in self._dense.items():
                array[self._filled : end] = arrays[name][start:stop]
        for name, parts in self._parts.items():
            parts.append(arrays[name][start:stop])
        self._checks.append(block.check_exists)
        self._filled = end
        return stop

    def arrays(self) -> dict[str, Array]:
        """Its rows.

        Raises:
            NotFoundError: Their epoch has been dropped since they were read.
        """
        for check in self._checks:
            check()
        return {
            name: self._dense[name] if name in self._dense else np.concatenate(self._parts[name])
            for name in self._names
        }


def iterate_batches(
    selection: Selection, schemas: list[ColumnSchema], batch_size: int
) -> Iterator[dict[str, Array]]:
    """Rows of a selection in batches; blocks that lie within a batch are read straight into it."""
    left = selection.rows
    batch = _Batch(schemas, min(batch_size, left))

    def targets(rows: int) -> dict[str, Array]:
        return batch.targets(rows)

    for block in selection.blocks(schemas, raw=False, out=targets, max_rows=batch_size):
        arrays = {
            schema.name: _block_array(schema, block.values[schema.name], block.rows) for schema in schemas
        }
        start = 0
        while start < block.rows:
            begin, start = start, batch.take(block, arrays, start)
            left -= start - begin
            if batch.is_full:
                yield batch.arrays()
                batch = _Batch(schemas, min(batch_size, left))


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
    for block in selection.blocks(schemas, raw=True, out=_in_turn(out)):
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
