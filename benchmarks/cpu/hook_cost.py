"""Question: what does the hook add to a forward, for small and for large CPU tensors?

Method: models of layers that compute nothing. Small: 64 floats in each layer; calls of a model
without hooks, with an empty Python hook on each layer, and with a tracer, in random order, timed one by
one. A layer's cost is the difference between models of 17 layers and of one, so that the tracer's share of a
call (ids, logits, description) drops out. Large: a tensor of 16 MiB in one layer; time of the layer inside
of a traced call, less the same outside of one, over the time of one copy of the same bytes between two warm
buffers, interleaved. Allocations: blocks that Python's allocator holds after many calls and did not before,
a hook. What was stored is read back and compared; with a row lost there is no figure.

Excluded: the writer's work, which runs in its own thread (a flush comes between the timings).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.cpu.models import Layers
from benchmarks.cpu.training_overhead import one_thread
from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import describe_samples, estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "cpu_hook_cost"
QUESTION = "What does the hook add to a forward, for small and for large CPU tensors?"
FEW, MANY = 1, 17
SMALL_SHAPE = (4, 16)
LARGE_BYTES = 16 << 20


def do_nothing(module: nn.Module, given: Any, returned: Any) -> None:
    """The empty Python hook."""


def measure(setting: Setting) -> Findings:
    with one_thread():
        small, small_samples = time_small(setting)
        large, large_samples = time_large(setting)
    over = small["hook_over_empty_us"]
    copy = large["hook_over_copy"]
    bars = [
        Bar("small tensor, us over an empty Python hook", over.median, over.low, over.high),
        Bar("large tensor, time / one warm copy", copy.median, copy.low, copy.high),
        Bar("blocks of Python memory a hook leaves", small["python_blocks_a_hook"]),
    ]
    options = {**setting.described(), "layers": MANY, "small": SMALL_SHAPE, "large_bytes": LARGE_BYTES}
    samples = {"small_s": small_samples, "large_s": large_samples}
    return Findings(options, samples, {"small": small, "large": large}, "(see label)", bars)


def time_small(setting: Setting) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Seconds of calls with few and with many layers; a hook is the difference."""
    calls = 20 if setting.is_quick else 6000 if setting.is_full else 2000
    values = torch.randn(SMALL_SHAPE, generator=torch.Generator().manual_seed(setting.seed))
    logits, ids = torch.zeros(SMALL_SHAPE[0], 2), [str(row) for row in range(SMALL_SHAPE[0])]
    config = TracerConfig(data_dir=setting.memory_dir, durability="process")
    arms: dict[str, Callable[[], Any]] = {}
    tracers = {}
    for layers in (FEW, MANY):
        plain, hooked, traced = (Layers(layers, logits) for _ in range(3))
        for tap in hooked.taps:
            tap.register_forward_hook(do_nothing)
        tracer = ClassificationTracer(traced, "benchmark", f"small{layers}", traced.paths(), config=config)
        tracers[layers] = tracer
        arms[f"none-{layers}"] = lambda plain=plain: plain(values)
        arms[f"empty-{layers}"] = lambda hooked=hooked: hooked(values)
        arms[f"tracer-{layers}"] = lambda tracer=tracer: tracer(values, None, ids)
    try:
        seconds = _time_calls(arms, calls, setting.seed)
        blocks = _python_blocks(tracers[MANY], arms[f"tracer-{MANY}"])
        losses = {}
        for layers, tracer in tracers.items():
            tracer.flush()
            losses[layers] = settings.losses_of(tracer)
            settings.check_nothing_lost(losses[layers], f"{layers} layers")
            rows = losses[layers]["rows_committed"]
            stored = settings.read_column(setting.memory_dir, f"small{layers}", f"layer{layers - 1}")
            settings.check_equal(stored, values.repeat(rows // SMALL_SHAPE[0], 1), f"{layers} layers")
    finally:
        for tracer in tracers.values():
            tracer.close()
    settings.empty_folder(setting.memory_dir)
    hook_us = {
        arm: [
            (many - few) / (MANY - FEW) * 1e6
            for few, many in zip(seconds[f"{arm}-{FEW}"], seconds[f"{arm}-{MANY}"], strict=True)
        ]
        for arm in ("none", "empty", "tracer")
    }
    over = [traced - empty for traced, empty in zip(hook_us["tracer"], hook_us["empty"], strict=True)]
    summary = {
        "layer_us": {arm: estimate_median(values_us) for arm, values_us in hook_us.items()},
        "hook_over_empty_us": estimate_median(over),
        "hook_over_empty_distribution_us": describe_samples(over),
        "python_blocks_a_hook": blocks,
        "losses": losses,
    }
    return summary, seconds


def _time_calls(arms: dict[str, Callable[[], Any]], calls: int, seed: int) -> dict[str, list[float]]:
    order, shuffled = list(arms), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(calls + 10):  # ten to warm up
        shuffled.shuffle(order)
        for name in order:
            began = time.perf_counter()
            arms[name]()
            took = time.perf_counter() - began
            if number >= 10:
                seconds[name].append(took)
    return seconds


def _python_blocks(tracer: ClassificationTracer, call: Callable[[], Any]) -> float:
    """Blocks of Python's allocator that a hook keeps, over many calls."""
    calls = 200
    tracer.flush()
    before = sys.getallocatedblocks()
    for _ in range(calls):
        call()
    return max(0.0, (sys.getallocatedblocks() - before) / (calls * MANY))


def time_large(setting: Setting) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Seconds of a layer with the hook on a large tensor, without it, and of one copy."""
    calls = 4 if setting.is_quick else 120 if setting.is_full else 40
    values = torch.randn(8, LARGE_BYTES // 32, generator=torch.Generator().manual_seed(setting.seed))
    target, ids = torch.empty_like(values), [str(row) for row in range(8)]
    model = TimedLayer(torch.zeros(8, 2))
    config = TracerConfig(data_dir=setting.memory_dir, durability="process")
    seconds: dict[str, list[float]] = {"none": [], "hook": [], "copy": []}
    with ClassificationTracer(model, "benchmark", "large", {"layer": "tap"}, config=config) as tracer:
        # Twice around the ring, so that every page of it is warm as the copy's buffers are.
        warm_up = 2 * tracer.config.ring_bytes // LARGE_BYTES + 1
        for number in range(warm_up + calls):
            tracer(values, None, ids)
            hooked_s = model.took_s
            tracer.flush()
            began = time.perf_counter()
            target.copy_(values)
            copied_s = time.perf_counter() - began
            handle = tracer_free(model, values)
            if number >= warm_up:
                for name, took in (("hook", hooked_s), ("copy", copied_s), ("none", handle)):
                    seconds[name].append(took)
        losses = settings.losses_of(tracer)
        settings.check_nothing_lost(losses, "large tensors")
        rows = losses["rows_committed"]
        stored = settings.read_column(setting.memory_dir, "large", "layer")
        settings.check_equal(stored[rows - 8 :], values, "large tensor")
    settings.empty_folder(setting.memory_dir)
    added = [
        (hooked - bare) / copied
        for hooked, bare, copied in zip(seconds["hook"], seconds["none"], seconds["copy"], strict=True)
    ]
    summary = {
        "hook_over_copy": estimate_median(added),
        "copy_bytes_per_s": LARGE_BYTES / estimate_median(seconds["copy"]).median,
        "losses": losses,
    }
    return summary, seconds


class TimedLayer(nn.Module):
    """Times its only layer, with the hooks that are on it."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.logits = logits
        self.took_s = 0.0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        self.tap(values)
        self.took_s = time.perf_counter() - began
        return self.logits


def tracer_free(model: TimedLayer, values: torch.Tensor) -> float:
    """Seconds of the layer outside of a call, where the hook does nothing."""
    model(values)
    return model.took_s
