"""The models that are timed on a CPU, and how their steps are driven."""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.gpu.models import Trainer
from benchmarks.harness.blocks import Arm
from ml_debugger.training import ClassificationTracer

CLASSES = 100
FEATURES = 512
SIDE, PATCH, CHANNELS = 16, 4, 256
MAP_BYTES = CHANNELS * (SIDE // PATCH) ** 2 * 4  # 16 KiB a sample
# Of features, logits and label; the rate of the target is counted by it.
SAMPLE_BYTES = 4 * FEATURES + 4 * CLASSES + 8
TARGET_BYTES_PER_S = 50e6


class SmallConvNet(nn.Module):
    """A convolution over patches, whose map has 16 KiB a sample; linear layers; 512 features, 100 logits.

    Cheap for what it computes: a step captures as many bytes a second as the target allows, or nearly.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, CHANNELS, PATCH, stride=PATCH)
        layers: list[nn.Module] = [nn.Linear(CHANNELS, FEATURES), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Linear(FEATURES, FEATURES), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.map(images).relu().flatten(2).mean(2)
        return self.fc(self.body(pooled))


class Layers(nn.Module):
    """Layers that compute nothing, and logits that are there already: nothing but the recording is left."""

    def __init__(self, layers: int, logits: torch.Tensor) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.logits = logits

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for tap in self.taps:
            tap(values)
        return self.logits

    def paths(self) -> dict[str, str]:
        """For ``target_layers``."""
        return {f"layer{number}": f"taps.{number}" for number in range(len(self.taps))}


def make_trainer(batch_size: int, depth: int, seed: int) -> Trainer:
    """Steps over four batches of random images, with text as ids."""
    torch.manual_seed(seed)
    images = [torch.randn(batch_size, 3, SIDE, SIDE) for _ in range(4)]
    trainer = Trainer(SmallConvNet(depth), images, classes=CLASSES, amp=False)
    trainer.ids = [f"sample-{row:08d}" for row in range(batch_size)]
    return trainer


def depth_for_rate(batch_size: int, seed: int) -> int:
    """How deep the model must be, so that a step captures at most `TARGET_BYTES_PER_S` on its one core.

    By CPU seconds, which other programs on the machine change less. At most 64.
    """
    wanted_s = batch_size * SAMPLE_BYTES / TARGET_BYTES_PER_S
    depth = 0
    while depth < 64:
        trainer = make_trainer(batch_size, depth, seed)
        trainer.run(2, trainer.plain)
        took_s = min(_cpu_seconds_a_step(trainer) for _ in range(3))
        if took_s >= wanted_s:
            break
        depth = min(64, max(depth + 1, round(depth * wanted_s / took_s)))
    return depth


def _cpu_seconds_a_step(trainer: Trainer) -> float:
    began = time.process_time()
    trainer.run(3, trainer.plain)
    return (time.process_time() - began) / 3


def untraced_arm(trainer: Trainer) -> Arm:
    return Arm(lambda steps: trainer.run(steps, trainer.plain), lambda: None)


def traced_arm(trainer: Trainer, tracer: ClassificationTracer) -> Arm:
    def forward(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = tracer(inputs, labels, trainer.ids, "train", 0)
        return logits

    return Arm(lambda steps: trainer.run(steps, forward), tracer.flush)
