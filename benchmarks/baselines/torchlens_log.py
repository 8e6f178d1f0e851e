"""TorchLens: logs the layers of each forward; what it keeps is appended to a list, nothing reaches a disk.

It has no writer of its own for many steps, so this is the cost of watching alone.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from benchmarks.baselines.base import Baseline, joined
from benchmarks.baselines.hook_list import KEPT_STEPS


class TorchLensLog(Baseline):
    name = "TorchLens"
    requires = ("torchlens",)
    survives = "nothing"

    def open(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.steps: deque[dict[str, np.ndarray]] = deque(maxlen=KEPT_STEPS)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, ids: list[str]) -> torch.Tensor:
        import torchlens

        watched = [*self.layers.values(), "output"]
        log = torchlens.log_forward_pass(self.model, inputs, layers_to_save=watched)
        step = {column: log[path].activation.detach() for column, path in self.layers.items()}
        logits: torch.Tensor = log["output"].activation
        self.steps.append(
            {
                "input_id": list(ids),
                **{name: values.clone().numpy() for name, values in step.items()},
                "logits": logits.detach().clone().numpy(),
                "label": labels.clone().numpy(),
            }
        )
        return logits

    def read(self) -> dict[str, np.ndarray]:
        return joined(list(self.steps))
