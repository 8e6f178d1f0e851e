"""Ours, behind the interface of the others."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch

from benchmarks.baselines.base import Baseline
from benchmarks.harness import setting as settings
from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer


class Tracer(Baseline):
    """With ``durability="process"``, which is what the others do at most."""

    name = "ml_debugger"
    durability: ClassVar[Literal["process", "power"]] = "process"

    def open(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.losses: dict[str, Any] = {}
        config = TracerConfig(data_dir=self.folder, durability=self.durability)
        self.tracer = ClassificationTracer(self.model, "benchmark", "us", self.layers, config=config)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, ids: list[str]) -> torch.Tensor:
        logits: torch.Tensor = self.tracer(inputs, labels, ids, "train", 0)
        return logits

    def drain(self) -> None:
        self.tracer.flush()

    def close(self) -> None:
        self.tracer.flush()
        self.losses = settings.losses_of(self.tracer)
        settings.check_nothing_lost(self.losses, self.name)
        self.tracer.close()

    def read(self) -> dict[str, np.ndarray]:
        trace = open_trace("benchmark", "us", data_dir=self.folder)
        columns = trace.arrays("extracted_feature", columns=["input_id", *self.layers, "logits"])
        return {**columns, **trace.arrays("ground_truth", columns=["label"])}


class DurableTracer(Tracer):
    """As it is by default."""

    name = "ml_debugger, power"
    survives = "power cut"
    durability = "power"
