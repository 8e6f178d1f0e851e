"""Faults between user code and tracer: swallowed errors, signals while closing, inputs changed in place."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import DiskBudgetError, RingOverflowError
from ml_debugger.training import ClassificationTracer


class Forgiving(nn.Module):
    """Falls back when its big layer raises, as code that catches out-of-memory errors does."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, big: torch.Tensor) -> Any:
        try:
            self.big(big)
        except RuntimeError:
            self.big(big[:, :1])
        return self.head(x)


def test_a_capture_error_that_the_forward_swallows_stores_nothing(data_dir: Path) -> None:
    config = TracerConfig(overflow="raise", ring_bytes=1 << 20)
    with ClassificationTracer(Forgiving(), "net", "v1", {"big": "big", "x": "head"}, config=config) as tracer:
        tracer((torch.ones(2, 4), torch.ones(2, 8)), None, ["a", "b"])
        with pytest.raises(RingOverflowError):
            tracer((torch.ones(2, 4), torch.ones(2, 1 << 20)), None, ["c", "d"])
        tracer((torch.ones(2, 4), torch.ones(2, 8)), None, ["e", "f"])
        tracer.flush()
        assert tracer.stats().rows_submitted == 4
    assert open_trace("net", "v1").arrays("extracted_feature")["input_id"].tolist() == ["a", "b", "e", "f"]


class Overwriting(nn.Module):
    """Changes its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        output = self.head(x.clone())
        x.zero_()
        y[y == 255] = 0
        return output


def test_labels_and_fields_are_stored_as_they_were_given(data_dir: Path) -> None:
    fields = [{"name": "image", "type": "tensor"}]
    x, y = torch.ones(2, 4), torch.tensor([1, 255])
    with ClassificationTracer(
        Overwriting(), "net", "v1", {"out": "head"}, additional_fields=fields
    ) as tracer:
        tracer((x, y), y, ["a", "b"], image=x)
    trace = open_trace("net", "v1")
    assert trace.tensors("ground_truth")["label"].tolist() == [1, 255]  # type: ignore[union-attr]
    assert torch.equal(trace.tensors("extracted_feature")["image"], torch.ones(2, 4))  # type: ignore[arg-type]


def test_keep_epochs_makes_room_before_the_budget_is_judged(data_dir: Path) -> None:
    config = TracerConfig(keep_epochs=1, max_bytes=3 << 20, commit_interval_s=0.05)
    model = nn.Sequential(nn.Identity(), nn.Linear(1 << 18, 2))
    with ClassificationTracer(model, "net", "v1", {"x": "0"}, config=config) as tracer:
        for epoch in range(3):
            tracer(torch.ones(2, 1 << 18), None, ["a", "b"], n_epoch=epoch)
            tracer.flush()
        with pytest.raises(DiskBudgetError):
            tracer(torch.ones(2, 1 << 18), None, ["c", "d"], n_epoch=2)
        with pytest.raises(DiskBudgetError):
            tracer(torch.ones(2, 1 << 18), None, ["c", "d"], n_epoch=2)
    trace = open_trace("net", "v1")
    assert trace.epochs == [2]
    assert trace.num_rows("extracted_feature") == 2


CLOSING = """
import os, signal, threading, time, torch
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

tracer = ClassificationTracer(
    torch.nn.Sequential(torch.nn.Linear(4, 3)), "net", "v1", {"head": "0"},
    config=TracerConfig(commit_interval_s=3600, ring_bytes=1 << 23),
)
for call in range(50):
    tracer(torch.ones(4, 4), None, [f"{call}-{row}" for row in range(4)])
"""
# The handler runs while close() waits: what it raises or closes must cost no row.
HANDLERS = {
    "closes": "signal.signal(signal.SIGUSR1, lambda *_: tracer.close())\n",
    "raises": "def stop(*_):\n    raise KeyboardInterrupt\nsignal.signal(signal.SIGUSR1, stop)\n",
}
STRIKE = """
wait_slice = tracer._session._finish
def finish():
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_slice()
tracer._session._finish = finish
try:
    tracer.close()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    tracer._session._finish = wait_slice
    tracer.close()  # goes on where the signal broke in
assert tracer.stats().rows_committed == 200
"""


@pytest.mark.parametrize("handler", sorted(HANDLERS))
def test_a_signal_while_closing_neither_hangs_nor_loses_rows(data_dir: Path, handler: str) -> None:
    script = CLOSING + HANDLERS[handler] + STRIKE
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("interrupted" in done.stdout) == (handler == "raises")
    assert open_trace("net", "v1").num_rows("extracted_feature") == 200


def test_a_tracer_that_the_collector_finds_in_the_registry_does_not_deadlock(data_dir: Path) -> None:
    from ml_debugger.tracer import lifecycle

    class Session:
        def close_quietly(self) -> None:
            lifecycle.unregister(self)  # what the collector sets off, on the thread that holds the lock

    session = Session()
    lifecycle.register(session)
    finished = threading.Event()

    def nest() -> None:
        with lifecycle._registry._lock:
            session.close_quietly()
        finished.set()

    threading.Thread(target=nest, daemon=True).start()
    assert finished.wait(10)
