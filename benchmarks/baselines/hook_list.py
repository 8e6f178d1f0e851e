"""A hook that appends clones to a list in memory; nothing reaches a disk. Older steps are let go of."""

from __future__ import annotations

from collections import deque

import numpy as np

from benchmarks.baselines.base import Baseline, Columns, joined

KEPT_STEPS = 64


class HookIntoList(Baseline):
    name = "hook into a list"
    survives = "nothing"

    def open(self) -> None:
        # A list of everything would end the run by its memory, not by its cost.
        self.steps: deque[dict[str, np.ndarray]] = deque(maxlen=KEPT_STEPS)

    def save(self, ids: list[str], columns: Columns) -> None:
        step = {name: values.clone().numpy() for name, values in columns.items()}
        self.steps.append({"input_id": list(ids), **step})

    def read(self) -> dict[str, np.ndarray]:
        return joined(list(self.steps))
