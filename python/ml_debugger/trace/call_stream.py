"""The calls of one segment, read again step by step, and how those of several segments follow one another.

Headers are fetched when they are needed, so that memory does not grow with what they say. A segment is open
only while a step is fetched: nothing keeps a dropped epoch alive between two steps.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ml_debugger.errors import CorruptDataError
from ml_debugger.trace.braid import braided
from ml_debugger.trace.header import Call, Gap, HeaderDecoder
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.runs import CallRun, scan, scan_singly
from ml_debugger.trace.segment_ref import SegmentRef
from ml_debugger.trace.slice_file import SliceFile

_HEADERS_A_STEP = 256
# Of all ranks together that take turns: what is read ahead does not grow with their number.
_HEADERS_AHEAD = 4096
_FEWEST_HEADERS_A_STEP = 4
_MOST_BRAIDED = 64  # ranks; each holds a run ahead

Keys: TypeAlias = "npt.NDArray[np.uint64]"


@dataclass
class CallStream:
    """The calls of one segment that belong to a snapshot, by their keys, rising."""

    ref: SegmentRef
    keys: array[int] = field(default_factory=lambda: array("Q"))

    def runs(self) -> Iterator[Call | CallRun]:
        """The same calls as `calls`, those that are alike together."""
        wanted = np.frombuffer(self.keys, np.uint64)
        left = len(wanted)
        for header in scanned(self.ref, self.keys[0], is_checked=True):
            if isinstance(header, CallRun):
                run = header.select(among(wanted, header.keys))
                if run is not None:
                    left -= len(run.keys)
                    yield run
            elif isinstance(header, Call) and among(wanted, np.array([header.call], np.uint64))[0]:
                left -= 1
                yield header
            if not left:
                return
        raise _header_has_left(self.ref, int(wanted[-left]))

    def calls(self, headers_a_step: int) -> Iterator[Call]:
        """Every call; so many headers are read in one step."""
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
            raise _header_has_left(self.ref, self.keys[position])
        return calls


def merged_calls(streams: list[CallStream]) -> Iterator[Call]:
    """The calls of several segments by number, then by rank."""
    yield from _in_turn(_chains(streams))


def merged_runs(streams: list[CallStream]) -> Iterator[Call | CallRun]:
    """As `merged_calls`, with calls together that are alike and follow one another."""
    chains = _chains(streams)
    if len(chains) == 1:
        yield from _chained_runs(chains[0])
    elif len(chains) <= _MOST_BRAIDED:  # several ranks: their calls take turns
        yield from braided([_chained_runs(chain) for chain in chains])
    else:
        yield from _in_turn(chains)


def _chains(streams: list[CallStream]) -> list[list[CallStream]]:
    """Streams of one rank that follow one another need no merging; few chains keep the read-ahead small."""
    chains: list[list[CallStream]] = []
    for stream in sorted(streams, key=lambda stream: (stream.ref.rank, stream.keys[0])):
        tail = chains[-1][-1] if chains else None
        if tail is not None and tail.ref.rank == stream.ref.rank and tail.keys[-1] < stream.keys[0]:
            chains[-1].append(stream)
        else:
            chains.append([stream])
    return chains


def _in_turn(chains: list[list[CallStream]]) -> Iterator[Call]:
    ahead = max(_FEWEST_HEADERS_A_STEP, min(_HEADERS_A_STEP, _HEADERS_AHEAD // len(chains)))
    merged = [_chained(chain, ahead) for chain in chains]
    yield from heapq.merge(*merged, key=lambda call: (call.call, call.rank))


def _chained(chain: list[CallStream], headers_a_step: int) -> Iterator[Call]:
    for stream in chain:
        yield from stream.calls(headers_a_step)


def _chained_runs(chain: list[CallStream]) -> Iterator[Call | CallRun]:
    for stream in chain:
        yield from stream.runs()


def read_call(ref: SegmentRef, key: int) -> Call:
    """Read one call again whose key was listed before.

    Raises:
        VanishedError: Its segment has been dropped.
        CorruptDataError: It is not there any more.
    """
    with ref.opened() as segment:
        headers = segment.headers(key - 1 if key else None, 1)
    if not headers or headers[0][0] != key:
        raise _header_has_left(ref, key)
    call = _decoder(ref).decode(*headers[0], is_checked=True)
    assert isinstance(call, Call)
    return call


def scanned(
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


def holds_calls(ref: SegmentRef) -> bool:
    """Whether there is a call in a segment, and not gaps alone."""
    decoder = _decoder(ref)
    after: int | None = None
    while True:
        with ref.opened() as segment:
            headers = segment.headers(after, _HEADERS_A_STEP)
        if not headers:
            return False
        if any(isinstance(decoder.decode(key, value), Call) for key, value in headers):
            return True
        after = headers[-1][0]


def _decoder(ref: SegmentRef) -> HeaderDecoder:
    return HeaderDecoder(ref.rank, ref.epoch, ref.attempt, ref.sequence, holds_all_pieces=ref.is_slice)


def _header_has_left(ref: SegmentRef, key: int) -> CorruptDataError:
    return CorruptDataError(
        f"the header of call {key} has left {ref.path}", "restore the segment from a copy"
    )


def keys_of(header: Call | CallRun) -> Keys:
    """The numbers of a call, or of the calls of a run, rising."""
    return header.keys if isinstance(header, CallRun) else np.array([header.call], np.uint64)


def among(sorted_keys: Keys, keys: Keys) -> Mask:
    """Which of ``keys`` stand in ``sorted_keys``."""
    if not sorted_keys.size:
        return np.zeros(keys.size, np.bool_)
    positions = np.minimum(np.searchsorted(sorted_keys, keys), sorted_keys.size - 1)
    found: Mask = sorted_keys[positions] == keys
    return found
