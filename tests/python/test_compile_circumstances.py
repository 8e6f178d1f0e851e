"""Compiled models and what is around them: closed tracers, threads, DDP, export, copies, compiled steps."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from compile_support import BATCH, WIDTH, Net, batch, compile_it, run, stored
from ml_debugger import _core
from ml_debugger.errors import AliasNotCapturedError, InvalidInputError
from ml_debugger.tracer import compiled

# The compiler itself looks at the gradients of what one graph hands to the next.
pytestmark = [
    pytest.mark.usefixtures("inductor_cache", "no_compiled_code"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


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
