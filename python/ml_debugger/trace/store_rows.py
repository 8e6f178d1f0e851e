"""Random access to the rows of a store: which call holds a row, found again by one integer a call."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from ml_debugger.trace.call_stream import read_call
from ml_debugger.trace.catalog import Snapshot
from ml_debugger.trace.columns import ColumnValues, KeptCall, read_columns
from ml_debugger.trace.header import Call
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.runs import CallRun
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.segment_ref import SegmentKey, SegmentRef


class StoreRows:
    """Rows of a store by number; see `ml_debugger.trace.source.RowIndex`. A block is a call.

    Memory: 20 bytes a call; some 200 more for a call of which only some rows are wanted.
    """

    def __init__(
        self, snapshot: Snapshot, calls: Iterable[KeptCall], schemas: Sequence[ColumnSchema]
    ) -> None:
        """Go through the headers of ``calls`` once."""
        self._schemas = list(schemas)
        self._segments = dict(snapshot.segments)
        numbers = {key: number for number, key in enumerate(self._segments)}
        self._homes = list(self._segments)
        self._home, self._key, counts = array("I"), array("Q"), array("Q")
        self._masks: dict[int, tuple[int, bytes]] = {}
        for kept in calls:
            call = kept.call
            assert isinstance(call, Call)
            if kept.keep is not None:
                self._masks[len(self._key)] = (call.rows, np.packbits(kept.keep).tobytes())
            self._home.append(numbers[call.rank, call.epoch, call.attempt, call.sequence])
            self._key.append(call.call)
            counts.append(kept.rows)
        self._ends = np.cumsum(np.frombuffer(counts, np.uint64)) if counts else np.empty(0, np.uint64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def locate(self, row: int) -> tuple[int, int]:
        """Number of the call that holds a row, and the row's position among those that are wanted of it."""
        block = int(np.searchsorted(self._ends, np.uint64(row), side="right"))
        return block, row - (int(self._ends[block - 1]) if block else 0)

    def read(self, block: int) -> dict[str, ColumnValues]:
        """Read the wanted rows of a call."""
        call = read_call(self._segments[self._homes[self._home[block]]], self._key[block])
        keep, rows = self._mask(block), call.rows
        if keep is not None:
            rows = int(np.count_nonzero(keep))
        return read_columns(self, [KeptCall(call, keep, rows)], self._schemas, raw=True)

    def segment(self, call: Call | CallRun, sequence: int) -> SegmentRef:
        """The segment that holds a piece of a call."""
        key: SegmentKey = (call.rank, call.epoch, call.attempt, sequence)
        return self._segments[key]

    def _mask(self, block: int) -> Mask | None:
        if block not in self._masks:
            return None
        rows, bits = self._masks[block]
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=rows).astype(np.bool_)
