"""Calls and gaps that lie in two segments of an attempt, since a commit of unknown outcome was made again.

Readers take the one of the later segment; who adds up the counters of segments takes the others off.
Needs neither numpy nor torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgpack

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError, NotFoundError
from ml_debugger.store import layout

_HEADERS_A_STEP = 256
_CALL = 0


def first_key(handle: _core.Segment) -> int | None:
    """The lowest key of a segment; None if it is empty."""
    headers = handle.headers(None, 1)
    return headers[0][0] if headers else None


def repeated(
    segments: list[tuple[layout.SegmentEntry, int]],
) -> Iterator[tuple[layout.SegmentEntry, dict[str, int]]]:
    """The counters of what later segments hold too, by the segment that does not count.

    Segments follow one another in the order of calls, so only where two overlap is there anything to read.

    Args:
        segments: Those of one attempt in one partition by rising sequence, with their first keys.

    Raises:
        CorruptDataError: A header cannot be decoded.
    """
    for position, (entry, _) in enumerate(segments[:-1]):
        later = segments[position + 1 :]
        with contextlib.suppress(NotFoundError):  # dropped meanwhile
            headers = dict(_headers_from(entry, min(first for _, first in later)))
            left = set(headers)
            for other, first in later:
                if left and first <= max(left):
                    left -= _keys_among(other, left)
            again = [headers[key] for key in set(headers) - left]
            if again:
                yield entry, _counters(entry, again)


def _headers_from(entry: layout.SegmentEntry, key: int) -> Iterator[tuple[int, bytes]]:
    handle = _core.Segment(str(entry.path), sealed=entry.sealed)
    try:
        after = key - 1 if key else None
        while headers := handle.headers(after, _HEADERS_A_STEP):
            yield from headers
            after = headers[-1][0]
    finally:
        handle.close()


def _keys_among(entry: layout.SegmentEntry, keys: set[int]) -> set[int]:
    handle = _core.Segment(str(entry.path), sealed=entry.sealed)
    try:
        found = (handle.headers(key - 1 if key else None, 1) for key in keys)
        return {headers[0][0] for headers in found if headers} & keys
    finally:
        handle.close()


def _counters(entry: layout.SegmentEntry, headers: list[bytes]) -> dict[str, int]:
    counters = dict.fromkeys(("rows", "ground_truth_rows", "calls", "discarded_rows"), 0)
    for encoded in headers:
        try:
            kind, core, *_ = msgpack.unpackb(encoded)
            rows, labelled = _figures(kind, core)
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise CorruptDataError(
                f"a header of {entry.path} is damaged: {error!r}", "restore the segment from a copy"
            ) from error
        if kind == _CALL:
            counters["calls"] += 1
            counters["rows"] += rows
            counters["ground_truth_rows"] += labelled
        else:
            counters["discarded_rows"] += rows
    return counters


def _figures(kind: Any, core: Any) -> tuple[int, int]:
    return int(core["rows"]), int(core["ground_truth_rows"]) if kind == _CALL else 0
