"""The ranks of a trace as members of jobs: who records here now, whose rows are missing, what is on its way.

Reads small files and asks for locks; opens no segment. All waits have a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_debugger.errors import MlDebuggerError, TraceInUseError
from ml_debugger.job import Job
from ml_debugger.store import layout
from ml_debugger.store.status import is_writing, read_status

_REQUEST_FILE = "flush.request"
_TAKEN_FILE = "flush.taken"
_POLL_S = 0.02
_OWNER_TRIES = 5
_NAMED = 8


@dataclass(frozen=True)
class Unsettled:
    """A rank that had handed over rows which are not committed.

    Attributes:
        rank: Which.
        pid: Its process, where its status file tells.
        rows: How many rows are known of; 0 when the rank did not answer and its status file tells of none.
        is_dead: Whether its process has ended; otherwise it is late.
    """

    rank: int
    pid: int | None
    rows: int
    is_dead: bool

    def __str__(self) -> str:
        if self.is_dead:
            return f"rank {self.rank} has ended, and {self.rows} rows with it that were not committed"
        if self.rows:
            return f"rank {self.rank} (process {self.pid}) did not commit {self.rows} rows in time"
        return f"rank {self.rank} (process {self.pid}) did not answer in time"


def owner_text(job: Job) -> str:
    """What a rank's lock file tells of who holds it."""
    return json.dumps({"job": job.job_id, "pid": os.getpid()})


def refuse_other_jobs(trace_dir: Path, own_rank: int, job: Job) -> None:
    """Ranks of one job meet in a trace; two jobs at once would mix what they record.

    Raises:
        TraceInUseError: A rank of another job records here.
    """
    for rank, rank_dir in layout.rank_directories(trace_dir):
        if rank != own_rank and (owner := _owner_of_another_job(rank_dir, job)) is not None:
            raise TraceInUseError(
                f"another job is recording this trace: its rank {rank} (process {owner.get('pid')}) belongs "
                f"to {_described(owner['job'])}, this process to {_described(job.job_id)}",
                "end that job, or record under another version_name",
            )


def _owner_of_another_job(rank_dir: Path, job: Job) -> dict[str, Any] | None:
    for _ in range(_OWNER_TRIES):
        owner = _owner(rank_dir)
        if owner is None or owner["job"] == job.job_id or not is_writing(rank_dir):
            return None
        # Who has just taken the lock writes its name an instant later.
        time.sleep(_POLL_S)
    return owner


def _owner(rank_dir: Path) -> dict[str, Any] | None:
    """Who held the lock of a rank last; None where the file does not tell."""
    try:
        owner = json.loads((rank_dir / layout.LOCK_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and "job" in owner else None


def _described(job_id: str | None) -> str:
    return "no job" if job_id is None else f"the job {job_id!r}"


def missing_ranks(trace_dir: Path) -> list[int]:
    """Ranks of the newest job of a trace that left nothing here; none where its size is not known.

    Where a job has no id, what other jobs left cannot be told from what it left.
    """
    entries = {
        rank: layout.attempt_entries(rank_dir) for rank, rank_dir in layout.rank_directories(trace_dir)
    }
    newest = max(
        (entry for found in entries.values() for entry in found[-1:]),
        key=lambda entry: float(entry.get("started_unix_s", 0)),
        default={},
    )
    job_id = newest.get("job")
    present = [
        rank
        for rank, found in entries.items()
        if job_id is None or any(entry.get("job") == job_id for entry in found)
    ]
    return absent_ranks(newest.get("world_size"), present)


def absent_ranks(world_size: object, present: Iterable[int]) -> list[int]:
    """Numbers below the size of a job that are not among ``present``; none if the size is not known."""
    if type(world_size) is not int or not 0 < world_size <= layout.MAX_RANKS:
        return []
    return sorted(set(range(world_size)) - set(present))


def named(ranks: list[int]) -> str:
    """Ranks in a sentence: ``rank 3``, ``ranks 1, 2``, or with a count where there are many."""
    shown = ", ".join(map(str, ranks[:_NAMED]))
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def settle_other_ranks(trace_dir: Path, own_rank: int, job: Job, timeout_s: float) -> list[Unsettled]:
    """Wait until the rows that the other ranks of a trace have handed over are committed.

    Not collective: a rank that records answers from its writer thread, whatever its training does. Each is
    asked for a fresh status and for a commit by a file in its directory.

    Args:
        trace_dir: Directory of the (model, version).
        own_rank: Who asks; it has flushed by itself.
        job: Its job: of a rank that has ended, only what this job left is looked at.
        timeout_s: Longest wait for all of them together.

    Returns:
        Those of which rows are missing, by rank.
    """
    deadline = time.monotonic() + timeout_s
    waiting = [
        _OtherRank(rank, rank_dir, job)
        for rank, rank_dir in layout.rank_directories(trace_dir)
        if rank != own_rank
    ]
    unsettled = []
    try:
        while True:
            waiting = [other for other in waiting if not other.is_settled()]
            # Who has ended will not commit any more.
            unsettled += [other.unsettled() for other in waiting if other.is_dead]
            waiting = [other for other in waiting if not other.is_dead]
            if not waiting or time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
    finally:
        for other in waiting:
            other.withdraw()
    return sorted([*unsettled, *(other.unsettled() for other in waiting)], key=lambda found: found.rank)


class _OtherRank:
    """One rank that is waited for."""

    def __init__(self, rank: int, rank_dir: Path, job: Job) -> None:
        self._rank = rank
        self._directory = rank_dir
        self._request = rank_dir / _REQUEST_FILE
        self._taken = rank_dir / _TAKEN_FILE
        self._job = job
        self._target: dict[int, int] | None = None  # rows that must be settled, by attempt; None: not known
        self._pid: int | None = None
        self._left = 0
        self._is_asked = False
        self.is_dead = not is_writing(rank_dir)
        if not self.is_dead:
            self._ask()

    def _ask(self) -> None:
        """Again with each look while the disk takes no file: without a request no status is an answer."""
        with contextlib.suppress(OSError):
            self._request.touch(mode=0o600)
            self._is_asked = True

    def is_settled(self) -> bool:
        """Look once."""
        if not self.is_dead and not is_writing(self._directory):
            self.is_dead = True
            self.withdraw()
        if self.is_dead:
            status = read_status(self._directory)
            self._left = _in_flight(status) if self._is_of_job() else 0
            return self._left == 0
        if not self._is_asked:
            self._ask()
            return False
        if self._target is None and (self._request.exists() or self._taken.exists()):
            return False
        status = read_status(self._directory)
        if status is None:
            return False
        self._pid = status.get("pid")
        counters = {int(one["attempt"]): one for one in status["attempts"]}
        if self._target is None:  # the request was answered: this status is newer than it
            self._target = {attempt: int(one["rows_submitted"]) for attempt, one in counters.items()}
        left = [
            max(0, submitted - _settled_rows(counters[attempt]))
            for attempt, submitted in self._target.items()
            if attempt in counters  # otherwise it was closed, and closing settles
        ]
        self._left = sum(left)
        return not self._left

    def unsettled(self) -> Unsettled:
        if not self.is_dead and self._target is None:
            status = read_status(self._directory) or {}
            # Its first status may be yet to come; its lock file tells at once whose it is.
            self._pid = status.get("pid") or (_owner(self._directory) or {}).get("pid")
            self._left = _in_flight(status)
        return Unsettled(self._rank, self._pid, self._left, self.is_dead)

    def withdraw(self) -> None:
        with contextlib.suppress(OSError):
            self._request.unlink()

    def _is_of_job(self) -> bool:
        try:
            entries = layout.attempt_entries(self._directory)
        except MlDebuggerError:
            return True
        return bool(entries) and entries[-1].get("job") == self._job.job_id


def _settled_rows(counters: dict[str, Any]) -> int:
    return sum(int(counters[f"rows_{name}"]) for name in ("committed", "discarded", "failed"))


def _in_flight(status: dict[str, Any] | None) -> int:
    return sum(int(one["rows_in_flight"]) for one in (status or {}).get("attempts", []))
