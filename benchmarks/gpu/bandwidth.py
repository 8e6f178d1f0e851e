"""Question: how fast do large tensors travel from the GPU into the ring, beside a bare copy to pinned
memory?

Method: blocks of the same bytes in tensors of one size, eight a call, interleaved in random order in one
process: recorded by a tracer, or copied with ``non_blocking=True`` into pinned buffers of torch. Timed
until the device has nothing left to do, so until all bytes lie in host memory. The ring has room for
several blocks and the writer is told to wait, so that none of its work falls into a block; after each
block the rows are committed (tmpfs) and, in the first and last round, read back and compared bit for bit;
then the epoch is dropped. Median of the ratios of the rounds with a bootstrap interval.

Excluded: the commit, pinning. Small tensors are bound by the host's time for a hook, not by bandwidth:
see hook_time.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.models import synchronize
from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "gpu_bandwidth"
QUESTION = "How fast do tensors travel from the GPU into the ring, beside a bare copy to pinned memory?"
TARGET_RATIO = 0.90
MIB = 1 << 20
TENSORS_A_CALL = 8


class Passing(nn.Module):
    """Sends each tensor that it is given through a watched layer, and returns small logits."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in range(count))
        self.logits = torch.zeros(1, 2, device=device)

    @property
    def layers(self) -> dict[str, str]:
        """Aliases and paths."""
        return {f"layer{number}": f"taps.{number}" for number in range(len(self.taps))}

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        for tap, tensor in zip(self.taps, tensors, strict=True):
            tap(tensor)
        return self.logits


def measure(setting: Setting) -> Findings:
    sizes = [64 << 10, MIB] if setting.is_quick else [256 << 10, 4 * MIB, 64 * MIB]
    block_bytes, rounds = (8 * MIB, 2) if setting.is_quick else (512 * MIB, 10)
    samples: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    bars: list[Bar] = []
    for number, size in enumerate(sizes):
        name = f"{size // 1024} KiB a tensor"
        samples[name], summary[name] = time_size(setting, f"v{number}", size, block_bytes, rounds)
        ratio = summary[name]["ratio"]
        bars.append(Bar(name, ratio.median, ratio.low, ratio.high))
    options = {**setting.described(), "block_bytes": block_bytes, "rounds": rounds, "tensor_bytes": sizes}
    return Findings(options, samples, summary, "rate of capture / bare pinned copy", bars, TARGET_RATIO)


def time_size(
    setting: Setting, version: str, size: int, block_bytes: int, rounds: int
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    device, calls = setting.device, block_bytes // (TENSORS_A_CALL * size)
    generator = torch.Generator().manual_seed(setting.seed)
    host = torch.randint(256, (TENSORS_A_CALL, 1, size), dtype=torch.uint8, generator=generator).unbind()
    tensors = [values.to(device) for values in host]
    pinned = [torch.empty(1, size, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in host]
    model, order = Passing(TENSORS_A_CALL, device), random.Random(setting.seed)
    config = TracerConfig(
        data_dir=setting.memory_dir,
        ring_bytes=3 * block_bytes,  # below half of it the writer is not woken
        commit_bytes=2 * block_bytes,
        commit_interval_s=3600,
        durability="process",
    )

    def copy_bare(epoch: int) -> None:
        for _ in range(calls):
            for buffer, tensor in zip(pinned, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)

    def record(epoch: int) -> None:
        for _ in range(calls):
            tracer(tensors, None, ["0"], n_epoch=epoch)

    arms = [("bare", copy_bare), ("recorded", record)]
    samples: list[dict[str, float]] = []
    with ClassificationTracer(model, "benchmark", version, model.layers, config=config) as tracer:
        for epoch in range(rounds + 1):  # the first one warms up
            sample: dict[str, float] = {}
            order.shuffle(arms)
            for name, run in arms:
                synchronize(device)
                began = time.perf_counter()
                run(epoch)
                synchronize(device)
                sample[f"{name}_gb_per_s"] = block_bytes / 1e9 / (time.perf_counter() - began)
            if epoch > 0:
                samples.append(sample)
            tracer.flush()
            if epoch in (1, rounds):
                check_epoch(setting, version, epoch, calls, list(host))
            losses = settings.losses_of(tracer)
            settings.check_nothing_lost(losses, f"tensors of {size} bytes")
            tracer.drop_epoch_data(epoch)
    summary = {
        "ratio": estimate_median([each["recorded_gb_per_s"] / each["bare_gb_per_s"] for each in samples]),
        "bare_gb_per_s": estimate_median([each["bare_gb_per_s"] for each in samples]),
        "recorded_gb_per_s": estimate_median([each["recorded_gb_per_s"] for each in samples]),
        "losses": losses,
    }
    return samples, summary


def check_epoch(setting: Setting, version: str, epoch: int, calls: int, host: list[torch.Tensor]) -> None:
    for number, values in enumerate(host):
        stored = settings.read_column(setting.memory_dir, version, f"layer{number}", n_epoch=epoch)
        settings.check_equal(stored, values.repeat(calls, 1), f"layer {number} of {version}")
