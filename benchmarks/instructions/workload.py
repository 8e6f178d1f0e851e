"""What callgrind counts: ``python workload.py MARKS DATA_DIR``, as a process of its own.

Each dump is named ``<what>/call`` or ``<what>/commit`` and has the instructions of all threads since the one
before. The writer sleeps until it is told to flush (its interval is beyond the run), so that its work falls
into one commit, always the same, and none of it into the calls.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

REPEATS = 50
FEW_LAYERS, MANY_LAYERS = 2, 12
FEW_CALLS, MANY_CALLS = 40, 120
BATCHES = (1, 32, 256)
FEATURES, CLASSES = 64, 10


class Layers(nn.Module):
    """Layers that compute nothing, and logits that are there already."""

    def __init__(self, layers: int, batch_size: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.logits = torch.zeros(batch_size, CLASSES)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for tap in self.taps:
            tap(values)
        return self.logits


def do_nothing(module: nn.Module, given: Any, returned: Any) -> None:
    """The empty Python hook."""


class Marks:
    """What `marks.c` does."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def count(self, name: str, run: Callable[[], Any], after: Callable[[], Any] | None = None) -> None:
        """Count what ``run`` takes, and under another name what ``after`` takes."""
        self._library.start()
        self._library.reset()
        run()
        self._library.dump(f"{name}/call".encode())
        if after is not None:
            after()
            self._library.dump(f"{name}/commit".encode())
        self._library.stop()


def repeat(times: int, call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def count_hooks(marks: Marks, config: TracerConfig) -> None:
    """Calls of models with few and with many layers: their difference is what the layers take."""
    values, ids = torch.zeros(4, 4), list("abcd")
    for layers in (FEW_LAYERS, MANY_LAYERS):
        for hook in ("none", "empty", "tracer"):
            model = Layers(layers, 4)
            if hook == "empty":
                for tap in model.taps:
                    tap.register_forward_hook(do_nothing)
            if hook != "tracer":
                call = repeat(REPEATS, lambda model=model: model(values))
                call()
                marks.count(f"{hook}-{layers}", call)
                continue
            paths = {f"layer{number}": f"taps.{number}" for number in range(layers)}
            with ClassificationTracer(model, "hooks", str(layers), paths, config=config) as tracer:
                call = repeat(REPEATS, lambda tracer=tracer: tracer(values, None, ids))
                call()
                tracer.flush()
                marks.count(f"{hook}-{layers}", call)


def count_calls(marks: Marks, config: TracerConfig) -> None:
    """Whole calls with three layers, ids and labels, and what the writer makes of them."""
    for batch_size in BATCHES:
        values, labels = torch.zeros(batch_size, FEATURES), torch.zeros(batch_size, dtype=torch.int64)
        ids = [f"sample-{row:06d}" for row in range(batch_size)]
        model = Layers(3, batch_size)
        paths = {f"layer{number}": f"taps.{number}" for number in range(3)}
        with ClassificationTracer(model, "calls", str(batch_size), paths, config=config) as tracer:
            call = repeat(FEW_CALLS, lambda: tracer(values, labels, ids, "train", 0))  # noqa: B023
            call()
            tracer.flush()
            for calls in (FEW_CALLS, MANY_CALLS):
                call = repeat(calls, lambda: tracer(values, labels, ids, "train", 0))  # noqa: B023
                marks.count(f"batch{batch_size}-{calls}", call, tracer.flush)


def main(marks_path: str, data_dir: str) -> None:
    torch.set_num_threads(1)
    marks = Marks(marks_path)
    config = TracerConfig(
        data_dir=Path(data_dir), durability="process", ring_bytes=64 << 20, commit_interval_s=3600.0
    )
    gc.disable()  # when it runs depends on everything
    count_hooks(marks, config)
    count_calls(marks, config)


if __name__ == "__main__":
    main(*sys.argv[1:])
