"""Models under torch.compile: one record a run without a graph break, whenever the tracer was made.

Most tests use aot_eager: it traces as inductor does and builds no C++. Compiled runs are compared with eager
ones within rounding; what a compiled run returned is compared bit for bit with what it stored.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from ml_debugger import TracerConfig, _core, open_trace
from ml_debugger.errors import AliasNotCapturedError, InvalidInputError
from ml_debugger.tracer import compiled
from ml_debugger.training import ClassificationTracer

BATCH, WIDTH = 6, 8
BACKENDS = ["eager", "aot_eager", "inductor"]

# The compiler itself looks at the gradients of what one graph hands to the next.
pytestmark = [
    pytest.mark.usefixtures("inductor_cache"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


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


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make(data_dir: Path) -> Iterator[Any]:
    """Makes tracers, each of a version of its own, and closes them."""
    made: list[ClassificationTracer] = []

    def factory(model: nn.Module, target_layers: Any, **options: Any) -> ClassificationTracer:
        config = TracerConfig(**options)
        made.append(ClassificationTracer(model, "net", f"v{len(made)}", target_layers, config=config))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


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


def test_a_closed_tracer_leaves_nothing_in_compiled_code(make: Any) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    before = torch._dynamo.config.skip_nnmodule_hook_guards, torch._dynamo.config.optimize_ddp
    wrapped = torch.compile(Net(), backend=backend, fullgraph=True)
    wrapped(batch())
    tracer = make(wrapped, {"body": "body"})
    run(tracer)
    tracer.close()
    for _ in range(2):
        wrapped(batch())
    untraced, traced, again = graphs
    assert "ml_debugger.capture" in traced
    assert again == untraced
    assert (torch._dynamo.config.skip_nnmodule_hook_guards, torch._dynamo.config.optimize_ddp) == before
    assert tracer.stats().rows_submitted == BATCH


def test_a_graph_that_outlives_its_tracer_records_nothing(make: Any) -> None:
    model = Net()
    old = make(model, {"body": "body"})
    number = next(iter(model.body._forward_hooks.values())).number
    old.close()

    class Stale(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.ops.ml_debugger.capture([x], number)
            return super().forward(x)

    tracer = make(Stale(), {"body": "body"}, repeat="all")
    run(tracer)
    assert list(stored(tracer))[4:] == ["body", "logits"]
    assert next(iter(tracer._model.body._forward_hooks.values())).number != number


def test_outside_of_a_traced_call_compiled_code_records_nothing(make: Any) -> None:
    wrapped = compile_it(Net(), "in whole", "aot_eager")
    tracer = make(wrapped, {"body": "body"}, repeat="all")
    wrapped(batch())
    run(tracer)
    wrapped(batch())
    assert tracer.stats().rows_submitted == BATCH


def test_a_layer_that_compiled_code_goes_around_is_an_error_that_names_it(make: Any) -> None:
    class Around(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.body.forward(x))

    tracer = make(compile_it(Around(), "in whole", "aot_eager"), {"hidden": "body"})
    with pytest.raises(AliasNotCapturedError, match="'hidden'"):
        run(tracer)
    assert tracer.stats().rows_submitted == 0


def test_an_error_of_the_hook_comes_through_compiled_code_unchanged(make: Any) -> None:
    tracer = make(compile_it(Net(), "in whole", "inductor"), {"hidden": "body"})
    with pytest.raises(InvalidInputError, match=r"'hidden'.*expected 2 samples"):
        tracer(batch(), None, [1, 2])
    run(tracer)
    assert tracer.stats().rows_submitted == BATCH


def test_threads_share_compiled_code_and_each_records_its_own_calls(make: Any) -> None:
    model = Net()
    tracer = make(compile_it(model, "in whole", "aot_eager"), {"body": "body"}, repeat="all")
    inputs = [batch() for _ in range(3)]
    failures: list[BaseException] = []

    def work(epoch: int) -> None:
        try:
            for _ in range(5):
                tracer(inputs[epoch], None, list(range(BATCH)), n_epoch=epoch)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(epoch,)) for epoch in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for epoch in range(3):
        expected = model.body(inputs[epoch]).detach().repeat(5, 1)
        torch.testing.assert_close(stored(tracer, epoch)["body"], expected)


def test_a_ddp_model_with_several_buckets_is_recorded(make: Any, tmp_path: Path) -> None:
    """Torch's own optimizer for such models fails on graphs with effects; see compiled.CompilerSettings."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(600, 600) for _ in range(6))
            self.fc = nn.Linear(600, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return self.fc(x)

    model = Deep()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=2)
        layers = {"1": "layers.1", "3": "layers.3", "5": "layers.5"}
        tracer = make(torch.compile(wrapped, backend="aot_eager"), layers, repeat="all")
        inputs = torch.randn(BATCH, 600)
        for epoch in range(2):
            tracer(inputs, None, list(range(BATCH)), n_epoch=epoch).sum().backward()
        first = model.layers[1](model.layers[0](inputs).relu())
        torch.testing.assert_close(stored(tracer, 1)["1"], first.detach())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_of_a_traced_model_is_free_of_us(strict: bool, make: Any) -> None:
    model = Net()
    tracer = make(model, {"body": "body"})
    program = torch.export.export(model, (batch(),), strict=strict)
    assert "ml_debugger" not in str(program.graph)
    inputs = batch()
    torch.testing.assert_close(program.module()(inputs), model(inputs))
    run(tracer)
    assert tracer.stats().rows_submitted == BATCH


def test_scripting_a_traced_model_says_what_to_do(make: Any) -> None:
    model = Net()
    tracer = make(model, {"hidden": "body"})
    with pytest.raises(InvalidInputError, match=r"'hidden'.*script the model before"):
        torch.jit.script(model)
    run(tracer)
    tracer.close()
    torch.jit.script(model)
    assert tracer.stats().rows_submitted == BATCH


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_traced_model_compiles_and_records_nothing(copied: Any, make: Any) -> None:
    model = Net()
    tracer = make(model, {"body": "body"}, repeat="all")
    twin = compile_it(copied(model), "in whole", "aot_eager")
    inputs = batch()
    torch.testing.assert_close(twin(inputs), model(inputs))
    assert not counters["graph_break"]
    run(tracer)
    assert list(stored(tracer))[4:] == ["body", "logits"]


def test_where_the_compiler_runs_a_layer_as_it_is_written_it_does_not_read_ours(make: Any) -> None:
    """Around a recurrent layer it compiled what our hooks call, in seven more graphs, with warnings."""

    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.LSTM(WIDTH, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.act(self.body(x[:, None])[0][:, 0]))

    found = []
    for traced in (False, True):
        model = Recurrent()
        wrapped = torch.compile(model, backend="eager")
        if traced:
            tracer = make(wrapped, {"body": "body"}, repeat="all")
            inputs, _ = run(tracer)
            assert torch.equal(stored(tracer)["body"], model.body(inputs[:, None])[0].detach())
        else:
            wrapped(batch())
        found.append((counters["stats"]["unique_graphs"], dict(counters["graph_break"])))
        torch._dynamo.reset()
        counters.clear()
    assert found[0] == found[1]


class Step:
    """A training step that calls a tracer, as a function to be compiled."""

    def __init__(self, model: nn.Module, call: Any) -> None:
        self.call, self.optimizer = call, torch.optim.SGD(model.parameters(), lr=0.1)

    def __call__(
        self, inputs: torch.Tensor, labels: torch.Tensor, ids: list[int], epoch: int
    ) -> torch.Tensor:
        logits = self.call(inputs * 1, labels, ids, "train", epoch)
        loss = nn.functional.cross_entropy(logits, labels) + 1
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss * 2


@pytest.mark.parametrize("how", ["plain", "in whole", "in place"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tracer_may_be_called_within_a_compiled_training_step(how: str, backend: str, make: Any) -> None:
    """It was read by the compiler, which warned of our functions or failed in them."""
    parameters, losses = [], []
    for traced in (True, False):
        torch.manual_seed(1)
        model = Net()
        wrapped = model if how == "plain" else compile_it(model, how, backend)
        tracer = make(wrapped, {"body": "body"}, repeat="all") if traced else None
        step = Step(
            model, tracer or torch.compiler.disable(lambda inputs, *_, wrapped=wrapped: wrapped(inputs))
        )
        run_step = torch.compile(step.__call__, backend=backend)
        for epoch in range(3):
            inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(epoch))
            with torch.no_grad():
                expected = model.body(inputs)
            losses.append(run_step(inputs, torch.arange(BATCH) % 3, list(range(BATCH)), epoch))
            if tracer is not None:
                torch.testing.assert_close(stored(tracer, epoch)["body"], expected)
        parameters.append(list(model.parameters()))
        if tracer is not None:
            assert tracer.stats().rows_submitted == 3 * BATCH
            assert not [text for text in counters["graph_break"] if "ml_debugger._core" in text]
        counters.clear()
    assert all(map(torch.equal, *parameters))
    assert torch.equal(torch.stack(losses[:3]), torch.stack(losses[3:]))


def test_with_fullgraph_a_compiled_step_with_a_tracer_says_what_to_do(make: Any) -> None:
    model = Net()
    tracer = make(model, {"body": "body"})
    step = torch.compile(lambda x: tracer(x, None, [1, 2]) * 2, backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="compile the model, and call its tracer in plain"
    ):
        step(batch(2))
    assert tracer.stats().rows_submitted == 0


def test_the_operator_is_ordered_and_kept_out_of_cuda_graphs() -> None:
    from torch._higher_order_ops.effects import has_effects

    operator = torch.ops.ml_debugger.capture.default
    arguments = [operator, (), {}][
        : len(inspect.signature(has_effects).parameters)
    ]  # fewer in newer versions
    assert has_effects(*arguments)
    assert torch.Tag.cudagraph_unsafe in operator.tags


def test_eager_mode_does_not_take_the_compilers_way(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "pick", None)
    model = Net()
    tracer = make(model, {"body": "body"})
    hook = next(iter(model.body._forward_hooks.values()))
    assert type(hook) is _core.CaptureHook
    assert type(hook).__call__ is compiled._traced_call
    run(tracer)
    assert tracer.stats().rows_submitted == BATCH
    assert not counters["stats"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_of_cuda_graphs_record_every_call(make: Any) -> None:
    model = Net().cuda()
    tracer = make(
        torch.compile(model, mode="reduce-overhead", fullgraph=True), {"body": "body"}, repeat="all"
    )
    for epoch in range(6):
        inputs = batch().cuda()
        output = tracer(inputs, None, list(range(BATCH)), n_epoch=epoch).clone()
        torch.testing.assert_close(stored(tracer, epoch)["body"], model.body(inputs).detach().cpu())
        assert torch.equal(stored(tracer, epoch)["logits"], output.cpu())
