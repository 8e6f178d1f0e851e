"""Which calls a trace holds, in row order: by (epoch, attempt, call, rank).

A snapshot remembers one integer for each call and reads the headers again whenever they are needed, so that
its memory does not grow with what the headers say. Segments are opened for one bounded step at a time:
nothing keeps a dropped epoch alive between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ml_debugger.errors import CorruptDataError
from ml_debugger.store import layout
from ml_debugger.trace.call_stream import (
    CallStream,
    Keys,
    among,
    holds_calls,
    keys_of,
    merged_calls,
    merged_runs,
    scanned,
)
from ml_debugger.trace.header import INLINE, Call, Gap
from ml_debugger.trace.runs import CallRun
from ml_debugger.trace.segment_ref import (
    SegmentKey,
    SegmentRef,
    VanishedError,
    partition_segments,
    retry_vanished,
)

__all__ = [
    "RankSummary",
    "SegmentRef",
    "Snapshot",
    "VanishedError",
    "list_epochs",
    "partition_segments",
    "retry_vanished",
]


def list_epochs(trace_dir: Path) -> list[int]:
    """Epochs that hold rows, rising; -1 for the rows without one."""
    return retry_vanished(lambda: _list_epochs(trace_dir))


def _list_epochs(trace_dir: Path) -> list[int]:
    found: set[int] = set()
    for rank, rank_dir in layout.rank_directories(trace_dir):
        for partition in layout.partitions(rank_dir):
            if partition.epoch not in found and _holds_calls(rank, partition):
                found.add(partition.epoch)
    return sorted(found)


def _holds_calls(rank: int, partition: layout.Partition) -> bool:
    usable, _ = partition_segments(rank, partition)
    return any(map(holds_calls, usable))


@dataclass(frozen=True, slots=True)
class RankSummary:
    """What a snapshot holds of one rank; ``last_call`` is the highest call number of the newest attempt."""

    rank: int
    rows: int
    last_call: int | None


class Snapshot:
    """The calls of a trace, or of one of its epochs, that were committed when it was made."""

    def __init__(
        self,
        trace_dir: Path,
        n_epoch: int | None = None,
        accept: Callable[[Call | CallRun], bool] = lambda call: True,
    ) -> None:
        """List and decode every header once.

        Args:
            trace_dir: Directory of the (model, version).
            n_epoch: The epoch; -1: rows without one; None: all.
            accept: Called for every call or run, in no particular order; what it refuses is left out.

        Raises:
            VanishedError: An epoch was dropped meanwhile; use `retry_vanished`.
            CorruptDataError: A header cannot be decoded.
        """
        self.gaps: list[Gap] = []
        self.ranks: list[RankSummary] = []
        self.segments: dict[SegmentKey, SegmentRef] = {}
        self._torn: set[SegmentKey] = set()
        self._groups: dict[tuple[int, int], list[CallStream]] = {}
        self._accept = accept
        for rank, rank_dir in layout.rank_directories(trace_dir):
            self._add_rank(rank, rank_dir, n_epoch)

    def calls(self) -> Iterator[Call]:
        """Every call in row order.

        Holds no segment open while the consumer works. Raises VanishedError when the next call's epoch was
        dropped.
        """
        for group in sorted(self._groups):
            yield from merged_calls(self._groups[group])

    def runs(self) -> Iterator[Call | CallRun]:
        """As `calls`, with calls together that are alike and follow one another."""
        for group in sorted(self._groups):
            yield from merged_runs(self._groups[group])

    @property
    def num_calls(self) -> int:
        """Number of calls."""
        return sum(len(stream.keys) for streams in self._groups.values() for stream in streams)

    def segment(self, call: Call | CallRun, sequence: int) -> SegmentRef:
        """The segment that holds a piece of a call."""
        return self.segments[call.rank, call.epoch, call.attempt, sequence]

    def check_exists(self, call: Call | CallRun) -> None:
        """Raise VanishedError if the call has been dropped."""
        self.segment(call, call.sequence).check_exists()

    def _add_rank(self, rank: int, rank_dir: Path, n_epoch: int | None) -> None:
        rows, last = 0, (-1, -1)
        for partition in layout.partitions(rank_dir):
            if n_epoch is not None and partition.epoch != n_epoch:
                continue
            usable, torn = partition_segments(rank, partition)
            self.segments.update({(ref.rank, ref.epoch, ref.attempt, ref.sequence): ref for ref in usable})
            self._torn.update((rank, partition.epoch, entry.attempt, entry.sequence) for entry in torn)
            claimed = 0
            for attempt in sorted({ref.attempt for ref in usable}):
                found, last_call, referred = self._add_attempt(
                    [ref for ref in usable if ref.attempt == attempt]
                )
                rows += found
                last = max(last, (attempt, last_call))
                claimed += referred
            # Memory is allocated by what headers say; so they may not say more than there is.
            if claimed > (held := sum(ref.data_bytes() for ref in usable)):
                raise CorruptDataError(
                    f"the headers in {partition.path} name {claimed} bytes, its segments hold {held}",
                    "restore the partition from a copy, or drop the epoch",
                )
        self.ranks.append(RankSummary(rank, rows, last[1] if last[1] >= 0 else None))

    def _add_attempt(self, refs: Sequence[SegmentRef]) -> tuple[int, int, int]:
        """Take in the calls of a partition and attempt; returns (rows, last call, bytes referred to)."""
        rows, last_call, claimed = 0, -1, 0
        gaps: dict[int, Gap] = {}
        later = np.empty(0, np.uint64)
        # A call found in two segments counts once. Newest first: a repeated commit is the one known to have
        # succeeded.
        for ref in reversed(refs):
            stream = CallStream(ref)
            for header in scanned(ref):
                if isinstance(header, Gap):
                    gaps[header.first_call] = header
                    continue
                found = self._unseen(ref, header, later)
                if found is None:
                    continue
                claimed += found.chunk_bytes
                if self._accept(found):
                    stream.keys.frombytes(keys_of(found).tobytes())
                    rows += found.rows
                    last_call = max(last_call, stream.keys[-1])
            if stream.keys:
                self._groups.setdefault((ref.epoch, ref.attempt), []).append(stream)
                if ref is not refs[0]:
                    later = np.union1d(later, np.frombuffer(stream.keys, np.uint64))
        self.gaps.extend(gaps[first_call] for first_call in sorted(gaps))
        return rows, last_call, claimed

    def _unseen(self, ref: SegmentRef, header: Call | CallRun, later: Keys) -> Call | CallRun | None:
        """Of some calls those that no later segment holds too, and that can be read."""
        fresh = ~among(later, keys_of(header))
        if isinstance(header, CallRun):
            return header.select(fresh)
        return header if fresh[0] and self._is_readable(ref, header) else None

    def _is_readable(self, ref: SegmentRef, call: Call) -> bool:
        for _, sequence, *_ in call.chunks:
            if sequence in (INLINE, call.sequence):
                continue
            identity = (ref.rank, ref.epoch, ref.attempt, sequence)
            if identity in self._torn:
                return False
            if identity not in self.segments:
                ref.check_exists()
                raise CorruptDataError(
                    f"call {call.call} in {ref.path} has bytes in segment {sequence}, which is not there",
                    "restore the segment from a copy, or drop the epoch",
                )
        return True
