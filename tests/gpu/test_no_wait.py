"""A training loop with a tracer waits for the GPU no more often than without one."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer
from patterns import Emitter, pattern, same_bits
from recording import TAP, check_staged, keep_busy, recording, row_ids, stored, waits_are_errors

BATCH_SIZE, STEPS = 64, 20
# What makes the host wait, as CUPTI names it: functions of the runtime and the driver, and its own records of
# synchronisation, which tell of a wait whoever asked for it. "Stream Wait Event" is a wait of the device.
HOST_WAIT = re.compile(
    r"(Stream|Event|Device|Ctx|Context) ?Sync|(Event|Stream)Query|^cu(da)?Memcpy(?!.*Async)"
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(256, 512), nn.ReLU(inplace=True), nn.Linear(512, 512), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(512, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs))


class Loop:
    """Training steps over batches that lie on the device already, as a prefetching loader leaves them."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = Net().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.inputs = [torch.randn(BATCH_SIZE, 256, device=device) for _ in range(4)]
        self.labels = [torch.randint(10, (BATCH_SIZE,), device=device) for _ in range(4)]
        self.steps = 0

    def run(self, tracer: ClassificationTracer | None, steps: int = STEPS) -> None:
        for _ in range(steps):
            inputs, labels = self.inputs[self.steps % 4], self.labels[self.steps % 4]
            if tracer is None:
                logits = self.model(inputs)
            else:
                logits = tracer(inputs, labels, row_ids(self.steps, BATCH_SIZE), "train", 0)
            loss = nn.functional.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.steps += 1


def test_no_step_of_a_traced_loop_synchronises(device: torch.device) -> None:
    loop = Loop(device)
    with recording(loop.model, device, None) as tracer:
        loop.run(tracer, 3)  # the head is found, memory is taken
        with waits_are_errors(device):
            loop.run(tracer)


@pytest.mark.cuda_only
def test_the_mode_that_this_file_relies_on_notices_a_wait(device: torch.device) -> None:
    with waits_are_errors(device), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=device).item()


@pytest.mark.cuda_only
def test_the_trace_of_cupti_has_no_host_wait_of_ours(device: torch.device, tmp_path: Path) -> None:
    loop = Loop(device)
    loop.run(None, 3)
    untraced = host_calls(loop, None, tmp_path / "untraced.json")
    if not any("Launch" in name for name in untraced):
        pytest.skip("CUPTI tells nothing about calls of CUDA on this machine")
    with recording(loop.model, device, None) as tracer:
        loop.run(tracer, 3)
        traced = host_calls(loop, tracer, tmp_path / "traced.json")
    waits = [
        Counter({name: count for name, count in calls.items() if HOST_WAIT.search(name)})
        for calls in (untraced, traced)
    ]
    assert waits[1] - waits[0] == Counter(), f"untraced: {dict(waits[0])}, traced: {dict(waits[1])}"


def host_calls(loop: Loop, tracer: ClassificationTracer | None, path: Path) -> Counter[str]:
    """How often each function of CUDA was called in a run of the loop, with records of synchronisation."""
    options: dict[str, Any] = {}
    try:
        from torch._C._profiler import _ExperimentalConfig

        options["experimental_config"] = _ExperimentalConfig(enable_cuda_sync_events=True)
    except (ImportError, TypeError):  # another torch
        pass
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, **options) as profile:
        loop.run(tracer)
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    kinds = ("cuda_runtime", "cuda_driver", "cuda_sync")
    return Counter(event["name"] for event in events if event.get("cat") in kinds)


@pytest.mark.cuda_only
def test_the_host_runs_ahead_of_the_gpu_as_without_a_tracer(device: torch.device) -> None:
    """Step after step is enqueued while the first one has not begun."""
    loop = Loop(device)
    with recording(loop.model, device, None) as tracer:
        loop.run(tracer, 3)
        torch.cuda.synchronize()
        keep_busy(device, 1.5)
        is_done = torch.cuda.Event()
        is_done.record()
        loop.run(tracer, 5)
        was_busy = not is_done.query()
    assert was_busy


@pytest.mark.cuda_only
def test_a_full_device_ring_costs_no_wait_of_the_host(device: torch.device) -> None:
    with recording(Emitter(), device, device_ring_bytes=1 << 20) as tracer:
        tracer(pattern((4, 1 << 16), torch.float32, 0, device), None, row_ids(0, 4))
        batches = [pattern((4, 1 << 16), torch.float32, call, device) for call in range(1, 12)]
        torch.cuda.synchronize()
        keep_busy(device, 1.0)
        is_done = torch.cuda.Event()
        is_done.record()
        for call, batch in enumerate(batches, 1):  # 1 MiB each
            tracer(batch, None, row_ids(call, 4))
        was_busy = not is_done.query()
    assert was_busy
    expected = torch.cat([pattern((4, 1 << 16), torch.float32, call) for call in range(12)])
    assert same_bits(stored("out"), expected)


@pytest.mark.cuda_only
def test_a_full_host_ring_never_holds_up_what_the_gpu_was_given(device: torch.device) -> None:
    """The wait for room is one of the host, before anything is enqueued."""
    config = TracerConfig(
        overflow="block",
        ring_bytes=16 << 20,
        commit_interval_s=3600,
        commit_bytes=1 << 30,
        stall_timeout_s=60,
    )
    with ClassificationTracer(Emitter(), "net", "v1", TAP, config=config) as tracer:
        batches = [pattern((4, 1 << 18), torch.float32, call, device) for call in range(12)]  # 4 MiB each
        done = threading.Event()

        def record() -> None:
            for call, batch in enumerate(batches):
                tracer(batch, None, row_ids(call, 4))
            done.set()

        thread = threading.Thread(target=record)
        thread.start()
        began = time.monotonic()
        torch.cuda.synchronize()  # never hangs on us, whether the ring is full or not
        assert time.monotonic() - began < 30
        thread.join(60)
        assert done.is_set()
        check_staged()
    expected = torch.cat([pattern((4, 1 << 18), torch.float32, call) for call in range(12)])
    assert same_bits(stored("out"), expected)
