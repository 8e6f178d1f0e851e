"""Which calls a trace holds, in row order: by (epoch, attempt, call, rank).

A snapshot remembers one integer for each call and reads the headers again whenever they are needed, so that
its memory does not grow with what the headers say. Segments are opened for one bounded step at a time:
nothing keeps a dropped epoch alive between two steps.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError, NotFoundError
from ml_debugger.store import layout
from ml_debugger.trace.braid import braided
from ml_debugger.trace.header import INLINE, Call, Gap, HeaderDecoder
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.runs import CallRun, scan, scan_singly
from ml_debugger.trace.slice_file import SliceFile

_HEADERS_A_STEP = 256
# Of all ranks together that take turns: what is read ahead does not grow with their number.
_HEADERS_AHEAD = 4096
_FEWEST_HEADERS_A_STEP = 4
_MOST_BRAIDED = 64  # ranks; each holds a run ahead
_TRIES = 5

_Result = TypeVar("_Result")
_Keys: TypeAlias = "npt.NDArray[np.uint64]"


class VanishedError(NotFoundError):
    """What was being read has been dropped."""


# (rank, epoch, attempt, sequence)
SegmentKey: TypeAlias = tuple[int, int, int, int]


class SegmentLookup(Protocol):
    """Knows where the pieces of calls lie."""

    def segment(self, call: Call | CallRun, sequence: int) -> SegmentRef:
        """The segment that holds a piece of a call."""


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """One segment, not open; ``inode`` tells it from a later one of the same name.

    One that is staged may be moved to ``home`` meanwhile; there ``made_ns``, the time of its `segment.json`,
    tells it from a later one.
    """

    rank: int
    epoch: int
    attempt: int
    sequence: int
    path: Path
    sealed: bool
    inode: int
    home: Path | None = None
    made_ns: int = -1

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice, which an upload has brought."""
        return self.path.suffix == ".zip"

    @contextlib.contextmanager
    def opened(self) -> Iterator[_core.Segment | SliceFile]:
        """The open segment, for one bounded step.

        Raises:
            VanishedError: It has been dropped.
        """
        try:
            segment = self._open()
        except NotFoundError:
            try:
                segment = self._open()  # moved in this moment
            except NotFoundError as error:
                raise self._vanished() from error
        try:
            yield segment
        finally:
            segment.close()

    def _open(self) -> _core.Segment | SliceFile:
        path, sealed = self._place()
        return SliceFile(path) if self.is_slice else _core.Segment(str(path), sealed=sealed)

    def check_exists(self) -> None:
        """Raise VanishedError if the segment has been dropped."""
        self._place()

    def _place(self) -> tuple[Path, bool]:
        """Where it lies now, and whether it is sealed there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.stat(self.path).st_ino == self.inode:
                return self.path, self.sealed
        if self.home is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.stat(self.home / layout.SEGMENT_FILE).st_mtime_ns == self.made_ns:
                    return self.home, True
        raise self._vanished()

    def data_bytes(self) -> int:
        """Size of the data file: no chunk in it can be larger."""
        path, _ = self._place()
        try:
            return os.stat(path if self.is_slice else path / layout.DATA_FILE).st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._vanished() from error

    def _vanished(self) -> VanishedError:
        epoch = "the rows without an epoch" if self.epoch == layout.NO_EPOCH else f"epoch {self.epoch}"
        return VanishedError(
            f"{epoch} of rank {self.rank} was dropped while it was read ({self.path} is gone)",
            "start reading again; what is left is complete",
        )


def retry_vanished(operation: Callable[[], _Result]) -> _Result:
    """Run ``operation`` again, a few times, when an epoch is dropped under it."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(VanishedError):
            return operation()
    return operation()


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
    for ref in usable:
        for key, value in _headers(ref):
            if isinstance(_decoder(ref).decode(key, value), Call):
                return True
    return False


@dataclass
class _Stream:
    """The calls of one segment that belong to a snapshot, by their keys, rising."""

    ref: SegmentRef
    keys: array[int] = field(default_factory=lambda: array("Q"))

    def runs(self) -> Iterator[Call | CallRun]:
        """The same calls as `calls`, those that are alike together."""
        wanted = np.frombuffer(self.keys, np.uint64)
        left = len(wanted)
        for header in _scanned(self.ref, self.keys[0], is_checked=True):
            if isinstance(header, CallRun):
                run = header.select(_among(wanted, header.keys))
                if run is not None:
                    left -= len(run.keys)
                    yield run
            elif isinstance(header, Call) and _among(wanted, np.array([header.call], np.uint64))[0]:
                left -= 1
                yield header
            if not left:
                return
        raise self._incomplete(int(wanted[-left]))

    def calls(self, headers_a_step: int = _HEADERS_A_STEP) -> Iterator[Call]:
        position = 0
        while position < len(self.keys):
            step = self._step(position, headers_a_step)
            yield from step
            position += len(step)

    def _step(self, position: int, headers_a_step: int) -> list[Call]:
        """Decode the next calls; at least one, so that every step makes progress."""
        decoder = _decoder(self.ref)
        calls: list[Call] = []
        after = self.keys[position] - 1 if self.keys[position] else None
        with self.ref.opened() as segment:
            while not calls:
                headers = segment.headers(after, headers_a_step)
                for key, value in headers:
                    if position < len(self.keys) and key == self.keys[position]:
                        call = decoder.decode(key, value, is_checked=True)
                        assert isinstance(call, Call)
                        calls.append(call)
                        position += 1
                if not headers or (position < len(self.keys) and headers[-1][0] > self.keys[position]):
                    break
                after = headers[-1][0]
        if not calls:
            raise self._incomplete(self.keys[position])
        return calls

    def _incomplete(self, key: int) -> CorruptDataError:
        return CorruptDataError(
            f"the header of call {key} has left {self.ref.path}", "restore the segment from a copy"
        )


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
        self._groups: dict[tuple[int, int], list[_Stream]] = {}
        self._accept = accept
        for rank, rank_dir in layout.rank_directories(trace_dir):
            self._add_rank(rank, rank_dir, n_epoch)

    def calls(self) -> Iterator[Call]:
        """Every call in row order.

        Holds no segment open while the consumer works. Raises VanishedError when the next call's epoch was
        dropped.
        """
        for group in sorted(self._groups):
            yield from _in_turn(_chains(self._groups[group]))

    def runs(self) -> Iterator[Call | CallRun]:
        """As `calls`, with calls together that are alike and follow one another."""
        for group in sorted(self._groups):
            chains = _chains(self._groups[group])
            if len(chains) == 1:
                for stream in chains[0]:
                    yield from stream.runs()
            else:  # several ranks: their calls take turns
                braid = len(chains) <= _MOST_BRAIDED
                yield from braided([_chained_runs(chain) for chain in chains]) if braid else _in_turn(chains)

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
            stream = _Stream(ref)
            for header in _scanned(ref):
                if isinstance(header, Gap):
                    gaps[header.first_call] = header
                    continue
                found = self._unseen(ref, header, later)
                if found is None:
                    continue
                claimed += found.chunk_bytes
                if self._accept(found):
                    stream.keys.frombytes(_keys(found).tobytes())
                    rows += found.rows
                    last_call = max(last_call, stream.keys[-1])
            if stream.keys:
                self._groups.setdefault((ref.epoch, ref.attempt), []).append(stream)
                if ref is not refs[0]:
                    later = np.union1d(later, np.frombuffer(stream.keys, np.uint64))
        self.gaps.extend(gaps[first_call] for first_call in sorted(gaps))
        return rows, last_call, claimed

    def _unseen(self, ref: SegmentRef, header: Call | CallRun, later: _Keys) -> Call | CallRun | None:
        """Of some calls those that no later segment holds too, and that can be read."""
        fresh = ~_among(later, _keys(header))
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


def read_call(ref: SegmentRef, key: int) -> Call:
    """Read one call again whose key was listed before.

    Raises:
        VanishedError: Its segment has been dropped.
        CorruptDataError: It is not there any more.
    """
    with ref.opened() as segment:
        headers = segment.headers(key - 1 if key else None, 1)
    if not headers or headers[0][0] != key:
        raise CorruptDataError(
            f"the header of call {key} has left {ref.path}", "restore the segment from a copy"
        )
    call = _decoder(ref).decode(*headers[0], is_checked=True)
    assert isinstance(call, Call)
    return call


def _chains(streams: list[_Stream]) -> list[list[_Stream]]:
    """Streams of one rank that follow one another need no merging; few chains keep the read-ahead small."""
    chains: list[list[_Stream]] = []
    for stream in sorted(streams, key=lambda stream: (stream.ref.rank, stream.keys[0])):
        tail = chains[-1][-1] if chains else None
        if tail is not None and tail.ref.rank == stream.ref.rank and tail.keys[-1] < stream.keys[0]:
            chains[-1].append(stream)
        else:
            chains.append([stream])
    return chains


def _in_turn(chains: list[list[_Stream]]) -> Iterator[Call]:
    """The calls of several ranks by number, then by rank."""
    ahead = max(_FEWEST_HEADERS_A_STEP, min(_HEADERS_A_STEP, _HEADERS_AHEAD // len(chains)))
    merged = [_chained(chain, ahead) for chain in chains]
    yield from heapq.merge(*merged, key=lambda call: (call.call, call.rank))


def _chained(chain: list[_Stream], headers_a_step: int) -> Iterator[Call]:
    for stream in chain:
        yield from stream.calls(headers_a_step)


def _chained_runs(chain: list[_Stream]) -> Iterator[Call | CallRun]:
    for stream in chain:
        yield from stream.runs()


def _keys(header: Call | CallRun) -> _Keys:
    return header.keys if isinstance(header, CallRun) else np.array([header.call], np.uint64)


def _among(sorted_keys: _Keys, keys: _Keys) -> Mask:
    """Which of ``keys`` stand in ``sorted_keys``."""
    if not sorted_keys.size:
        return np.zeros(keys.size, np.bool_)
    positions = np.minimum(np.searchsorted(sorted_keys, keys), sorted_keys.size - 1)
    found: Mask = sorted_keys[positions] == keys
    return found


def partition_segments(
    rank: int, partition: layout.Partition
) -> tuple[list[SegmentRef], list[layout.SegmentEntry]]:
    """(Segments that may be opened, those that a power cut may have torn) of a partition.

    Raises:
        VanishedError: It was dropped meanwhile.
    """
    usable, torn = [], []
    for entry in layout.segments(partition.path):
        if not entry.usable:
            torn.append(entry)
            warnings.warn(
                f"{entry.path} was being written when the machine lost power and is left out; "
                "`ml-debugger recover` saves what it holds",
                stacklevel=2,
            )
            continue
        home = partition.path / entry.path.name
        is_staged = home != entry.path
        try:
            inode = os.stat(entry.path).st_ino
            made_ns = os.stat(entry.path / layout.SEGMENT_FILE).st_mtime_ns if is_staged else -1
        except (FileNotFoundError, NotADirectoryError) as error:
            raise VanishedError(
                f"{entry.path} was dropped while it was listed", "start reading again"
            ) from error
        usable.append(
            SegmentRef(
                rank,
                partition.epoch,
                entry.attempt,
                entry.sequence,
                entry.path,
                entry.sealed,
                inode,
                home if is_staged else None,
                made_ns,
            )
        )
    return usable, torn


def _decoder(ref: SegmentRef) -> HeaderDecoder:
    return HeaderDecoder(ref.rank, ref.epoch, ref.attempt, ref.sequence, holds_all_pieces=ref.is_slice)


def _scanned(
    ref: SegmentRef, first_key: int = 0, *, is_checked: bool = False
) -> Iterator[Call | Gap | CallRun]:
    """Calls and gaps from a key on; the segment is open only while a step is fetched."""
    decoder = _decoder(ref)
    after: int | None = first_key - 1 if first_key else None
    while True:
        with ref.opened() as segment:
            if isinstance(segment, SliceFile):
                headers, after = scan_singly(segment, decoder, after, is_checked=is_checked)
            else:
                headers, after = scan(segment, decoder, after, is_checked=is_checked)
        if after is None:
            return
        yield from headers


def _headers(ref: SegmentRef) -> Iterator[tuple[int, bytes]]:
    """Every header of a segment in key order; a segment is open only while a step's headers are fetched."""
    after: int | None = None
    while True:
        with ref.opened() as segment:
            headers = segment.headers(after, _HEADERS_A_STEP)
        if not headers:
            return
        yield from headers
        after = headers[-1][0]
