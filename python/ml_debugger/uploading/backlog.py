"""Which committed calls of a rank are in no slice yet.

Made to be asked again and again while a tracer writes: it remembers how far it has looked in every segment, and looks
again from the start only where the segment's own count says that a call of another thread was committed late.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ml_debugger import _core
from ml_debugger.store import layout
from ml_debugger.trace.catalog import SegmentRef, VanishedError, partition_segments
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.header import INLINE, Call
from ml_debugger.uploading.ledger import Entry
from ml_debugger.uploading.slices import SliceDraft, decoder_of

_HEADERS_A_STEP = 256


@dataclass
class _Seen:
    """How far a segment was looked through: all headers up to ``last_key`` are in slices."""

    meta: bytes = b""
    last_key: int | None = None
    calls: int = 0
    waiting_since: float | None = None
    is_finished: bool = False


@dataclass
class _Attempt:
    """Segments and covered keys of one attempt in one partition."""

    covered: Array = field(default_factory=lambda: np.empty(0, np.uint64))
    segments: dict[int, SegmentRef] = field(default_factory=dict)
    torn: set[int] = field(default_factory=set)

    def cover(self, keys: Array) -> None:
        self.covered = np.union1d(self.covered, keys)

    def is_covered(self, key: int) -> bool:
        position = int(np.searchsorted(self.covered, np.uint64(key)))
        return position < self.covered.size and int(self.covered[position]) == key


class Backlog:
    """Calls of one rank that are in no slice of one endpoint."""

    def __init__(self, rank: int, rank_dir: Path) -> None:
        self._rank = rank
        self._rank_dir = rank_dir
        self._seen: dict[tuple[Path, int], _Seen] = {}
        self._attempts: dict[tuple[int, int], _Attempt] = {}
        self._idle: dict[Path, int] = {}

    def reset(self, entries: list[Entry]) -> None:
        """Begin anew: these slices are all there are."""
        self._seen.clear()
        self._attempts.clear()
        self._idle.clear()
        for entry in entries:
            self.cover(entry)

    def cover(self, entry: Entry) -> None:
        """The calls of a slice need no other one."""
        self._attempt(entry.epoch, entry.attempt).cover(entry.keys)

    def drafts(self, n_epoch: int | None, *, tail_age_s: float) -> Iterator[SliceDraft]:
        """Slices to cut now, each full, or the end of its segment.

        Args:
            n_epoch: Only this epoch; -1: rows without one; None: all.
            tail_age_s: The end of a segment that is still written to waits until it is full, or as old as this.

        Raises:
            VanishedError: An epoch was dropped meanwhile.
            CorruptDataError: A header cannot be decoded.
        """
        for partition in layout.partitions(self._rank_dir):
            if n_epoch is not None and partition.epoch != n_epoch:
                continue
            try:
                modified = partition.path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if self._idle.get(partition.path) == modified:
                continue
            finished = yield from self._partition_drafts(partition, tail_age_s)
            if finished:
                self._idle[partition.path] = modified

    def draft_of(self, entry: Entry) -> SliceDraft | None:
        """The draft that a slice was cut from; None if its rows are no longer there."""
        partition = layout.Partition(
            entry.epoch, layout.partition_directory(self._rank_dir, entry.epoch)
        )
        try:
            self._list(partition)
            found = self._attempt(entry.epoch, entry.attempt)
            ref = found.segments.get(entry.sequence)
            keys = entry.keys
            if ref is None or not keys.size:
                return None
            draft = SliceDraft(ref, found.segments)
            wanted = set(keys.tolist())
            decoder = decoder_of(ref)
            for key, value in _headers(ref, int(keys[0]) - 1 if keys[0] else None):
                if key > int(keys[-1]):
                    break
                if key in wanted:
                    draft.add(key, value, decoder.decode(key, value))
            return draft if len(draft.headers) == keys.size else None
        except VanishedError:
            return None

    def _attempt(self, epoch: int, attempt: int) -> _Attempt:
        return self._attempts.setdefault((epoch, attempt), _Attempt())

    def _list(self, partition: layout.Partition) -> list[SegmentRef]:
        usable, torn = partition_segments(self._rank, partition)
        refs = [ref for ref in usable if not ref.is_slice]
        for attempt in {ref.attempt for ref in refs}:
            found = self._attempt(partition.epoch, attempt)
            found.segments = {ref.sequence: ref for ref in refs if ref.attempt == attempt}
            found.torn = {entry.sequence for entry in torn if entry.attempt == attempt}
        return refs

    def _partition_drafts(self, partition: layout.Partition, tail_age_s: float) -> Any:
        finished = True
        for ref in self._list(partition):
            seen = self._seen.setdefault((ref.path, ref.inode), _Seen())
            if not seen.is_finished:
                yield from self._segment_drafts(ref, seen, tail_age_s)
            finished = finished and seen.is_finished
        return finished

    def _segment_drafts(self, ref: SegmentRef, seen: _Seen, tail_age_s: float) -> Iterator[SliceDraft]:
        with ref.opened() as segment:
            assert isinstance(segment, _core.Segment)
            meta = segment.meta()
        now = time.monotonic()
        is_due = ref.sealed or (
            seen.waiting_since is not None and now - seen.waiting_since >= tail_age_s
        ) or tail_age_s == 0
        if meta == seen.meta and not is_due:
            return
        if not meta:
            seen.is_finished = ref.sealed
            return
        expected_calls = int(msgpack.unpackb(meta)["calls"])
        for start in (seen.last_key, None):
            calls = seen.calls if start is not None else 0
            tail = None
            for draft, calls_before, calls in self._pass(ref, start, calls):
                if draft is None:
                    continue
                if draft.is_full or is_due or tail_age_s == 0:
                    yield draft
                else:
                    tail = (draft, calls_before)
            if calls >= expected_calls or start is None:
                break
        seen.meta = meta
        if tail is None:
            seen.calls, seen.last_key, seen.waiting_since = calls, self._last_key, None
            seen.is_finished = ref.sealed
        else:
            draft, seen.calls = tail
            first = draft.headers[0][0]
            seen.last_key = first - 1 if first else None
            seen.waiting_since = now if seen.waiting_since is None else seen.waiting_since

    def _pass(
        self, ref: SegmentRef, after: int | None, calls: int
    ) -> Iterator[tuple[SliceDraft | None, int, int]]:
        """(draft or None, calls before it, calls so far) of one walk through a segment."""
        found = self._attempt(ref.epoch, ref.attempt)
        decoder = decoder_of(ref)
        draft, calls_before = SliceDraft(ref, found.segments), calls
        self._last_key = after
        for key, value in _headers(ref, after):
            header = decoder.decode(key, value)
            self._last_key = key
            if not found.is_covered(key) and _is_readable(header, found.torn):
                if not draft.headers:
                    calls_before = calls
                draft.add(key, value, header)
            calls += isinstance(header, Call)
            if draft.is_full:
                yield draft, calls_before, calls
                draft, calls_before = SliceDraft(ref, found.segments), calls
        yield draft if draft.headers else None, calls_before, calls


def _is_readable(header: Any, torn: set[int]) -> bool:
    """Not a call whose bytes went with a segment that a power cut has torn."""
    return not isinstance(header, Call) or not any(
        chunk[1] != INLINE and chunk[1] in torn for chunk in header.chunks
    )


def _headers(ref: SegmentRef, after: int | None) -> Iterator[tuple[int, bytes]]:
    while True:
        with ref.opened() as segment:
            headers = segment.headers(after, _HEADERS_A_STEP)
        if not headers:
            return
        yield from headers
        after = headers[-1][0]
