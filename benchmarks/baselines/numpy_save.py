"""`numpy.save` after each step: one file a column, as most hand-written hooks do it."""

from __future__ import annotations

import numpy as np

from benchmarks.baselines.base import Baseline, Columns, joined


class NumpySave(Baseline):
    name = "numpy.save"

    def open(self) -> None:
        self.steps = 0

    def save(self, ids: list[str], columns: Columns) -> None:
        np.save(self.folder / f"{self.steps:08d}.input_id.npy", np.array(ids))
        for name, values in columns.items():
            np.save(self.folder / f"{self.steps:08d}.{name}.npy", values.numpy())
        self.steps += 1

    def read(self) -> dict[str, np.ndarray]:
        names = {path.name.split(".")[1] for path in self.folder.glob("00000000.*.npy")}
        return joined(
            [
                {name: np.load(self.folder / f"{step:08d}.{name}.npy") for name in names}
                for step in range(self.steps)
            ]
        )
