"""Question: what does a training step pay for being recorded (features, logits, labels; every sample)?

Method: one process, an untraced arm and traced arms with the data on tmpfs and on a disk, each with its
own copy of the model and optimizer. Drained blocks of at least 30 steps, in random order within a round;
the drain (device, and for the traced arms the commit of every row) is inside the timed block. Median of
the ratios of the rounds with a bootstrap interval; CPU seconds of all threads beside it. Models: a
ResNet-50-like one under bfloat16 autocast in channels_last with 2048 features and 1000 logits at B = 256
(224 x 224 pixels) and 1024 (160 x 160); an MLP in float32 with 512 features and 100 logits at B = 256,
made as deep as takes about 5 ms a step. After the timed blocks every label, and the features and logits
of further steps, are read back and compared bit for bit; rows lost are listed, and with a loss there is
no figure.

Excluded: loading data (batches lie on the device), the first call (which finds the head and pins the
ring), reading back. CPU seconds hold the spinning of torch's own waits for the device, in every arm.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import CLASSES, Mlp, ResNet, Trainer, synchronize
from benchmarks.harness import setting as settings
from benchmarks.harness.blocks import (
    LEAST_STEPS,
    Arm,
    Block,
    ratio_of,
    rounds_within,
    run_blocks,
    seconds_per_step,
    step_seconds,
)
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "gpu_step_time"
QUESTION = "What does a training step pay for being recorded (features, logits, labels of every sample)?"
TARGET_RATIO = 1.01
CHECKED_STEPS = 3
SMALL_STEP_S = 0.005


@dataclass(frozen=True)
class Workload:
    """A model and how long it is timed.

    Attributes:
        name: Shown.
        make: Makes a trainer of this workload.
        budget_s: Time for all its blocks.
        steps: Of a block.
    """

    name: str
    make: Callable[[], Trainer]
    budget_s: float
    steps: int


def make_resnet(setting: Setting, batch_size: int, side: int) -> Trainer:
    """Images of ``side`` x ``side`` pixels."""
    model = ResNet((1, 1), 8) if setting.is_quick else ResNet()
    model = model.to(setting.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (batch_size, 3, side, side)
    inputs = [
        values.contiguous(memory_format=torch.channels_last) for values in random_batches(setting, 2, shape)
    ]
    return Trainer(model, inputs, classes=CLASSES, amp=True)


def make_mlp(setting: Setting, depth: int) -> Trainer:
    width = 64 if setting.is_quick else 2048
    inputs = random_batches(setting, 4, (256, width))
    return Trainer(Mlp(depth, width).to(setting.device), inputs, classes=100, amp=False)


def random_batches(setting: Setting, count: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    return [torch.randn(shape, generator=generator, device=setting.device) for _ in range(count)]


def depth_for_small_steps(setting: Setting) -> int:
    """How deep an MLP takes about `SMALL_STEP_S` a step here, from the difference of two depths."""
    if setting.is_quick:
        return 1
    seconds = []
    for depth in (8, 24):
        trainer = make_mlp(setting, depth)
        arm = untraced_arm(setting, trainer)
        seconds_per_step(arm, 20)
        seconds.append(seconds_per_step(arm, 60))
    layer_s = max((seconds[1] - seconds[0]) / 16, 1e-5)
    return max(1, min(200, round(24 + (SMALL_STEP_S - seconds[1]) / layer_s)))


def untraced_arm(setting: Setting, trainer: Trainer) -> Arm:
    return Arm(lambda steps: trainer.run(steps, trainer.plain), lambda: synchronize(setting.device))


def traced_arm(setting: Setting, trainer: Trainer, tracer: ClassificationTracer) -> Arm:
    def forward(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = tracer(inputs, labels, trainer.ids, "train", 0)
        return logits

    def drain() -> None:
        synchronize(setting.device)
        tracer.flush()

    return Arm(lambda steps: trainer.run(steps, forward), drain)


def workloads(setting: Setting) -> list[Workload]:
    if setting.is_quick:
        return [
            Workload("ResNet, B = 8", lambda: make_resnet(setting, 8, 32), 1, LEAST_STEPS),
            Workload("MLP, B = 256", lambda: make_mlp(setting, 1), 1, LEAST_STEPS),
        ]
    depth = depth_for_small_steps(setting)
    return [
        Workload("MLP, B = 256", lambda: make_mlp(setting, depth), 20, 60),
        Workload("ResNet-50-like, B = 256", lambda: make_resnet(setting, 256, 224), 55, LEAST_STEPS),
        # 224 pixels would not fit into 80 GB; smaller images make the step shorter and the ratio harder.
        Workload("ResNet-50-like, B = 1024", lambda: make_resnet(setting, 1024, 160), 85, LEAST_STEPS),
    ]


def measure(setting: Setting) -> Findings:
    samples: dict[str, list[Block]] = {}
    summary: dict[str, Any] = {}
    bars: list[Bar] = []
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        for number, workload in enumerate(workloads(setting)):
            samples[workload.name], summary[workload.name] = time_workload(setting, workload, f"v{number}")
            for where in ("tmpfs", "disk"):
                ratio = summary[workload.name][where]["ratio"]
                bars.append(Bar(f"{workload.name}, {where}", ratio.median, ratio.low, ratio.high))
            gc.collect()  # models and their hooks refer to each other
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        torch.backends.cudnn.benchmark = before
    options = {**setting.described(), "checked_steps": CHECKED_STEPS, "least_steps": LEAST_STEPS}
    return Findings(options, samples, summary, "step time, traced / untraced", bars, TARGET_RATIO)


def time_workload(setting: Setting, workload: Workload, version: str) -> tuple[list[Block], dict[str, Any]]:
    untraced = workload.make()
    folders = {"tmpfs": setting.memory_dir, "disk": setting.disk_dir}
    trainers = {where: share_batches(untraced) for where in folders}
    tracers: dict[str, ClassificationTracer] = {}
    try:
        for where, folder in folders.items():
            tracers[where] = ClassificationTracer(
                trainers[where].model, "benchmark", version, config=TracerConfig(data_dir=folder)
            )
        arms = {"untraced": untraced_arm(setting, untraced)}
        for where in folders:
            arms[where] = traced_arm(setting, trainers[where], tracers[where])
        for arm in arms.values():  # kernels are chosen, memory is taken, the head is found
            arm.run(5)
            arm.drain()
        step_s = max(seconds_per_step(arm, 10 if not setting.is_quick else 2) for arm in arms.values())
        rounds = rounds_within(workload.budget_s, len(arms), step_s * workload.steps, least=4, most=30)
        blocks = run_blocks(arms, rounds=rounds, steps=workload.steps, seed=setting.seed)
        summary: dict[str, Any] = {
            **described(workload, untraced, rounds),
            "untraced": {
                "step_s": step_seconds(blocks, "untraced"),
                "cpu_s_a_step": step_seconds(blocks, "untraced", clock="cpu_s"),
            },
        }
        for where, tracer in tracers.items():
            checked = run_checked_steps(trainers[where], arms[where])
            losses = settings.losses_of(tracer)
            settings.check_nothing_lost(losses, f"{workload.name}, {where}")
            check_stored(folders[where], version, trainers[where], checked)
            summary[where] = {
                "ratio": ratio_of(blocks, where, "untraced"),
                "cpu_ratio": ratio_of(blocks, where, "untraced", clock="cpu_s"),
                "step_s": step_seconds(blocks, where),
                "cpu_s_a_step": step_seconds(blocks, where, clock="cpu_s"),
                "losses": losses,
            }
    finally:
        for where, tracer in tracers.items():
            tracer.close()
            settings.empty_folder(folders[where])
    return blocks, summary


def described(workload: Workload, trainer: Trainer, rounds: int) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "steps_a_block": workload.steps,
        "input_shape": list(trainer.inputs[0].shape),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


def share_batches(trainer: Trainer) -> Trainer:
    """Another trainer with a copy of the model, over the same batches."""
    classes = trainer.model.fc.out_features
    model = copy.deepcopy(trainer.model)
    return Trainer(model, trainer.inputs, classes=classes, amp=isinstance(model, ResNet))


def run_checked_steps(trainer: Trainer, arm: Arm) -> dict[str, list[torch.Tensor]]:
    """Some more traced steps, of which a hook of ours keeps what the head was given and returned."""
    seen: dict[str, list[torch.Tensor]] = {"features": [], "logits": []}

    def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], returned: torch.Tensor) -> None:
        # Behind autocast's back the head computes in its dtype, and the tracer sees what the head is given.
        seen["features"].append(given[0].detach().clone())
        seen["logits"].append(returned.detach().clone())

    handle = trainer.model.fc.register_forward_hook(keep)
    try:
        arm.run(CHECKED_STEPS)
        arm.drain()
    finally:
        handle.remove()
    return seen


def check_stored(
    data_dir: Path, version: str, trainer: Trainer, checked: dict[str, list[torch.Tensor]]
) -> None:
    labels = [trainer.labels[step % len(trainer.labels)] for step in range(trainer.steps)]
    settings.check_equal(read(data_dir, version, "label"), torch.cat(labels), "labels")
    for column, values in checked.items():
        expected = torch.cat(values)
        stored = read(data_dir, version, column)
        settings.check_equal(stored[-len(expected) :], expected, column)


def read(data_dir: Path, version: str, column: str) -> Any:
    return settings.read_column(data_dir, version, column)
