"""smdebug (SageMaker Debugger): its hook saves the outputs of the layers at every step.

It knows no ids and no labels; they are kept beside it, in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.baselines.base import Baseline


class SmdebugHook(Baseline):
    name = "smdebug"
    requires = ("smdebug", "pyinstrument", "boto3")
    survives = "kill"

    def open(self) -> None:
        import smdebug.pytorch as smd

        for handle in self._handles:
            handle.remove()
        self._handles = []
        pattern = "|".join(f"{path}_output_0$" for path in (*self.layers.values(), "fc"))
        self.hook: Any = smd.Hook(
            out_dir=str(self.folder / "rows"),
            include_regex=[pattern],
            save_config=smd.SaveConfig(save_interval=1),
        )
        self.hook.register_module(self.model)
        self.beside: list[tuple[list[str], np.ndarray[Any, Any]]] = []

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, ids: list[str]) -> torch.Tensor:
        logits: torch.Tensor = self.model(inputs)
        self.beside.append((list(ids), labels.clone().numpy()))
        return logits

    def close(self) -> None:
        super().close()
        self.hook.close()

    def read(self) -> dict[str, np.ndarray]:
        import smdebug.pytorch as smd

        trial = smd.create_trial(str(self.folder / "rows"))
        found: dict[str, Any] = {
            "input_id": np.concatenate([ids for ids, _ in self.beside]),
            "label": np.concatenate([labels for _, labels in self.beside]),
        }
        for column, path in {**self.layers, "logits": "fc"}.items():
            tensor = next(name for name in trial.tensor_names() if name.startswith(f"{path}_output_0"))
            steps = trial.tensor(tensor).steps()
            found[column] = np.concatenate([trial.tensor(tensor).value(step) for step in steps])
        return found
