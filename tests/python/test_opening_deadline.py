"""Making a tracer does file work for its caller, who waits for it no longer than he has said."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import TraceStallError
from ml_debugger.store import layout
from ml_debugger.tracer.bounded import BoundedWork
from ml_debugger.training import ClassificationTracer


def make_tracer(data_dir: Path, stall_timeout_s: float = 0.2) -> ClassificationTracer:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    config = TracerConfig(data_dir=data_dir, ring_bytes=1 << 20, stall_timeout_s=stall_timeout_s)
    return ClassificationTracer(model, "net", "v0", {"features": "1"}, config=config)


@pytest.fixture
def stuck_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory that does not answer: whoever opens its version.json waits for another one."""
    directory = layout.trace_directory(tmp_path, "net", "v0")
    directory.mkdir(parents=True)
    pipe = directory / "version.json"
    os.mkfifo(pipe)
    yield tmp_path
    if pipe.is_fifo():
        let_go(tmp_path)


def let_go(data_dir: Path) -> None:
    pipe = layout.trace_directory(data_dir, "net", "v0") / "version.json"
    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    pipe.unlink()
    deadline = time.monotonic() + 20
    while any(thread.name == "mld-opening" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_disk_that_does_not_answer_ends_in_a_stall_and_the_tracer_can_be_made_later(stuck_dir: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(TraceStallError, match=r"opening the trace 'net' / 'v0' took longer than 0\.2 s"):
        make_tracer(stuck_dir)
    assert time.monotonic() - begin < 20
    let_go(stuck_dir)
    with make_tracer(stuck_dir, 20.0) as tracer:
        tracer(torch.ones(2, 4), None, ["a", "b"])
    assert open_trace("net", "v0", data_dir=stuck_dir).num_rows("extracted_feature") == 2


def test_second_tracer_does_not_wait_longer_for_one_that_is_stuck(stuck_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceStallError):
        make_tracer(stuck_dir)
    with pytest.raises(TraceStallError):
        make_tracer(tmp_path / "elsewhere")


def test_signal_handler_of_the_user_ends_the_wait(stuck_dir: Path) -> None:
    class Enough(Exception):
        pass

    def handler(*_: object) -> None:
        raise Enough

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(Enough):
            make_tracer(stuck_dir, 300.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_work_that_ends_after_it_was_given_up_is_undone() -> None:
    go_on, undone = threading.Event(), threading.Event()
    results: list[int] = []

    def undo(result: int) -> None:
        results.append(result)
        undone.set()

    def work() -> int:
        go_on.wait(20)
        return 7

    with pytest.raises(TraceStallError):
        BoundedWork("waiting", work, undo).run(0.01)
    assert not results
    go_on.set()
    assert undone.wait(20) and results == [7]


def test_work_in_time_returns_raises_and_leaves_no_thread() -> None:
    def fail() -> int:
        raise OSError("no")

    assert BoundedWork("counting", lambda: 3, lambda _: pytest.fail("undone")).run(20.0) == 3
    with pytest.raises(OSError, match="no"):
        BoundedWork("failing", fail, lambda _: pytest.fail("undone")).run(20.0)
    assert not any(thread.name == "mld-opening" for thread in threading.enumerate())
