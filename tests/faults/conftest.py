"""Fixtures of the fault tests: seed, fork server, trials, and the table of what happened."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from fork_server import ForkServer  # noqa: E402
from reliability_table import as_lines, write_table  # noqa: E402
from trials import Score, Scoreboard, Trial, no_process_left  # noqa: E402

SCORE = "score"
# Where each test stands, and what it has seen: tests run in several processes (make test-faults), and end in
# any order.
SEEN: list[tuple[tuple[str, int], Score]] = []


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
def score(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Score]]:
    """The line of a fault in the table at the end."""
    board = Scoreboard()
    yield board.of
    for line in board.scores.values():
        request.node.user_properties.append((SCORE, asdict(line)))  # travels with the report of the test


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a test that is over has seen."""
    if report.when == "teardown":
        file, line, _ = report.location
        lines = [Score(**value) for name, value in report.user_properties if name == SCORE]  # type: ignore[arg-type]
        SEEN.extend(((file, line or 0), score) for score in lines)


def scores_seen() -> list[Score]:
    """The lines of the table, in the order of their tests."""
    board = Scoreboard()
    for _, line in sorted(SEEN, key=lambda seen: seen[0]):
        board.of(line.fault).add(line)
    return list(board.scores.values())


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
    scores = scores_seen()
    if not scores:
        return
    terminalreporter.section("faults")
    for line in as_lines(scores):
        terminalreporter.write_line(line)
    if target := os.environ.get("FAULT_TABLE"):
        write_table(Path(target), scores)
