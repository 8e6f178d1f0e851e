"""TorchLens: records chosen operations of each forward into memory; nothing reaches a disk.

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
        # It knows operations by the innermost module that ran them.
        self.addresses = {
            column: ".".join(
                filter(None, (path, list(self.model.get_submodule(path).named_modules())[-1][0]))
            )
            for column, path in self.layers.items()
        }
        self.steps: deque[dict[str, np.ndarray]] = deque(maxlen=KEPT_STEPS)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, ids: list[str]) -> torch.Tensor:
        import torchlens
        from torchlens.fastlog import CaptureSpec

        addresses, copied = set(self.addresses.values()), CaptureSpec(save_out=True)
        logits, record = torchlens.record(
            self.model,
            inputs,
            save=lambda context: copied if context.address in addresses else False,
            return_output=True,
        )
        step = {
            column: record.activations_by_address(address)[-1].ram_payload
            for column, address in self.addresses.items()
        }
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
