"""Allocations of the core that fail, on threads of the user and of the writer; threads that do not start."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fork_server import ForkServer
from trials import Score, is_long, rounds

HERE = Path(__file__).resolve().parent
CONFIG = {"stall_timeout_s": 0.5, "close_timeout_s": 2.0}
CASES_A_STORE = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """One whose allocator can be made to fail."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, for an allocator that fails")
    library = tmp_path_factory.mktemp("allocator") / "failing_allocator.so"
    source = HERE / "failing_allocator.cpp"
    command = [compiler, "-shared", "-fPIC", "-O1", "-std=c++17", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    running = ForkServer({"LD_PRELOAD": str(library)})
    yield running
    running.stop()


def life(place: str, whom: str, number: int, ever: bool) -> list[Any]:
    """The shortage begins before the tracers are made, or while they record, and ends before they close."""
    starve = ["starve", whom, number, ever]
    before = [starve, ["open"]] if place == "opening" else [["open"], ["train", 2, 1], ["flush"], starve]
    return [*before, ["train", 4, 2], ["flush", 5.0], ["drop", 1], ["train", 2, 1], ["feed"], ["close"]]


def figures(log: str) -> tuple[int, int]:
    """How many allocations there were, and how many failed."""
    found = re.search(r"allocations (\d+) failed (\d+)", log)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@pytest.mark.parametrize("place", ["opening", "recording"])
@pytest.mark.parametrize("whom", ["writer", "user"])
def test_an_allocation_that_fails_is_an_error_or_nothing(
    whom: str, place: str, make_trial: Callable[..., Any], score: Callable[[str], Score], seed: int
) -> None:
    thread = "the writer's thread" if whom == "writer" else "threads of the user"
    tally = score(f"allocation N fails once or for ever, on {thread}, from {place} on")
    choice = random.Random(seed)
    trial = make_trial(tally, config=CONFIG)
    process = trial.start(life(place, whom, 0, False), flush_every=2)
    assert trial.wait(process) == 0, process.output()
    count, failed = figures(process.output())
    assert count > 30 and failed == 0, process.output()
    cases = [(choice.randrange(1, count + 1), choice.random() < 0.4) for _ in range(rounds(3, 0.1))]
    for first in range(0, len(cases), CASES_A_STORE):
        trial = make_trial(tally, config=CONFIG)
        for number, ever in cases[first : first + CASES_A_STORE]:
            tally.rounds += 1
            process = trial.start(life(place, whom, number, ever), flush_every=2, tolerant=True)
            status = trial.wait(process)
            what = f"allocation {number} of {whom}, {'for ever' if ever else 'once'}"
            log = process.output()
            assert status == 0, f"{what}: the recorder ended with {status}\n{log}"
            # A tracer that could not be made ends the life before it can tell.
            tally.fired += figures(log)[1] > 0 or "MemoryError" in log or "out of memory" in log
            assert "Traceback" not in log, f"{what}: {log}"
            trial.judge()
        trial.verify()
        trial.remove()
    assert tally.fired > (0.7 * tally.rounds if is_long() else 0)


def test_a_writer_that_rests_without_memory_goes_on_when_there_is_some(
    make_trial: Callable[..., Any], score: Callable[[str], Score]
) -> None:
    """What it does once a second, beside commits, needs memory too."""
    tally = score("no allocation of a resting writer's thread succeeds for 2.5 s: it goes on later")
    tally.rounds += 1
    trial = make_trial(tally, config={**CONFIG, "stall_timeout_s": 30.0})
    shortage = [["starve", "writer", 1, True], ["sleep", 2.5], ["feed"]]
    process = trial.start(
        [["open"], ["train", 2, 1], ["flush"], *shortage, ["train", 2, 1], ["flush"], ["close"]]
    )
    assert trial.wait(process) == 0, process.output()
    tally.fired += figures(process.output())[1] > 0
    assert trial.verify() > 0
    assert tally.fired == 1


THREADS = """
import ctypes, sys
from ml_debugger import TracerConfig
from ml_debugger.errors import StorageError
from ml_debugger.training import ClassificationTracer
from recorder import Scene, make_call

library = ctypes.CDLL(None)
config = TracerConfig(data_dir=ARGS[0], ring_bytes=1 << 20)
x, labels, ids = make_call(0, 0, 0, 16)
outcomes = []
for number, ever in ((1, 1), (1, 0), (2, 0), (0, 0)):
    library.starve_threads(ctypes.c_long(number), ever)
    try:
        with ClassificationTracer(Scene(), "net", "threads", {"features": "tap"}, config=config) as tracer:
            tracer(x, labels, ids, "train", 0)
        outcomes.append("recorded")
    except StorageError as error:
        outcomes.append("refused" if "writer thread" in str(error) else str(error))
    library.feed()
    outcomes.append(str(library.failed()))
print(*outcomes, sep=",", flush=True)
"""


def test_a_thread_that_cannot_be_started_is_an_error_or_not_needed(
    make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    """The first thread opens files with a deadline: without it, without one. The second one is the writer."""
    tally = score("threads cannot be started: StorageError, and the next tracer works")
    tally.rounds += 1
    trial = make_trial(tally, config=CONFIG)
    job = {"kind": "script", "source": THREADS, "args": [str(trial.data_dir)], "log": str(tmp_path / "log")}
    process = trial.server.start(job)
    assert trial.wait(process) == 0, process.output()
    outcomes = process.output().strip().split(",")
    tally.fired += outcomes[1] == "2"
    assert outcomes == ["refused", "2", "recorded", "1", "refused", "1", "recorded", "0"]
    assert trial.wait(trial.start([["open"], ["train", 2, 1], ["close"]])) == 0
    trial.verify()
