"""Which committed calls of a rank are in no slice yet.

Made to be asked again and again while a tracer writes: it remembers how far it has looked in every segment,
and looks again from the start only where the segment's own count says that a call of another thread was
committed late.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

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
class _Walk:
    """Where a walk through a segment has come to; ``tail``: what does not fill a slice yet."""

    last_key: int | None
    calls: int
    tail: SliceDraft | None = None
    calls_before_tail: int = 0


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

    def cover_keys(self, epoch: int, attempt: int, keys: list[int]) -> None:
        """These calls are on their way."""
        self._attempt(epoch, attempt).cover(np.array(keys, np.uint64))

    def drafts(self, n_epoch: int | None, *, tail_age_s: float) -> Iterator[SliceDraft]:
        """Slices to cut now, each full, or the end of its segment.

        Args:
            n_epoch: Only this epoch; -1: rows without one; None: all.
            tail_age_s: The end of a segment that is still written to waits until it is full, or as old as
                this.

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
        partition = layout.Partition(entry.epoch, layout.partition_directory(self._rank_dir, entry.epoch))
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

    def _partition_drafts(
        self, partition: layout.Partition, tail_age_s: float
    ) -> Generator[SliceDraft, None, bool]:
        """Drafts of a partition; returns whether nothing can follow."""
        finished = True
        for ref in self._list(partition):
            seen = self._seen.setdefault((ref.path, ref.inode), _Seen())
            if not seen.is_finished:
                yield from self._segment_drafts(ref, seen, tail_age_s)
            finished = finished and seen.is_finished
        return finished

    def _segment_drafts(self, ref: SegmentRef, seen: _Seen, tail_age_s: float) -> Iterator[SliceDraft]:
        with ref.opened() as segment:
            meta = segment.meta()
        now = time.monotonic()
        waited_s = 0.0 if seen.waiting_since is None else now - seen.waiting_since
        takes_tail = ref.sealed or waited_s >= tail_age_s
        if not meta or (meta == seen.meta and not takes_tail):
            seen.is_finished = ref.sealed
            return
        walk = yield from self._walk(ref, seen.last_key, seen.calls, takes_tail)
        if walk.calls < int(msgpack.unpackb(meta)["calls"]) and seen.last_key is not None:
            walk = yield from self._walk(ref, None, 0, takes_tail)
        seen.meta, seen.last_key, seen.calls = meta, walk.last_key, walk.calls
        seen.is_finished = ref.sealed
        if walk.tail is None:
            seen.waiting_since = None
        else:
            seen.calls = walk.calls_before_tail
            first = walk.tail.headers[0][0]
            seen.last_key = first - 1 if first else None
            seen.waiting_since = now if seen.waiting_since is None else seen.waiting_since

    def _walk(
        self, ref: SegmentRef, after: int | None, calls: int, takes_tail: bool
    ) -> Generator[SliceDraft, None, _Walk]:
        """Drafts of the headers behind ``after``, up to which there are ``calls``."""
        found = self._attempt(ref.epoch, ref.attempt)
        decoder = decoder_of(ref)
        walk = _Walk(after, calls)
        draft = SliceDraft(ref, found.segments)
        for key, value in _headers(ref, after):
            header = decoder.decode(key, value)
            if not found.is_covered(key) and _is_readable(header, found.torn):
                if not draft.headers:
                    walk.calls_before_tail = walk.calls
                draft.add(key, value, header)
            walk.last_key = key
            walk.calls += isinstance(header, Call)
            if draft.is_full:
                yield draft
                draft = SliceDraft(ref, found.segments)
        if draft.headers and takes_tail:
            yield draft
        elif draft.headers:
            walk.tail = draft
        return walk


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
