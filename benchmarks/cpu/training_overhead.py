"""Question: what does a training step on a CPU pay for being recorded?

Method: one process, an untraced arm, a second untraced one (what the machine's noise makes of no difference),
and traced ones (features, logits and labels with the data on tmpfs and on a disk; a map of 16 KiB a sample
besides, on the disk), all of them on one convolutional network, since equal copies differ by where they lie
in memory; the hooks of a tracer that is not called cost about 1 us a layer. The network is as deep as makes a
step capture at most 50 MB/s a core of features, logits and labels. At least 30 steps and 2 s a block, blocks
drained before and within their time, in random order within a round; median of the ratios of the rounds with
a bootstrap interval; beside it CPU seconds of the training thread, which noise changes less, and of all
threads. B = 256 and 1024. torch has one thread, so that the writer finds a core as it does beside a GPU or a
data loader; freed memory stays with the process (`allocator`). After the blocks three more steps are recorded
whose features, logits, labels and maps are kept, read back and compared bit for bit; with a row lost there is
no figure.

Excluded: loading data, the first call (which finds the head), reading back.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cpu.models import (
    MAP_BYTES,
    SAMPLE_BYTES,
    depth_for_rate,
    make_trainer,
    traced_arm,
    untraced_arm,
)
from benchmarks.gpu.models import Trainer
from benchmarks.harness import setting as settings
from benchmarks.harness.blocks import (
    BLOCK_S,
    LEAST_STEPS,
    Arm,
    Block,
    ratio_of,
    rounds_within,
    run_blocks,
    seconds_per_step,
    step_seconds,
    steps_of_block,
)
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

NAME = "cpu_training_overhead"
QUESTION = "What does a training step on a CPU pay for being recorded?"
TARGET_RATIO = 1.01
CHECKED_STEPS = 3
FEATURE_LAYERS = {"features": "body"}
MAP_LAYERS = {"features": "body", "map": "map"}
AGAIN = "untraced again"


def measure(setting: Setting) -> Findings:
    samples: dict[str, list[Block]] = {}
    summary: dict[str, Any] = {}
    bars: list[Bar] = []
    with one_thread():
        for batch_size in (8,) if setting.is_quick else (256, 1024):
            name = f"B = {batch_size}"
            samples[name], summary[name] = time_batch_size(setting, batch_size)
            for arm, found in summary[name]["arms"].items():
                ratio = found["ratio"]
                bars.append(Bar(f"{name}, {arm}", ratio.median, ratio.low, ratio.high))
    options = {
        **setting.described(),
        "checked_steps": CHECKED_STEPS,
        "least_steps": LEAST_STEPS,
        "block_s": BLOCK_S,
    }
    return Findings(options, samples, summary, "step time, traced / untraced", bars, TARGET_RATIO)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread inside of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_batch_size(setting: Setting, batch_size: int) -> tuple[list[Block], dict[str, Any]]:
    depth = 0 if setting.is_quick else depth_for_rate(batch_size, setting.seed)
    untraced = make_trainer(batch_size, depth, setting.seed)
    places = {
        "features, tmpfs": (setting.memory_dir, FEATURE_LAYERS),
        "features, disk": (setting.disk_dir, FEATURE_LAYERS),
        "features and map, disk": (setting.disk_dir, MAP_LAYERS),
    }
    trainers = {arm: copy.copy(untraced) for arm in places}
    tracers: dict[str, ClassificationTracer] = {}
    try:
        arms = {"untraced": untraced_arm(untraced), AGAIN: untraced_arm(copy.copy(untraced))}
        for arm, (folder, layers) in places.items():
            config = TracerConfig(data_dir=folder)
            tracers[arm] = ClassificationTracer(trainers[arm].model, "benchmark", arm, layers, config=config)
            arms[arm] = traced_arm(trainers[arm], tracers[arm])
        blocks = time_arms(setting, arms, 60.0)
        summary: dict[str, Any] = {
            "depth": depth,
            "untraced_step_s": step_seconds(blocks, "untraced"),
            "arms": {AGAIN: compared(blocks, AGAIN, "untraced")},
        }
        step_s = summary["untraced_step_s"].median
        for arm, tracer in tracers.items():
            folder, layers = places[arm]
            losses = check_recorded(trainers[arm], tracer, arms[arm], folder, arm)
            sample_bytes = SAMPLE_BYTES + (MAP_BYTES if layers is MAP_LAYERS else 0)
            summary["arms"][arm] = {
                **compared(blocks, arm, "untraced"),
                "captured_bytes_a_step": batch_size * sample_bytes,
                "captured_bytes_per_s": batch_size * sample_bytes / step_s,
                "losses": losses,
            }
    finally:
        for tracer in tracers.values():
            tracer.close()
        settings.empty_folder(setting.memory_dir)
        settings.empty_folder(setting.disk_dir)
    return blocks, summary


def time_arms(setting: Setting, arms: dict[str, Arm], budget_s: float) -> list[Block]:
    """Warm all arms up and time as many rounds as ``budget_s`` allows, three times that in a full run."""
    for arm in arms.values():
        arm.run(5)
        arm.drain()
    slowest_s = max(seconds_per_step(arm, 2) for arm in arms.values())
    steps = 3 if setting.is_quick else steps_of_block(slowest_s)
    budget_s = 0 if setting.is_quick else budget_s * (3 if setting.is_full else 1)
    least = 2 if setting.is_quick else 4
    rounds = rounds_within(budget_s, len(arms), slowest_s * steps, least=least, most=30)
    return run_blocks(arms, rounds=rounds, steps=steps, seed=setting.seed)


def compared(blocks: list[Block], arm: str, base: str) -> dict[str, Any]:
    """One arm beside another, for the summary."""
    return {
        "ratio": ratio_of(blocks, arm, base),
        "thread_ratio": ratio_of(blocks, arm, base, clock="thread_s"),
        "cpu_ratio": ratio_of(blocks, arm, base, clock="cpu_s"),
        "step_s": step_seconds(blocks, arm),
        "cpu_s_a_step": step_seconds(blocks, arm, clock="cpu_s"),
    }


def check_recorded(
    trainer: Trainer, tracer: ClassificationTracer, arm: Arm, folder: Path, version: str
) -> dict[str, Any]:
    """Record a few more steps, compare them and all labels with what is read back; what was lost.

    Raises:
        WrongDataError: A row is lost or differs.
    """
    seen: dict[str, list[torch.Tensor]] = {"map": [], "features": [], "logits": []}

    def keep(column: str) -> Any:
        def hook(module: nn.Module, given: Any, returned: torch.Tensor) -> None:
            seen[column].append(returned.detach().clone())

        return hook

    model = trainer.model
    modules = {"map": model.map, "features": model.body, "logits": model.fc}
    handles = [module.register_forward_hook(keep(column)) for column, module in modules.items()]
    first_step = trainer.steps
    arm.run(CHECKED_STEPS)
    arm.drain()
    for handle in handles:
        handle.remove()
    losses = settings.losses_of(tracer)
    settings.check_nothing_lost(losses, version)
    for column in ("features", "logits", *(["map"] if "map" in _columns(folder, version) else [])):
        expected = torch.cat(seen[column])
        stored = settings.read_column(folder, version, column)
        settings.check_equal(stored[-len(expected) :], expected, f"{version}: {column}")
    steps = range(first_step + CHECKED_STEPS)
    labels = torch.cat([trainer.labels[step % len(trainer.labels)] for step in steps])
    settings.check_equal(settings.read_column(folder, version, "label"), labels, f"{version}: label")
    return losses


def _columns(folder: Path, version: str) -> list[str]:
    return list(open_trace("benchmark", version, data_dir=folder).columns("extracted_feature"))
