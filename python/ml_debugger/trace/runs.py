"""Runs: consecutive calls of a segment that are all alike, listed and read without an object for each.

A call of one sample costs a reader as much Python as one of a thousand; in a run the core does that work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError
from ml_debugger.trace.dtypes import Array, recorded_dtype
from ml_debugger.trace.header import Call, CallDescription, Gap, HeaderDecoder
from ml_debugger.trace.slice_file import SliceFile

RUN_BYTES = 8 << 20

_HEADERS_A_SCAN = 2048
_CAPTURES = 32


@dataclass(frozen=True, slots=True)
class CallRun:
    """Some calls of one segment with one description, in call order; stands where a `Call` may.

    Attributes:
        rank: Of all of them.
        attempt: Of all of them.
        epoch: Of all of them; -1: none.
        sequence: The segment, which holds all bytes of these calls.
        description: What they have in common.
        keys: uint64: numbers of the calls, rising.
        counts: int64: rows of each.
        first_rows: int64: ``row_id`` of the first row of each.
        lengths: int64 (calls, captures): bytes of each capture.
        chunk_bytes: Bytes that lie outside of the headers.
        rows: Rows of all.
        ground_truth_rows: 0 or ``rows``.
    """

    rank: int
    attempt: int
    epoch: int
    sequence: int
    description: CallDescription
    keys: Array
    counts: Array
    first_rows: Array
    lengths: Array
    chunk_bytes: int
    rows: int
    ground_truth_rows: int

    @property
    def call(self) -> int:
        """Number of the first call."""
        return int(self.keys[0])

    @property
    def row_ids(self) -> Array:
        """``row_id`` of every row."""
        starts = np.cumsum(self.counts) - self.counts
        return np.repeat(self.first_rows - starts, self.counts) + np.arange(self.rows)

    def capture_bytes(self, capture: int) -> int:
        """Length of a capture in all calls together."""
        return int(self.lengths[:, capture].sum()) if capture < _CAPTURES else 0

    def select(self, wanted: Array) -> CallRun | None:
        """The calls that a mask marks; None without any."""
        if wanted.all():
            return self
        if not wanted.any():
            return None
        counts = self.counts[wanted]
        rows = int(counts.sum())
        return CallRun(
            self.rank,
            self.attempt,
            self.epoch,
            self.sequence,
            self.description,
            self.keys[wanted],
            counts,
            self.first_rows[wanted],
            self.lengths[wanted],
            self.chunk_bytes,  # of the whole: only an upper bound is needed of it
            rows,
            rows if self.ground_truth_rows else 0,
        )


def scan(
    segment: _core.Segment, decoder: HeaderDecoder, after: int | None, *, is_checked: bool
) -> tuple[list[Call | Gap | CallRun], int | None]:
    """The next calls and gaps of a segment, in key order, and the last key; None when there are no more.

    Raises:
        CorruptDataError: A header cannot be decoded.
    """
    rank, epoch, attempt = decoder.identity
    found = segment.scan(
        after, _HEADERS_A_SCAN, rank=rank, attempt=attempt, epoch=epoch, sequence=decoder.sequence
    )
    keys = np.frombuffer(found["keys"], np.int64)
    if not keys.size:
        return [], None
    columns = _Columns(found, keys)
    descriptions = [
        _described(decoder, segment, encoded, columns, number)
        for number, encoded in enumerate(found["descriptions"])
    ]
    if not is_checked:
        for number, description in enumerate(descriptions):
            _check(decoder, segment, columns, number, description)
    others = iter(found["others"])
    headers: list[Call | Gap | CallRun] = []
    for start, stop in columns.runs(descriptions):
        number = int(columns.description[start])
        if number < 0:
            key = int(keys[start]) & ((1 << 64) - 1)
            headers.append(decoder.decode(key, next(others), is_checked=is_checked))
        elif descriptions[number].has_shapes:
            headers += _single_calls(decoder, segment, keys[start:stop], is_checked)
        else:
            headers.append(columns.run(start, stop, descriptions[number], decoder))
    return headers, int(keys[-1]) & ((1 << 64) - 1)


def scan_singly(
    segment: SliceFile, decoder: HeaderDecoder, after: int | None, *, is_checked: bool
) -> tuple[list[Call | Gap | CallRun], int | None]:
    """As `scan`, call by call: a slice is no database, and holds few calls."""
    headers = segment.headers(after, _HEADERS_A_SCAN)
    found = [decoder.decode(key, value, is_checked=is_checked) for key, value in headers]
    return list(found), headers[-1][0] if headers else None


class _Columns:
    """What a scan found, a row a header."""

    def __init__(self, found: dict[str, Any], keys: Array) -> None:
        self.keys = keys
        self.rows, self.ground_truth_rows, self.first_rows, self.description, self.chunk_bytes = (
            np.frombuffer(found[name], np.int64)
            for name in ("rows", "ground_truth_rows", "first_rows", "description", "chunk_bytes")
        )
        self.lengths = np.frombuffer(found["lengths"], np.int64).reshape(-1, _CAPTURES)

    def runs(self, descriptions: list[CallDescription]) -> Iterator[tuple[int, int]]:
        """Ranges of headers that belong together: alike, and not too large; others stand alone."""
        steps = np.cumsum(self.lengths.sum(axis=1)) // RUN_BYTES
        alike = (np.diff(self.description) == 0) & (np.diff(self.ground_truth_rows > 0) == 0)
        alike &= (np.diff(steps) == 0) & (self.description[1:] >= 0)
        edges = [0, *(np.flatnonzero(~alike) + 1).tolist(), len(self.keys)]
        yield from itertools.pairwise(edges)

    def run(self, start: int, stop: int, description: CallDescription, decoder: HeaderDecoder) -> CallRun:
        rank, epoch, attempt = decoder.identity
        counts = self.rows[start:stop]
        rows = int(counts.sum())
        return CallRun(
            rank,
            attempt,
            epoch,
            decoder.sequence,
            description,
            self.keys[start:stop].view(np.uint64),
            counts,
            self.first_rows[start:stop],
            self.lengths[start:stop],
            int(self.chunk_bytes[start:stop].sum()),
            rows,
            rows if self.ground_truth_rows[start] else 0,
        )


def _single_calls(
    decoder: HeaderDecoder, segment: _core.Segment, keys: Array, is_checked: bool
) -> list[Call | Gap]:
    """Calls whose rows differ in shape are read one by one."""
    first = int(keys[0]) & ((1 << 64) - 1)
    headers = segment.headers(first - 1 if first else None, len(keys))
    return [decoder.decode(key, value, is_checked=is_checked) for key, value in headers]


def _described(
    decoder: HeaderDecoder, segment: _core.Segment, encoded: bytes, columns: _Columns, number: int
) -> CallDescription:
    first = int(np.flatnonzero(columns.description == number)[0])
    try:
        return decoder.describe(encoded, int(columns.rows[first]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, CorruptDataError):
        pass
    _single_calls(decoder, segment, columns.keys[first : first + 1], is_checked=False)
    raise AssertionError("a description that cannot be decoded makes the header corrupt")


def _check(
    decoder: HeaderDecoder,
    segment: _core.Segment,
    columns: _Columns,
    number: int,
    description: CallDescription,
) -> None:
    """Refuse calls whose numbers contradict each other: shapes are what memory is allocated by."""
    chosen = np.flatnonzero(columns.description == number)
    rows, lengths = columns.rows[chosen], columns.lengths[chosen]
    labels, first_rows = columns.ground_truth_rows[chosen], columns.first_rows[chosen]
    wrong = (labels != 0) & (labels != rows)
    wrong |= first_rows > np.iinfo(np.int64).max - rows
    if description.samples >= 0:
        wrong |= rows != description.samples
    for column in description.columns:
        captured = lengths[:, column.capture] if column.capture < _CAPTURES else np.zeros_like(rows)
        samples = np.ones_like(rows) if column.broadcast else rows
        if column.row_shape is not None:
            # Divided, since the product may be wider than 64 bits.
            row_bytes = math.prod(column.row_shape) * recorded_dtype(column.dtype).raw.itemsize
            wrong |= captured % row_bytes != 0 if row_bytes else captured != 0
            wrong |= (captured // row_bytes != samples) if row_bytes else False
        elif column.is_list:
            wrong |= captured < samples
    for position in chosen[wrong]:
        # Decoded alone, it says what is wrong with it.
        _single_calls(decoder, segment, columns.keys[position : position + 1], is_checked=False)
