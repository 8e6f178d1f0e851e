"""Which calls of one attempt are lost: what is known of them, from row numbers and counters.

An attempt numbers the rows that it stores without holes, in the order of its calls. So a hole between two
calls that are there says how many rows are missing, and between which calls. Dropping an epoch makes holes
too; so they count only where a segment is known to be damaged.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ml_debugger.trace.header import Call

_ROW_BITS = 36


@dataclass(frozen=True)
class LostCalls:
    """Calls that could not be saved.

    Attributes:
        rank: Who recorded them.
        attempt: In which attempt.
        epoch: Their epoch, -1: none; None: not known.
        first_call: Number of the first call that is missing; None: not known.
        last_call: Number of the last one; between the two there may be calls that are there.
        calls: How many, None: not known.
        rows: Their rows, None: not known.
        path: Where they were.
        problem: Why they are lost.
    """

    rank: int
    attempt: int
    epoch: int | None
    first_call: int | None
    last_call: int | None
    calls: int | None
    rows: int | None
    path: str
    problem: str


@dataclass
class Damage:
    """A segment whose headers are not all there; ``calls`` and ``rows`` that it lacks, if it says so."""

    epoch: int
    path: str
    problem: str
    calls: int | None = None
    rows: int | None = None


@dataclass
class _Hole:
    """Row numbers that no call has; ``epochs`` are those of the calls around it."""

    first_call: int
    last_call: int
    rows: int
    epochs: set[int]


@dataclass
class AttemptLosses:
    """Collects what is known of one attempt of one rank, in all its partitions."""

    rank: int
    attempt: int
    damages: list[Damage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._calls = array("q")  # first row, rows, call, epoch of each that is known
        self._gap_calls: set[int] = set()
        self._broken: list[LostCalls] = []
        self._unread: list[tuple[int, int, str]] = []

    def add_call(self, call: Call) -> None:
        """Take in a call that was saved."""
        self._calls.extend((call.first_row, call.rows, call.call, call.epoch))

    def add_gap(self, call: int) -> None:
        """Take in a gap that was recorded: its number is taken."""
        self._gap_calls.add(call)

    def add_broken(self, call: Call, path: str, problem: str) -> None:
        """Take in a call whose header is sound and whose bytes are not all there."""
        self.add_call(call)
        self._broken.append(
            LostCalls(self.rank, self.attempt, call.epoch, call.call, call.call, 1, call.rows, path, problem)
        )

    def add_unread(self, epoch: int, call: int, path: str) -> None:
        """Take in a call whose header is there and damaged."""
        self._unread.append((epoch, call, path))

    @property
    def first_free_call(self) -> int:
        """A number above that of every call and gap."""
        numbers = [*self._calls[2::4], *self._gap_calls, *(call for _, call, _ in self._unread)]
        return max(numbers, default=-1) + 1

    def resolve(self) -> list[LostCalls]:
        """All lost calls, as far as they can be told."""
        found = _merged(self._broken)
        others = len(found)
        if not self.damages:
            return found
        self._taken = {*self._calls[2::4], *self._gap_calls}
        left = {damage.epoch: self._budget(damage.epoch) for damage in self.damages}
        for hole in self._holes():
            epoch = self._epoch_of(hole, left)
            if epoch is None and not (hole.epochs & left.keys() or any(v is None for v in left.values())):
                continue  # an epoch that was dropped
            found.append(self._lost(hole, epoch))
            budget = left.get(epoch) if epoch is not None else None
            if epoch is not None and budget is not None:
                left[epoch] = max(budget - hole.rows, 0)
        found += self._remainders(left, {entry.epoch for entry in found[others:]})
        return found

    def _budget(self, epoch: int) -> int | None:
        """Rows without a header that the segments of an epoch count; None if one does not know."""
        rows = [damage.rows for damage in self.damages if damage.epoch == epoch]
        return None if None in rows else sum(count or 0 for count in rows)

    def _holes(self) -> Iterator[_Hole]:
        calls = np.array(self._calls, np.int64).reshape(-1, 4)
        calls = calls[np.argsort(calls[:, 0], kind="stable")]
        next_row = self.rank << 49 | self.attempt << _ROW_BITS
        last_call, last_epoch = -1, None
        for first_row, rows, call, epoch in calls.tolist():
            if first_row > next_row:
                epochs = {epoch} if last_epoch is None else {last_epoch, epoch}
                yield _Hole(last_call + 1, call - 1, first_row - next_row, epochs)
            next_row = max(next_row, first_row + rows)
            last_call, last_epoch = call, epoch

    def _epoch_of(self, hole: _Hole, left: dict[int, int | None]) -> int | None:
        """The epoch of the rows in a hole, if there is one answer."""
        possible = [epoch for epoch, rows in left.items() if rows is None or rows >= hole.rows]
        unread = {
            epoch for epoch, call, _ in self._unread if hole.first_call <= call <= hole.last_call
        } & set(possible)
        near = [epoch for epoch in possible if epoch in hole.epochs]
        for answer in (sorted(unread), near, possible):
            if len(answer) == 1:
                return answer[0]
        return None

    def _lost(self, hole: _Hole, epoch: int | None) -> LostCalls:
        damage = next((damage for damage in self.damages if damage.epoch == epoch), self.damages[0])
        first, last = self._free_range(hole)
        # One call for each number, unless calls were aborted or discarded in between.
        calls = 1 if first is not None and first == last else None
        return LostCalls(
            self.rank, self.attempt, epoch, first, last, calls, hole.rows, damage.path, damage.problem
        )

    def _free_range(self, hole: _Hole) -> tuple[int | None, int | None]:
        """First and last number in a hole that is free; of calls of several threads there may be none."""
        first, last = hole.first_call, hole.last_call
        while first <= last and first in self._taken:
            first += 1
        while last >= first and last in self._taken:
            last -= 1
        return (first, last) if first <= last else (None, None)

    def _remainders(self, left: dict[int, int | None], named: set[int | None]) -> Iterator[LostCalls]:
        """What was lost behind the last call that is there."""
        for epoch, rows in left.items():
            damages = [damage for damage in self.damages if damage.epoch == epoch]
            if rows == 0 or (rows is None and (epoch in named or None in named)):
                continue
            unread = [call for of, call, _ in self._unread if of == epoch]
            calls = damages[0].calls if len(damages) == 1 and epoch not in named else None
            if rows is None and unread:
                calls = len(unread)
            yield LostCalls(
                self.rank,
                self.attempt,
                epoch,
                min(unread, default=None) if epoch not in named else None,
                max(unread, default=None) if epoch not in named else None,
                calls,
                rows,
                damages[0].path,
                damages[0].problem,
            )


def _merged(lost: list[LostCalls]) -> list[LostCalls]:
    """Calls with one known number each; those that follow one another in an epoch become one entry."""
    found: list[LostCalls] = []
    for entry in sorted(lost, key=lambda entry: (entry.epoch or 0, entry.first_call or 0)):
        before = found[-1] if found else None
        if (
            before is not None
            and before.epoch == entry.epoch
            and before.last_call is not None
            and before.last_call + 1 == entry.first_call
        ):
            found[-1] = dataclasses.replace(
                before,
                last_call=entry.last_call,
                calls=(before.calls or 0) + 1,
                rows=(before.rows or 0) + (entry.rows or 0),
            )
        else:
            found.append(entry)
    return found
