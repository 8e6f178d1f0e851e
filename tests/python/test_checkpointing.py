"""Activation checkpointing: layers run again in backward, and that is not recorded again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

BATCH, WIDTH = 4, 6
IDS = list(range(BATCH))

pytestmark = [
    # Of reentrant checkpointing, when the inputs of the model need no gradient.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
    # The compiler itself looks at the gradients of what one graph hands to the next.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Count(nn.Module):
    """Counts its runs, and raises in the run after ``limit``."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.runs += 1
            if self.runs > self.limit:
                raise RuntimeError("out of memory, say")
        return x


class Net(nn.Module):
    """A stem, a checkpointed block, a head.

    Args:
        reentrant: Which of torch's two implementations.
        penalty: Add the norm of the input's gradient to the logits: backward runs inside of the forward.
        limit: How often the block may run.
    """

    def __init__(self, reentrant: bool, penalty: bool = False, limit: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), Count(limit), nn.ReLU())
        self.head = nn.Linear(WIDTH, 3)
        self.reentrant, self.penalty = reentrant, penalty

    @property
    def runs(self) -> int:
        return int(self.block[1].runs)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.penalty:
            return self.plain(x)
        x = x.detach().requires_grad_()
        logits = self.plain(x)
        if self.reentrant:  # which autograd.grad() refuses
            logits.sum().backward(retain_graph=True)
            return logits + x.grad.norm(dim=1, keepdim=True)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return logits + gradient.norm(dim=1, keepdim=True)


@pytest.fixture
def make(data_dir: Path) -> Iterator[Any]:
    """Makes a tracer that records every run of every layer, and closes it."""
    made: list[ClassificationTracer] = []

    def factory(model: nn.Module) -> ClassificationTracer:
        layers = {"stem": "stem", "inner": "block.0", "block": "block", "head": "head"}
        made.append(ClassificationTracer(model, "net", "v1", layers, config=TracerConfig(repeat="all")))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def expect_one_run_of_each_layer(tracer: ClassificationTracer, model: Net, inputs: torch.Tensor) -> None:
    tracer.flush()
    trace = open_trace("net", "v1")
    columns = ["stem", "inner", "block", "head", "logits"]
    assert trace.columns("extracted_feature")[4:] == columns
    last = {name: values[-BATCH:] for name, values in trace.tensors("extracted_feature").items()}
    with torch.no_grad():
        stem = model.stem(inputs)
        torch.testing.assert_close(last["stem"], stem)
        torch.testing.assert_close(last["inner"], model.block[0](stem))
        torch.testing.assert_close(last["block"], model.block(stem))


@pytest.mark.parametrize("penalty", [False, True], ids=["backward after", "backward inside"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_checkpointed_layer_is_recorded_once(reentrant: bool, penalty: bool, make: Any) -> None:
    model = Net(reentrant, penalty)
    tracer = make(model)
    for _ in range(3):
        inputs = torch.randn(BATCH, WIDTH)
        before = model.runs
        output = tracer(inputs, None, IDS)
        output.sum().backward()
        assert model.runs > before + 1  # it really ran again
    assert torch.equal(tracer.get_hooked_features("block"), model.block(model.stem(inputs)))
    expect_one_run_of_each_layer(tracer, model, inputs)
    assert tracer.stats().rows_submitted == 3 * BATCH


@pytest.mark.usefixtures("inductor_cache")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_checkpointed_layer_of_a_compiled_model_is_recorded_once(
    reentrant: bool, backend: str, make: Any
) -> None:
    torch._dynamo.reset()
    model = Net(reentrant)
    tracer = make(torch.compile(model, backend=backend, fullgraph=True))
    for _ in range(2):
        inputs = torch.randn(BATCH, WIDTH)
        tracer(inputs, None, IDS).sum().backward()
    expect_one_run_of_each_layer(tracer, model, inputs)
    assert tracer.stats().rows_submitted == 2 * BATCH
    assert model.block[0].weight.grad is not None


def test_a_recomputation_that_fails_leaves_the_record_alone(make: Any) -> None:
    model = Net(reentrant=False, limit=1)
    tracer = make(model)
    inputs = torch.randn(BATCH, WIDTH)
    output = tracer(inputs, None, IDS)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        output.sum().backward()
    model.block[1].limit = 1000
    expect_one_run_of_each_layer(tracer, model, inputs)


def test_a_recomputation_inside_of_another_call_is_not_taken_for_that_call(make: Any) -> None:
    class Late(Net):
        """Runs the backward of the output before, in the middle of its forward."""

        waiting: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.waiting is not None:
                self.waiting.sum().backward()
            return super().forward(x)

    model = Late(reentrant=False)
    tracer = make(model)
    for _ in range(3):
        inputs = torch.randn(BATCH, WIDTH)
        model.waiting = tracer(inputs, None, IDS)
    expect_one_run_of_each_layer(tracer, model, inputs)
