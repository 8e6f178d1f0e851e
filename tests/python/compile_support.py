"""Small nets, and what tests of compiled models do with them again and again."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from ml_debugger import open_trace
from ml_debugger.training import ClassificationTracer

BATCH, WIDTH = 6, 8
BACKENDS = ["eager", "aot_eager", "inductor"]


class Body(nn.Linear):
    """A linear layer of the user's: torch does not compile its own ones by themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Net(nn.Module):
    """A body whose output is overwritten in place, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module = Body(WIDTH, 5)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.act(self.body(x)))


_seeds = itertools.count(1)


def batch(size: int = BATCH) -> torch.Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(next(_seeds)))


def run(tracer: ClassificationTracer, epoch: int = 0, size: int = BATCH) -> tuple[torch.Tensor, Any]:
    inputs = batch(size)
    return inputs, tracer(inputs, None, list(range(size)), n_epoch=epoch)


def stored(tracer: ClassificationTracer, epoch: int = 0) -> dict[str, Any]:
    tracer.flush()
    return open_trace("net", tracer._version_name).tensors("extracted_feature", n_epoch=epoch)


def expect_recorded(
    tracer: ClassificationTracer, layer: nn.Module, sizes: list[int], columns: list[str]
) -> None:
    """Run the tracer, and compare what it stores with the layer in eager mode."""
    for epoch, size in enumerate(sizes):
        inputs, output = run(tracer, epoch, size)
        found = stored(tracer, epoch)
        with torch.no_grad():
            torch.testing.assert_close(found["body"], layer(inputs))
        assert torch.equal(found["logits"], output)
        assert list(found) == ["row_id", "input_id", "dataset_type", "n_epoch", *columns, "logits"]
    assert tracer.stats().rows_submitted == sum(sizes)
    assert not counters["graph_break"]


def compile_it(model: nn.Module, how: str, backend: str) -> nn.Module:
    if how == "in whole":
        return torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[no-any-return]
    module = model if how == "in place" else model.body
    module.compile(backend=backend, fullgraph=True)
    return model
