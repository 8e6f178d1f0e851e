"""What every baseline is: another way to do a tracer's job, with the tools that people have."""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

Columns = dict[str, torch.Tensor]
_END = None


class Baseline:
    """Records what a model computes in each step.

    A subclass says how one step is stored (`save`) and read back (`read`); one that watches the model in
    another way than by hooks takes `forward` over.

    Attributes:
        name: Shown.
        requires: Modules that must be installed.
        survives: What a step that is saved survives: nothing, a kill of the process, a power cut.

    Args:
        model: Is watched.
        layers: Modules by the name of their column.
        folder: Empty; everything is stored in it.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    survives: ClassVar[str] = "kill"

    def __init__(self, model: nn.Module, layers: dict[str, str], folder: Path) -> None:
        self.model = model
        self.layers = layers
        self.folder = folder
        self._step: Columns = {}
        self._handles = [
            model.get_submodule(path).register_forward_hook(self._hook(column))
            for column, path in layers.items()
        ]
        self.open()

    def _hook(self, column: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, returned: torch.Tensor) -> None:
            self._step[column] = returned.detach()

        return hook

    @classmethod
    def missing(cls) -> str | None:
        """The first module that is not installed; None if all are."""
        return next((name for name in cls.requires if importlib.util.find_spec(name) is None), None)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, ids: list[str]) -> torch.Tensor:
        """Run the model and save what it computed; returns the logits."""
        logits: torch.Tensor = self.model(inputs)
        columns, self._step = {**self._step, "logits": logits.detach(), "label": labels}, {}
        self.save(ids, columns)
        return logits

    def open(self) -> None:
        """Prepare ``folder``."""

    def save(self, ids: list[str], columns: Columns) -> None:
        """Store one step. The tensors are the user's again when this returns."""
        raise NotImplementedError

    def drain(self) -> None:
        """Return when every step that was saved is stored as well as it ever is."""

    def close(self) -> None:
        """Let go of model and files."""
        self.drain()
        for handle in self._handles:
            handle.remove()

    def read(self) -> dict[str, np.ndarray]:
        """Every row in the order of the steps, ``input_id`` too; after `close`."""
        raise NotImplementedError


class ThreadedBaseline(Baseline):
    """Copies each step and stores it in a thread of its own, behind a queue."""

    queue_steps: ClassVar[int] = 64
    survives = "nothing"

    def open(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(self.queue_steps)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def save(self, ids: list[str], columns: Columns) -> None:
        self._raise_failure()
        self._queue.put((list(ids), {name: values.clone() for name, values in columns.items()}))

    def drain(self) -> None:
        self._queue.join()
        self._raise_failure()

    def close(self) -> None:
        super().close()
        self._queue.put(_END)
        self._thread.join()
        self._raise_failure()

    def begin(self) -> None:
        """Called in the thread before the first step."""

    def store(self, ids: list[str], columns: Columns) -> None:
        """Called in the thread for each step."""
        raise NotImplementedError

    def end(self) -> None:
        """Called in the thread after the last step."""

    def _work(self) -> None:
        try:
            self.begin()
        except BaseException as error:
            self._failure = error
        while (step := self._queue.get()) is not _END:
            try:
                if self._failure is None:
                    self.store(*step)
            except BaseException as error:
                self._failure = error
            finally:
                self._queue.task_done()
        try:
            if self._failure is None:
                self.end()
        except BaseException as error:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"{self.name} failed in its thread") from self._failure


def joined(steps: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Columns of all steps, one behind the other."""
    return {name: np.concatenate([np.asarray(step[name]) for step in steps]) for name in steps[0]}
