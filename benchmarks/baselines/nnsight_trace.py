"""nnsight: a trace around each forward saves the layers' outputs; nothing reaches a disk.

It has no writer of its own, so this is the cost of watching alone.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from benchmarks.baselines.base import Baseline, joined
from benchmarks.baselines.hook_list import KEPT_STEPS


class NnsightTrace(Baseline):
    name = "nnsight"
    requires = ("nnsight",)
    survives = "nothing"

    def open(self) -> None:
        from nnsight import NNsight

        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.wrapped: Any = NNsight(self.model)
        self.steps: deque[dict[str, np.ndarray]] = deque(maxlen=KEPT_STEPS)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, ids: list[str]) -> torch.Tensor:
        wrapped, saved = self.wrapped, {}
        # In the order in which they run.
        order = [name for name in ("map", "features") if name in self.layers]
        with wrapped.trace(inputs):
            for column in order:
                saved[column] = wrapped.get(self.layers[column]).output.save()
            logits = wrapped.output.save()
        self.steps.append(
            {
                "input_id": list(ids),
                **{name: values.detach().clone().numpy() for name, values in saved.items()},
                "logits": logits.detach().clone().numpy(),
                "label": labels.clone().numpy(),
            }
        )
        return logits

    def read(self) -> dict[str, np.ndarray]:
        return joined(list(self.steps))
