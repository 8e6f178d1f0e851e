"""kill -9 at any moment: what was acknowledged is there, nothing else, and the next run goes on."""

from __future__ import annotations

import os
import random
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from injection import WIDE_RING, WIDE_ROWS, WRITE_CALLS, Injection, require_every_call, require_strace
from trials import Score, is_long, rounds

ROUNDS_A_STORE = 10
PARTS = 10 if is_long() else 1  # so that several processes can share the rounds
FOREVER = [["open"], ["train", None, 3]]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("durability", ["power", "process"])
def test_kill_9_at_any_moment_loses_nothing_acknowledged(
    durability: str, part: int, make_trial: Callable[..., Any], score: Callable[[str], Score], seed: int
) -> None:
    tally = score(f"kill -9 at random, durability {durability}")
    choice = random.Random(seed + part)  # FAULT_SEED is one for all parts
    total = rounds(4, 0.5 / PARTS)
    for first in range(0, total, ROUNDS_A_STORE):
        trial = make_trial(tally, config={"durability": durability})
        for _ in range(min(ROUNDS_A_STORE, total - first)):
            tally.rounds += 1
            pause_s = choice.choice([0, 0.001, 0.005])
            process = trial.start(FOREVER, flush_every=choice.choice([1, 3, 7]), pause_s=pause_s)
            time.sleep(choice.random() ** 2 * 1.5)
            process.kill()
            assert trial.wait(process) == -signal.SIGKILL, f"it ended by itself\n{process.output()}"
            tally.fired += 1
            trial.judge()
        assert trial.verify() > 0
        trial.remove()


def a_life(folder: Path) -> list[Any]:
    """Everything that writes: opening, training, dropping, exporting, starting anew, closing."""
    return [
        ["stop"],
        ["open"],
        ["train", 4, 2],
        ["drop", 0],
        ["train", 3, 1],
        ["export", str(folder)],
        ["close"],
        ["recreate"],
        ["train", 3, 1],
        ["drop_all"],
        ["train", 2, 1],
        ["close"],
    ]


def count_calls(trial: Any, steps: list[Any]) -> dict[str, int]:
    """How often each system call is made in an undisturbed life."""
    process = trial.start(steps, flush_every=2, **WIDE_ROWS)
    process.wait_until_stopped()
    harmless = [f"{call}:error=EIO:when=65535" for call in WRITE_CALLS]
    with Injection(process.pid, harmless, trial.folder / "count.strace", all_threads=True) as injection:
        os.kill(process.pid, signal.SIGCONT)
        assert trial.wait(process) == 0, process.output()
    return injection.counts()


def no_half_export(folder: Path) -> None:
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path


def test_kill_9_at_every_write_call_of_a_life(
    make_trial: Callable[..., Any], score: Callable[[str], Score], seed: int, tmp_path: Path
) -> None:
    require_strace()
    tally = score("kill -9 at each system call that writes, of a life with drops, export, recreate")
    exports = tmp_path / "exports"
    exports.mkdir()
    steps = a_life(exports)
    counts = count_calls(make_trial(tally, config=WIDE_RING), steps)
    require_every_call(counts)
    assert counts["pwrite64"] > 20 and counts["fdatasync"] > 10, counts
    cases = [(call, number) for call, count in counts.items() for number in range(1, count + 1)]
    random.Random(seed).shuffle(cases)
    cases = cases[: rounds(8)]
    for first in range(0, len(cases), ROUNDS_A_STORE):
        trial = make_trial(tally, config=WIDE_RING)
        for call, number in cases[first : first + ROUNDS_A_STORE]:
            tally.rounds += 1
            process = trial.start(steps, flush_every=2, **WIDE_ROWS)
            process.wait_until_stopped()
            log = trial.folder / f"{call}-{number}.strace"
            with Injection(process.pid, [f"{call}:signal=KILL:when={number}"], log, all_threads=True):
                os.kill(process.pid, signal.SIGCONT)
                status = trial.wait(process)
            assert status in (0, -signal.SIGKILL), f"{call} {number}: {status}\n{process.output()}"
            tally.fired += status != 0
            trial.judge()
            no_half_export(exports)
        trial.verify()
        trial.remove()
    assert tally.fired > (0.7 * tally.rounds if is_long() else 0)
