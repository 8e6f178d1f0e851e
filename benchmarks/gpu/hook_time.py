"""Question: how long does the host spend in the hook of one layer, for a small tensor on the GPU?

Method: 64 watched layers that return the same small tensor, called with our hooks, with an empty Python
hook on each, and with none, call after call in random order; the device is drained before each call,
outside of the timed part. The time of a call (host only, nothing is waited for) less that of the call
without hooks, over 64, is the time of a hook; for the tracer that counts in a 64th of what a call costs
besides. Every row is read back.

Excluded: work of the device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.models import synchronize
from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import describe_samples, estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "gpu_hook_time"
QUESTION = "How long does the host spend in the hook of one layer, for a small tensor on the GPU?"
LAYERS = 64
SHAPE = (32, 64)


class Layers(nn.Module):
    """Sends one tensor through `LAYERS` layers that change nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
        self.logits = torch.zeros(SHAPE[0], 2, device=device)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for tap in self.taps:
            tap(values)
        return self.logits


def do_nothing(module: nn.Module, given: Any, returned: Any) -> None:
    """The empty Python hook."""


def measure(setting: Setting) -> Findings:
    device, calls = setting.device, 20 if setting.is_quick else 1500
    plain, hooked, traced = Layers(device), Layers(device), Layers(device)
    for tap in hooked.taps:
        tap.register_forward_hook(do_nothing)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(setting.seed)).to(device)
    ids = [str(row) for row in range(SHAPE[0])]
    layers = {f"layer{number}": f"taps.{number}" for number in range(LAYERS)}
    config = TracerConfig(data_dir=setting.memory_dir, durability="process")
    seconds: dict[str, list[float]] = {"none": [], "empty": [], "tracer": []}
    recorded = 0
    with ClassificationTracer(traced, "benchmark", "hooks", layers, config=config) as tracer:

        def record(tensor: torch.Tensor) -> None:
            nonlocal recorded
            tracer(tensor, None, ids)
            recorded += 1

        arms: list[tuple[str, Callable[[torch.Tensor], Any]]] = [
            ("none", plain),
            ("empty", hooked),
            ("tracer", record),
        ]
        order = random.Random(setting.seed)
        for number in range(calls + 10):  # ten to warm up
            order.shuffle(arms)
            for name, call in arms:
                synchronize(device)
                began = time.perf_counter()
                call(values)
                took = time.perf_counter() - began
                if number >= 10:
                    seconds[name].append(took)
        tracer.flush()
        losses = settings.losses_of(tracer)
    settings.check_nothing_lost(losses, "small tensors")
    for column in ("layer0", f"layer{LAYERS - 1}"):
        stored = settings.read_column(setting.memory_dir, "hooks", column)
        settings.check_equal(stored, values.repeat(recorded, 1), column)
    return summarise(setting, seconds, losses)


def summarise(setting: Setting, seconds: dict[str, list[float]], losses: dict[str, Any]) -> Findings:
    base = estimate_median(seconds["none"]).median
    summary: dict[str, Any] = {"call_without_hooks_us": base * 1e6, "losses": losses}
    bars: list[Bar] = []
    for name in ("empty", "tracer"):
        hook_us = [(value - base) / LAYERS * 1e6 for value in seconds[name]]
        summary[name] = {
            "hook_us": estimate_median(hook_us),
            "hook_us_distribution": describe_samples(hook_us),
        }
        bars.append(Bar(f"{name}: median", *interval(hook_us)))
        bars.append(Bar(f"{name}: p99", describe_samples(hook_us)["p99"]))
    options = {**setting.described(), "layers": LAYERS, "shape": SHAPE, "calls": len(seconds["none"])}
    return Findings(options, seconds, summary, "microseconds a hook", bars)


def interval(samples: list[float]) -> tuple[float, float, float]:
    estimate = estimate_median(samples)
    return estimate.median, estimate.low, estimate.high
