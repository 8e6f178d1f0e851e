"""`TraceDataset`: recorded rows as a map-style torch Dataset."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ml_debugger.errors import InvalidTypeError, NotFoundError
from ml_debugger.trace.columns import ColumnValues, RaggedRows
from ml_debugger.trace.dtypes import recorded_dtype, to_torch
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.source import RowIndex

_CACHE_BYTES = 32 << 20
_LIST_VALUE_BYTES = 64

_RowGetter = Callable[[int], Any]


class RowNotFoundError(NotFoundError, IndexError):
    """No such row; an IndexError too, by which Python's own iteration over a sequence ends."""


class TraceDataset(Dataset[dict[str, Any]]):
    """Rows of one table of a trace, in row order; made by `Trace.dataset`.

    An item is a dict by column: a CPU tensor of its own in the recorded dtype (a number is a tensor without
    dimensions), text as str, ``bytes`` as bytes, None where the row lacks the column. torch's default collate
    function makes batches of it if the rows of a column agree in shape.

    The rows are those that were committed when the dataset was made. Memory: about 20 bytes a call for a
    store, the calls read last (32 MiB, at least one call), and nothing that stays open on disk. Copies in
    DataLoader workers, forked or spawned, read by themselves. Reading in row order, or batches of rows that
    lie close together, reads each call once; a row taken alone reads the call that holds it.

    Raises:
        NotFoundError: From ``dataset[i]``: there is no such row (an IndexError too), or its epoch has been
            dropped.
        CorruptDataError: From ``dataset[i]``: stored bytes are not what was written.
    """

    def __init__(self, index: RowIndex, schemas: Sequence[ColumnSchema]) -> None:
        self._index = index
        self._schemas = list(schemas)
        self._cache: OrderedDict[int, tuple[int, dict[str, _RowGetter]]] = OrderedDict()
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        block, position = self._index.locate(self._row(row))
        return {name: get(position) for name, get in self._block(block).items()}

    def __getitems__(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Several rows, in the order asked for; each call is read once (DataLoader uses this)."""
        places = [self._index.locate(self._row(row)) for row in rows]
        items: list[dict[str, Any]] = [{} for _ in places]
        for number in sorted(range(len(places)), key=places.__getitem__):
            block, position = places[number]
            items[number] = {name: get(position) for name, get in self._block(block).items()}
        return items

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": OrderedDict(), "_cached_bytes": 0}

    def _row(self, row: int) -> int:
        if isinstance(row, (bool, np.bool_)) or not hasattr(row, "__index__"):
            raise InvalidTypeError(f"a row number must be an int, got {type(row).__name__}", "pass an int")
        number, rows = row.__index__(), len(self._index)
        if not -rows <= number < rows:
            raise RowNotFoundError(f"there is no row {number}", f"the dataset has {rows} rows")
        return number % rows

    def _block(self, block: int) -> dict[str, _RowGetter]:
        found = self._cache.get(block)
        if found is not None:
            self._cache.move_to_end(block)
            return found[1]
        values = self._index.read(block)
        size = sum(_size_bytes(column) for column in values.values())
        getters = {schema.name: _row_getter(schema, values[schema.name]) for schema in self._schemas}
        self._cache[block] = (size, getters)
        self._cached_bytes += size
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, (size, _) = self._cache.popitem(last=False)
            self._cached_bytes -= size
        return getters


def _size_bytes(values: ColumnValues) -> int:
    if isinstance(values, np.ndarray):
        return values.nbytes
    return sum(
        value.values.nbytes + value.shapes.nbytes
        if isinstance(value, RaggedRows)
        else _LIST_VALUE_BYTES + len(value or b"")
        for value in values
    )


def _row_getter(schema: ColumnSchema, values: ColumnValues) -> _RowGetter:
    """How to take one row out of a block; what it gives shares no memory with the block."""
    if schema.is_list:
        return values.__getitem__
    if isinstance(values, np.ndarray):
        single = len(schema.dtypes) == 1 and values.dtype == recorded_dtype(schema.dtypes[0]).raw
        dtype = recorded_dtype(schema.dtypes[0] if single else values.dtype.name)
        tensor = to_torch(values if values.flags.writeable else values.copy(), dtype)
        return lambda position: tensor[position].clone()
    rows = [(array, run.dtype) for run in values for array in run.arrays()]

    def get(position: int) -> Any:
        array, dtype = rows[position]
        return None if array is None else to_torch(array.copy(), dtype)

    return get
