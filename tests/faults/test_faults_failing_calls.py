"""Every system call that writes fails at the N-th time, once and for ever: an error or recovery, no crash."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from injection import WIDE_RING, WIDE_ROWS, WRITE_CALLS, Injection, require_every_call, require_strace
from trials import Score, is_long, rounds

# What each call fails with on a bad disk, a full one, or under a limit.
ERRORS = {
    "pwrite64": ("EIO", "ENOSPC", "EFBIG"),
    "pwritev": ("EIO", "ENOSPC"),
    "lseek": ("EIO",),
    "sync_file_range": ("EIO", "ENOSPC"),
    "write": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "fsync": ("EIO",),
    "openat": ("EIO", "EMFILE", "EACCES"),
    "link": ("EIO", "EPERM"),
    "rename": ("EIO", "ENOSPC"),
    "fallocate": ("EIO", "ENOSPC"),
    "mmap": ("ENOMEM",),
    "mkdir": ("EIO", "ENOSPC", "EROFS"),
    "unlink": ("EIO",),
    "rmdir": ("EIO",),
    "flock": ("EIO", "ENOLCK"),
}
CONFIG = {"stall_timeout_s": 1.0, "close_timeout_s": 1.0, **WIDE_RING}
CASES_A_STORE = 8
# A life waits for each of its timeouts at most once in each step; the rest is patience for a busy machine.
DEADLINE_S = 60.0


def a_short_life(folder: Path) -> list[Any]:
    return [
        ["open"],
        ["stop"],
        ["train", 4, 2],
        ["flush"],
        ["drop", 0],
        ["train", 3, 1],
        ["export", str(folder)],
        ["drop_all"],
        ["train", 2, 1],
        ["close"],
    ]


def count_of(trial: Any, steps: list[Any], pick: Callable[[Any], tuple[int, bool]]) -> dict[str, int]:
    process = trial.start(steps, flush_every=2, **WIDE_ROWS)
    process.wait_until_stopped()
    target, all_threads = pick(process)
    harmless = [f"{call}:error=EIO:when=65535" for call in WRITE_CALLS]
    with Injection(target, harmless, trial.folder / "count.strace", all_threads=all_threads) as injection:
        os.kill(process.pid, signal.SIGCONT)
        assert trial.wait(process) == 0, process.output()
    return injection.counts()


def writer_of(process: Any) -> tuple[int, bool]:
    return process.threads()["mld-writer"], False


def whole(process: Any) -> tuple[int, bool]:
    return process.pid, True


def opening(folder: Path) -> list[Any]:
    """The part that the user's own thread does."""
    return [["stop"], ["open"], ["train", 2, 1], ["close"], ["recreate"], ["train", 1, 1], ["close"]]


# mmap fails in the writer only: elsewhere it is malloc, and the fault is the interpreter's.
PARTS = {"writer": (a_short_life, writer_of, ()), "opening": (opening, whole, ("mmap",))}
# The user's thread makes version.json and takes the lock.
NOT_OF_THE_WRITER = ("link", "flock")


@pytest.mark.parametrize("part", sorted(PARTS))
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_system_call_that_fails_costs_an_error_or_nothing(
    part: str,
    on_error: str,
    make_trial: Callable[..., Any],
    score: Callable[[str], Score],
    seed: int,
    tmp_path: Path,
) -> None:
    require_strace()
    life, pick, left_out = PARTS[part]
    tally = score(f"each system call fails once or for ever ({part}, on_error={on_error})")
    steps = life(tmp_path)
    config = {**CONFIG, "on_error": on_error}
    counts = count_of(make_trial(tally, config=config), steps, pick)
    require_every_call(counts, NOT_OF_THE_WRITER if part == "writer" else ())
    cases = [
        (call, f"error={error}", f"when={number}{ever}")
        for call, count in counts.items()
        if call not in left_out
        for number in range(1, count + 1)
        for error in ERRORS[call]
        for ever in ("", "+")
    ]
    assert len(cases) > 100, counts
    random.Random(seed).shuffle(cases)
    cases = cases[: rounds(4, 0.25)]
    findings: list[str] = []
    for first in range(0, len(cases), CASES_A_STORE):
        trial = make_trial(tally, config=config)
        try:
            for case in cases[first : first + CASES_A_STORE]:
                run_case(trial, tally, steps, pick, ":".join(case))
            trial.verify()
            trial.remove()
        except AssertionError as finding:  # the others are tried all the same
            findings.append(str(finding))
    assert not findings, f"seed {seed}: {len(findings)} findings\n\n" + "\n\n".join(findings)
    assert tally.fired > (0.7 * tally.rounds if is_long() else 0)


def run_case(trial: Any, tally: Score, steps: list[Any], pick: Callable[..., Any], case: str) -> None:
    """One life with one fault: it ends by itself, with errors of the package at most."""
    tally.rounds += 1
    process = trial.start(steps, flush_every=2, tolerant=True, **WIDE_ROWS)
    process.wait_until_stopped()
    target, all_threads = pick(process)
    with Injection(target, [case], trial.folder / f"{case}.strace", all_threads=all_threads) as injection:
        os.kill(process.pid, signal.SIGCONT)
        try:
            status = trial.wait(process, DEADLINE_S)
        except AssertionError as hang:
            raise AssertionError(f"{case}: {hang}") from None
    tally.fired += injection.fired() > 0
    if status != 0:
        tally.corrupt += 1
        raise AssertionError(f"{case}: the recorder ended with {status}\n{process.output()}")
    try:
        trial.judge()
    except AssertionError as finding:
        raise AssertionError(f"{case}: {finding}") from None


FLUSH = """
import os, signal, time
import torch
from torch import nn
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

class SlowHead(nn.Module):
    def forward(self, x):
        time.sleep(0.05)  # meanwhile the writer begins to commit what the layer before gave
        return x[:, :4]

config = TracerConfig(data_dir=ARGS[0], on_error="warn", commit_interval_s=0.01)
model = nn.Sequential(nn.Identity(), SlowHead())
tracer = ClassificationTracer(model, "net", "v0", {"wide": "0"}, config=config)
os.kill(os.getpid(), signal.SIGSTOP)
tracer(torch.zeros(5, 30_000), torch.zeros(5, dtype=torch.long), range(5), "train", 0)
tracer.flush()
stats = tracer.stats()
print("after the flush:", stats.rows_failed, "failed,", stats.rows_in_flight, "in flight")
tracer.close()
"""


def test_a_flush_that_meets_a_failure_returns_when_the_loss_is_counted(
    make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    """Of a call that had handed over a layer, and not yet its rows, when the writer began to fail."""
    require_strace()
    tally = score("storage fails in the middle of a call: what flush() lost is counted when it returns")
    tally.rounds += 1
    trial = make_trial(tally)
    log = tmp_path / "log"
    job = {"kind": "script", "source": FLUSH, "args": [str(trial.data_dir)], "log": str(log)}
    process = trial.server.start(job)
    trial.processes.append(process)
    process.wait_until_stopped()
    slow_failure = "openat:error=EIO:delay_exit=100000:when=1+"
    target, all_threads = writer_of(process)
    with Injection(target, [slow_failure], tmp_path / "strace", all_threads=all_threads) as injection:
        os.kill(process.pid, signal.SIGCONT)
        assert trial.wait(process) == 0, process.output()
    tally.fired += injection.fired() > 0
    assert "after the flush: 5 failed, 0 in flight" in process.output()
    assert tally.fired == 1
