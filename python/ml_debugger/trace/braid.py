"""Runs of several ranks, braided into one: their calls take turns, and still cost no Python each.

Under data parallelism call n of every rank comes before call n + 1 of any, and all of them are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.header import Call
from ml_debugger.trace.runs import RUN_BYTES, CallRun


@dataclass(frozen=True, slots=True)
class BraidedRun(CallRun):
    """A run whose calls lie in several segments; what a run has of one segment is that of the first strand.

    Attributes:
        strands: The runs, each with the positions of its calls in this one.
    """

    strands: tuple[tuple[CallRun, Array], ...] = ()


def braided(chains: list[Iterator[Call | CallRun]]) -> Iterator[Call | CallRun]:
    """The calls of all chains in the order of (call, rank), in runs where those are alike.

    Args:
        chains: Each in rising order of calls.
    """
    waiting = [_Chain(chain) for chain in chains]
    while waiting := [chain for chain in waiting if chain.head is not None]:
        heads = [chain.head for chain in waiting if chain.head is not None]
        if len(heads) == 1:
            yield waiting[0].take_all()
        elif (last := _last_together(heads)) is not None:
            yield _braid([run for chain in waiting if (run := chain.take_until(last)) is not None])
        else:
            order = sorted(range(len(heads)), key=lambda number: (heads[number].call, heads[number].rank))
            following = heads[order[1]]
            yield waiting[order[0]].take_before(following.call, following.rank)


class _Chain:
    """Calls of one rank: the next of them, as far as they were read."""

    def __init__(self, calls: Iterator[Call | CallRun]) -> None:
        self._calls = calls
        self.head: Call | CallRun | None = next(calls, None)

    def take_all(self) -> Call | CallRun:
        head = self.head
        assert head is not None
        self.head = next(self._calls, None)
        return head

    def take_until(self, last: int) -> CallRun | None:
        """The calls up to a number, of a head that is a run; None without any."""
        head = self.head
        assert isinstance(head, CallRun)
        stop = int(np.searchsorted(head.keys, np.uint64(last), side="right"))
        if stop == len(head.keys):
            self.head = next(self._calls, None)
            return head
        self.head = _part(head, stop, len(head.keys))
        return _part(head, 0, stop) if stop else None

    def take_before(self, call: int, rank: int) -> Call | CallRun:
        """The calls before one of another chain; at least one."""
        head = self.head
        assert head is not None
        last = call if head.rank < rank else call - 1
        if isinstance(head, Call):
            return self.take_all()
        taken = self.take_until(last)
        assert taken is not None
        return taken


def _part(run: CallRun, start: int, stop: int) -> CallRun:
    """Consecutive calls of a run, as views: a head may be cut into many."""
    counts = run.counts[start:stop]
    rows = int(counts.sum())
    return CallRun(
        run.rank,
        run.attempt,
        run.epoch,
        run.sequence,
        run.description,
        run.keys[start:stop],
        counts,
        run.first_rows[start:stop],
        run.lengths[start:stop],
        run.chunk_bytes,  # of the whole: only an upper bound is needed of it
        rows,
        rows if run.ground_truth_rows else 0,
    )


def _last_together(heads: list[Call | CallRun]) -> int | None:
    """Up to which call the heads make one run of bounded size; None if they are not alike."""
    runs = [head for head in heads if isinstance(head, CallRun)]
    first = runs[0] if runs else None
    if first is None or len(runs) < len(heads):
        return None
    labelled = bool(first.ground_truth_rows)
    for run in runs[1:]:
        if run.description != first.description or bool(run.ground_truth_rows) != labelled:
            return None
    # Behind the last call of a head there may be more of its chain.
    last = min(int(run.keys[-1]) for run in runs)
    keys = np.concatenate([run.keys for run in runs])
    sizes = np.concatenate([run.lengths.sum(axis=1) for run in runs])
    order = np.argsort(keys, kind="stable")
    fitting = int(np.searchsorted(np.cumsum(sizes[order]), RUN_BYTES, side="right"))
    return min(last, int(keys[order[max(fitting - 1, 0)]]))


def _braid(runs: list[CallRun]) -> CallRun:
    if len(runs) == 1:
        return runs[0]
    keys = np.concatenate([run.keys for run in runs])
    ranks = np.repeat([run.rank for run in runs], [len(run.keys) for run in runs])
    order = np.lexsort((ranks, keys))
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    ends = np.cumsum([len(run.keys) for run in runs])
    first = runs[0]
    return BraidedRun(
        first.rank,
        first.attempt,
        first.epoch,
        first.sequence,
        first.description,
        keys[order],
        np.concatenate([run.counts for run in runs])[order],
        np.concatenate([run.first_rows for run in runs])[order],
        np.concatenate([run.lengths for run in runs])[order],
        sum(run.chunk_bytes for run in runs),
        sum(run.rows for run in runs),
        sum(run.ground_truth_rows for run in runs),
        tuple(zip(runs, np.split(positions, ends[:-1]), strict=True)),
    )


def interleave(out: Array, lengths: Array, positions: Array, strand: Array) -> None:
    """Put the bytes of a strand's calls where they belong among those of all.

    Args:
        out: uint8, the bytes of all calls.
        lengths: How many bytes each call has.
        positions: Which calls are those of the strand.
        strand: uint8, their bytes.
    """
    if not out.size:
        return
    if (lengths == lengths[0]).all():
        out.reshape(len(lengths), -1)[positions] = strand.reshape(len(positions), -1)
        return
    starts = np.cumsum(lengths) - lengths
    begin = 0
    for start, length in zip(starts[positions].tolist(), lengths[positions].tolist(), strict=True):
        out[start : start + length] = strand[begin : begin + length]
        begin += length
