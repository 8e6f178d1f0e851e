"""`safetensors` after each step: one file a step, the ids in its metadata."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.baselines.base import Baseline, Columns, joined


class SafetensorsSave(Baseline):
    name = "safetensors"
    requires = ("safetensors",)

    def open(self) -> None:
        self.steps = 0

    def save(self, ids: list[str], columns: Columns) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"{self.steps:08d}.safetensors"
        save_file(columns, path, metadata={"input_id": json.dumps(ids)})
        self.steps += 1

    def read(self) -> dict[str, np.ndarray]:
        from safetensors import safe_open

        steps = []
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "numpy") as file:
                step = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                steps.append({"input_id": json.loads(file.metadata()["input_id"]), **step})
        return joined(steps)
