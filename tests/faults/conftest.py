"""Fixtures of the fault tests: seed, fork server, trials, and the table of what happened."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from fork_server import ForkServer  # noqa: E402
from reliability_table import as_lines, write_table  # noqa: E402
from trials import Score, Scoreboard, Trial, no_process_left  # noqa: E402

SCOREBOARD = Scoreboard()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from the developer's shell."""
    for name in [name for name in os.environ if name.startswith("MLD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """One for all tests: importing torch takes longer than most rounds."""
    running = ForkServer()
    yield running
    running.stop()


@pytest.fixture
def seed() -> int:
    """Of this test's random choices; printed, so that a failed run can be repeated with FAULT_SEED."""
    value = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(1 << 30))
    print(f"FAULT_SEED={value}")
    return value


@pytest.fixture
def score() -> Callable[[str], Score]:
    """The line of a fault in the table at the end."""
    return SCOREBOARD.of


@pytest.fixture
def make_trial(tmp_path: Path, server: ForkServer, seed: int) -> Iterator[Callable[..., Trial]]:
    """Makes stores under trial; no process of theirs outlives the test."""
    with ExitStack() as stack:
        made: list[Trial] = []

        def make(score: Score, **kwargs: Any) -> Trial:
            trial = Trial(server, tmp_path / f"trial-{len(made)}", score, seed=seed, **kwargs)
            made.append(trial)
            return stack.enter_context(no_process_left(trial))

        yield make


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the table, and keep it where FAULT_TABLE says."""
    scores = list(SCOREBOARD.scores.values())
    if not scores:
        return
    terminalreporter.section("faults")
    for line in as_lines(scores):
        terminalreporter.write_line(line)
    if target := os.environ.get("FAULT_TABLE"):
        write_table(Path(target), scores)
