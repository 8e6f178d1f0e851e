"""Models under torch.compile: one record a run without a graph break, whenever the tracer was made.

Most tests use aot_eager: it traces as inductor does and builds no C++. Compiled runs are compared with eager
ones within rounding; what a compiled run returned is compared bit for bit with what it stored.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from compile_support import BACKENDS, BATCH, WIDTH, Net, batch, compile_it, expect_recorded, run, stored

# The compiler itself looks at the gradients of what one graph hands to the next.
pytestmark = [
    pytest.mark.usefixtures("inductor_cache", "no_compiled_code"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@dataclasses.dataclass
class Parts:
    summary: torch.Tensor
    hidden: torch.Tensor


class Returning(nn.Module):
    """A net whose body returns a container that holds a tensor without the batch size in front."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.body = Wrapping(wrap)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.body(x)
        if isinstance(output, Parts):
            return self.fc(output.hidden)
        return self.fc(output["hidden"] if isinstance(output, dict) else output[1])


class Wrapping(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.linear(x)
        return self.wrap(hidden.sum(0), hidden)


@pytest.mark.parametrize("how", ["in whole", "in place", "submodule"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_is_recorded_once_without_a_graph_break(how: str, backend: str, make: Any) -> None:
    model = Net()
    tracer = make(compile_it(model, how, backend), {"body": "body"}, repeat="all")
    expect_recorded(tracer, model.body, [BATCH, 4], ["body"])
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("how", ["in place", "submodule"])
def test_a_tracer_made_before_compilation_records(how: str, make: Any) -> None:
    model = Net()
    tracer = make(model, {"body": "body"}, repeat="all")
    run(tracer, 7)
    compile_it(model, how, "aot_eager")
    for epoch in range(2):
        inputs, output = run(tracer, epoch)
        torch.testing.assert_close(stored(tracer, epoch)["body"], model.body(inputs).detach())
        assert torch.equal(stored(tracer, epoch)["logits"], output)
    assert counters["stats"]["unique_graphs"] > 0
    assert tracer.stats().rows_submitted == 3 * BATCH


@pytest.mark.parametrize("how", ["in whole", "in place", "submodule"])
def test_a_tracer_made_after_the_first_compiled_call_records(how: str, make: Any) -> None:
    model = Net()
    wrapped = compile_it(model, how, "aot_eager")
    wrapped(batch())
    wrapped(batch(4))
    expect_recorded(make(wrapped, {"body": "body"}, repeat="all"), model.body, [BATCH, 4, 1], ["body"])


def test_another_tracer_may_follow_a_closed_one(make: Any) -> None:
    model = Net()
    wrapped = compile_it(model, "in whole", "aot_eager")
    for _ in range(3):
        tracer = make(wrapped, {"body": "body"}, repeat="all")
        expect_recorded(tracer, model.body, [BATCH, 4], ["body"])
        tracer.close()


def test_the_model_itself_can_be_the_layer(make: Any) -> None:
    wrapped = compile_it(Net(), "in whole", "aot_eager")
    for layers in ({"all": ""}, {"all": "_orig_mod"}):
        tracer = make(wrapped, layers, repeat="all")
        _, output = run(tracer)
        assert torch.equal(stored(tracer)["all"], output)


def test_dynamic_shapes_are_recorded_with_one_graph(make: Any) -> None:
    model = Net()
    wrapped = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    tracer = make(wrapped, {"body": "body"}, repeat="all")
    expect_recorded(tracer, model.body, [BATCH, 4, 9, 3, 12], ["body"])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("first", ["hooked", "unhooked"])
def test_an_unhooked_twin_of_the_same_class_does_not_take_over(first: str, make: Any) -> None:
    model, twin = Net(), Net()
    wrapped, other = (compile_it(net, "in whole", "aot_eager") for net in (model, twin))
    tracer = make(wrapped, {"body": "body"}, repeat="all")
    if first == "unhooked":
        other(batch())
    for epoch in range(4):
        inputs, _ = run(tracer, epoch)
        torch.testing.assert_close(stored(tracer, epoch)["body"], model.body(inputs).detach())
        other(batch())
    assert counters["stats"]["unique_graphs"] == 2


def test_of_several_compiled_blocks_of_one_class_only_the_hooked_one_records(make: Any) -> None:
    class Block(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self[1](self[0](x))

    model = nn.Sequential(*(Block(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(3)))
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    tracer = make(model, {"middle": "1.0"}, repeat="all")
    for epoch in range(3):
        inputs, output = run(tracer, epoch)
        with torch.no_grad():
            torch.testing.assert_close(stored(tracer, epoch)["middle"], model[1][0](model[0](inputs)))
        assert torch.equal(stored(tracer, epoch)["logits"], output)


def test_two_tracers_on_a_compiled_model_record_both(make: Any) -> None:
    model = Net()
    wrapped = compile_it(model, "in whole", "aot_eager")
    first, second = make(wrapped, {"body": "body"}, repeat="all"), make(wrapped, {"body": "body"})
    for tracer in (first, second, first, second):
        run(tracer)
    assert first.stats().rows_submitted == second.stats().rows_submitted == 2 * BATCH
    first.close()
    expect = stored(second, 0)["body"]
    run(second, 1)
    assert len(expect) == 2 * BATCH
    assert len(stored(second, 1)["body"]) == BATCH


def test_a_model_with_graph_breaks_of_its_own_is_recorded(make: Any) -> None:
    class Broken(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            torch._dynamo.graph_break()
            return self.fc(x)

    model = Broken()
    wrapped = torch.compile(model, backend="aot_eager")
    wrapped(batch())
    tracer = make(wrapped, {"body": "body", "fc": "fc"}, repeat="all")
    inputs, output = run(tracer)
    torch.testing.assert_close(stored(tracer)["body"], model.body(inputs).detach())
    assert torch.equal(stored(tracer)["fc"], output)


@pytest.mark.parametrize(
    ("wrap", "picks"),
    [
        (lambda summary, hidden: (summary, hidden), ["", "[1]", "[-1]"]),
        (lambda summary, hidden: {"summary": summary, "hidden": hidden}, ["", '["hidden"]']),
        (Parts, ["", '["hidden"]']),
        (lambda summary, hidden: (summary, hidden, [{"deep": hidden + 1}]), ["[1]", '[2][0]["deep"]']),
    ],
    ids=["tuple", "dict", "dataclass", "nested"],
)
def test_outputs_in_containers_are_picked_in_a_full_graph(wrap: Any, picks: list[str], make: Any) -> None:
    model = Returning(wrap)
    layers = {f"column{number}": f"body{pick}" for number, pick in enumerate(picks)}
    tracer = make(compile_it(model, "in whole", "aot_eager"), layers)
    inputs, _ = run(tracer)
    hidden = model.body.linear(inputs).detach()
    for number, pick in enumerate(picks):
        torch.testing.assert_close(
            stored(tracer)[f"column{number}"], hidden + 1 if "deep" in pick else hidden
        )
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "options",
    [
        {"reduce": {"body": lambda t: t[:, :2] * 2}},
        {"capture_dtype": "bfloat16"},
        {"sample_fraction": 0.5},
        {"batch_dim": {"body": 1}},
    ],
    ids=["reduce", "capture_dtype", "sample_fraction", "batch_dim"],
)
def test_options_do_the_same_as_in_eager_mode(options: dict[str, Any], make: Any) -> None:
    class Turned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(WIDTH, 5), Turn() if "batch_dim" in options else nn.Identity()
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            return self.fc(x.T if "batch_dim" in options else x)

    class Turn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.T

    model = Turned()
    inputs, found = batch(), []
    for wrapped in (model, torch.compile(model, backend="eager", fullgraph=True)):
        tracer = make(wrapped, {"body": "body"}, **options)
        tracer(inputs, None, list(range(BATCH)), n_epoch=0)
        found.append(stored(tracer)["body"])
        assert torch.equal(tracer.get_hooked_features("body"), found[-1])
    assert found[0].dtype == found[1].dtype
    assert torch.equal(*found)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", ["in whole", "in place"])
def test_the_head_of_a_compiled_model_is_found(how: str, make: Any) -> None:
    model = Net()
    wrapped = compile_it(model, how, "aot_eager")
    wrapped(batch())
    tracer = make(wrapped, None)
    for epoch in range(3):
        inputs, output = run(tracer, epoch)
        with torch.no_grad():
            torch.testing.assert_close(stored(tracer, epoch)["features"], model.body(inputs).relu())
        assert torch.equal(stored(tracer, epoch)["logits"], output)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_is_stored_is_what_the_layer_returned_in_that_run(backend: str, make: Any) -> None:
    class Telling(Net):
        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.body(x)
            return self.fc(torch.sigmoid(hidden)), hidden

    model = Telling()
    model.body = nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.LayerNorm(5))
    tracer = make(torch.compile(model, backend=backend, fullgraph=True), {"body": "body"}, repeat="all")
    for epoch in range(2):
        _, (logits, hidden) = run(tracer, epoch)
        assert torch.equal(stored(tracer, epoch)["body"], hidden)
        assert torch.equal(stored(tracer, epoch)["logits"], logits)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_goes_as_without_a_tracer(backend: str, make: Any) -> None:
    """Bit for bit in aot_eager; inductor fuses less around a watched value."""
    plain = Net()
    watched = copy.deepcopy(plain)
    wrapped = [torch.compile(net, backend=backend, fullgraph=True) for net in (plain, watched)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, watched)]
    tracer = make(wrapped[1], {"body": "body", "act": "act"})
    for epoch in range(4):
        inputs = batch()
        state = torch.get_rng_state()
        outputs = [wrapped[0](inputs), tracer(inputs, None, list(range(BATCH)), n_epoch=epoch)]
        assert torch.equal(torch.get_rng_state(), state)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        if backend == "aot_eager":
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs)
