"""kill -9 at any moment, in both durabilities: what was acknowledged is there, nothing else, and the next run goes on."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from trials import Score, rounds

ROUNDS_A_STORE = 10
FOREVER = [["open"], ["train", None, 3]]


@pytest.mark.parametrize("durability", ["power", "process"])
def test_kill_9_at_any_moment_loses_nothing_acknowledged(
    durability: str, make_trial: Callable[..., Any], score: Callable[[str], Score], seed: int
) -> None:
    tally = score(f"kill -9 at random, durability {durability}")
    choice = random.Random(seed)
    total = rounds(7)
    for first in range(0, total, ROUNDS_A_STORE):
        trial = make_trial(tally, config={"durability": durability})
        for _ in range(min(ROUNDS_A_STORE, total - first)):
            tally.rounds += 1
            process = trial.start(FOREVER, flush_every=choice.choice([1, 3, 7]))
            time.sleep(choice.random() ** 2 * 2.0)
            process.kill()
            assert trial.wait(process) == -signal.SIGKILL, f"it ended by itself\n{process.output()}"
            tally.fired += 1
            trial.judge()
        assert trial.verify() > 0
