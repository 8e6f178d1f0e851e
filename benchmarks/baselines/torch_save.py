"""`torch.save` after each step: one file a step."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.baselines.base import Baseline, Columns, joined


class TorchSave(Baseline):
    name = "torch.save"

    def open(self) -> None:
        self.steps = 0

    def save(self, ids: list[str], columns: Columns) -> None:
        torch.save({"input_id": ids, **columns}, self.folder / f"{self.steps:08d}.pt")
        self.steps += 1

    def read(self) -> dict[str, np.ndarray]:
        return joined([torch.load(path) for path in sorted(self.folder.glob("*.pt"))])
