"""Calls from several threads, through generators, in gradient modes, and calls that end early anywhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import AliasNotCapturedError, InvalidInputError
from ml_debugger.training import ClassificationTracer

BATCH, WIDTH = 4, 6
IDS = list(range(BATCH))
LAYERS = {"body": "body", "act": "act"}

pytestmark = pytest.mark.usefixtures("data_dir")


class Net(nn.Module):
    """Calls ``between`` with the name of each point that its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(WIDTH, 3)
        self.between: Callable[[str], None] = lambda point: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.between("before")
        x = self.body(x)
        self.between("after the first layer")
        x = self.act(x)
        self.between("after the last layer")
        return self.fc(x)


@pytest.fixture
def make() -> Iterator[Callable[..., ClassificationTracer]]:
    """Makes tracers and closes them."""
    made: list[ClassificationTracer] = []

    def factory(
        model: nn.Module, version: str = "v1", cls: Any = ClassificationTracer, layers: Any = LAYERS
    ) -> ClassificationTracer:
        made.append(cls(model, "net", version, layers, config=TracerConfig(durability="process")))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def stored(tracer: ClassificationTracer, version: str = "v1") -> dict[str, Any]:
    tracer.flush()
    return open_trace("net", version).tensors("extracted_feature")


def expect(found: dict[str, Any], model: Net, inputs: torch.Tensor) -> None:
    """What is stored is what the layers make of these inputs, row by row."""
    with torch.no_grad():
        body = model.body(inputs)
        assert torch.equal(found["body"], body)
        assert torch.equal(found["act"], body.relu())
        assert torch.equal(found["logits"], model.fc(body.relu()))


# Threads


def test_threads_call_two_tracers_of_one_model_and_every_row_is_its_own(make: Any) -> None:
    model, calls, threads = Net(), 25, 4
    tracers = [make(model, f"v{number}") for number in range(2)]
    inputs = torch.randn(threads, calls, BATCH, WIDTH)
    failures: list[BaseException] = []
    start = threading.Barrier(threads)

    def work(thread: int) -> None:
        try:
            start.wait()
            for call in range(calls):
                tracer = tracers[(thread + call) % 2]
                ids = [f"{thread}-{call}-{row}" for row in range(BATCH)]
                tracer(inputs[thread, call], None, ids, n_epoch=call % 3)
                with torch.no_grad():
                    assert torch.equal(tracer.get_hooked_features("body"), model.body(inputs[thread, call]))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    ids = []
    for number, tracer in enumerate(tracers):
        found = stored(tracer, f"v{number}")
        ids += found["input_id"]
        where = [tuple(map(int, text.split("-"))) for text in found["input_id"]]
        assert all((thread + call) % 2 == number for thread, call, _ in where)
        # A product of one row rounds otherwise than one of four: row by row of whole calls.
        body = {(t, c): model.body(inputs[t, c]).detach() for t, c, _ in where}
        assert torch.equal(found["body"], torch.stack([body[t, c][row] for t, c, row in where]))
        assert torch.equal(found["act"], torch.stack([body[t, c][row].relu() for t, c, row in where]))
    assert len(set(ids)) == len(ids) == threads * calls * BATCH


def test_a_call_that_fails_in_one_thread_leaves_that_of_another_alone(make: Any) -> None:
    model, inside, failed = Net(), threading.Event(), threading.Event()
    tracer = make(model)
    inputs = torch.randn(2, BATCH, WIDTH)

    def between(point: str) -> None:
        if point != "after the first layer":
            return
        if threading.current_thread() is threading.main_thread():
            assert inside.wait(30)
            raise LookupError("the user's own")
        inside.set()
        assert failed.wait(30)

    model.between = between
    other = threading.Thread(target=tracer, args=(inputs[1], None, IDS))
    other.start()
    with pytest.raises(LookupError):
        tracer(inputs[0], None, IDS)
    failed.set()
    other.join()
    expect(stored(tracer), model, inputs[1])


# Generators


def test_layers_that_a_generator_runs_within_the_forward_are_recorded(make: Any) -> None:
    class Lazy(Net):
        def steps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            for layer in (self.body, self.act, self.fc):
                x = layer(x)
                yield x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            *_, last = self.steps(x)
            return last

    model, x = Lazy(), torch.randn(BATCH, WIDTH)
    tracer = make(model)
    tracer(x, None, IDS)
    expect(stored(tracer), model, x)


def test_a_layer_that_returns_a_generator_is_refused_and_nobody_consumes_it(make: Any) -> None:
    class Chunks(nn.Module):
        def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            return (part for part in x.unbind(1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = Chunks(), nn.Linear(WIDTH, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.stack(list(self.body(x)), 1))

    model, x = Model(), torch.randn(BATCH, WIDTH)
    tracer = make(model, layers={"chunks": "body"})
    with pytest.raises(InvalidInputError, match=r"'chunks'.*generator"):
        tracer(x, None, IDS)
    assert tracer.stats().rows_submitted == 0
    beside = make(model, "beside", layers={"fc": "fc"})
    assert torch.equal(beside(x, None, IDS), model.fc(x))


def test_a_forward_that_is_a_generator_has_run_nothing_when_the_call_ends(make: Any) -> None:
    class Streaming(Net):
        def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            yield super().forward(x)

    model, x = Streaming(), torch.randn(BATCH, WIDTH)
    tracer = make(model)
    with pytest.raises((InvalidInputError, AliasNotCapturedError), match=r"generator|'body'"):
        tracer(x, None, IDS)
    assert tracer.stats().rows_submitted == 0
    assert next(model(x)).shape == (BATCH, 3)


# Calls that end early

POINTS = ["before", "after the first layer", "after the last layer", "in a layer", "in a hook", "parsing"]
KINDS = [LookupError, KeyboardInterrupt, SystemExit, GeneratorExit]


class Parsing(ClassificationTracer):
    """Raises ``error`` after everything was captured."""

    error: BaseException | None = None

    def _parse_and_save_io_data(self, *values: Any, **keywords: Any) -> None:
        super()._parse_and_save_io_data(*values, **keywords)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", POINTS)
def test_an_exception_at_any_point_comes_through_and_only_that_call_is_not_stored(
    point: str, kind: type[BaseException], make: Any
) -> None:
    model, x, error = Net(), torch.randn(3, BATCH, WIDTH), kind("the user's own")
    tracer = make(model, cls=Parsing)

    def fail(*values: Any) -> None:
        if values[0] == point or point.startswith("in a"):
            raise error

    tracer(x[0], None, IDS)
    handles: list[Any] = []
    if point == "in a layer":
        handles.append(model.act.register_forward_pre_hook(fail))
    elif point == "in a hook":
        handles.append(model.act.register_forward_hook(fail))
    elif point == "parsing":
        tracer.error = error
    else:
        model.between = fail
    with pytest.raises(kind) as caught:
        tracer(x[1], None, IDS)
    assert caught.value is error
    with pytest.raises(KeyError):
        tracer.get_hooked_features("body")
    for handle in handles:
        handle.remove()
    model.between, tracer.error = (lambda point: None), None
    tracer(x[2], None, IDS)
    found = stored(tracer)
    for number, inputs in enumerate(x[[0, 2]]):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        expect({name: values[rows] for name, values in found.items()}, model, inputs)
    stats = tracer.stats()
    assert stats.rows_submitted == stats.rows_committed == len(found["logits"]) == 2 * BATCH


# Gradient modes

MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad in no_grad": lambda: _nested(torch.no_grad, torch.enable_grad),
    "grad in inference_mode": lambda: _nested(torch.inference_mode, lambda: torch.inference_mode(False)),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "saved on cpu": torch.autograd.graph.save_on_cpu,
}


@contextlib.contextmanager
def _nested(*managers: Callable[[], Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager())
        yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("layers", [LAYERS, None], ids=["layers", "head"])
@pytest.mark.parametrize("mode", MODES)
def test_a_call_in_a_gradient_mode_records_and_returns_what_the_model_does_there(
    mode: str, layers: Any, make: Any
) -> None:
    model, x = Net(), torch.randn(BATCH, WIDTH)
    tracer = make(model, layers=layers)
    with MODES[mode]():
        output, plain = tracer(x, None, IDS), model(x)
    assert torch.equal(output, plain)
    for flag in ("requires_grad", "is_leaf"):
        assert getattr(output, flag) == getattr(plain, flag)
    assert output.is_inference() == plain.is_inference()
    with torch.no_grad():
        expected = model.body(x)
    found = stored(tracer)
    assert torch.equal(found["features"], expected.relu()) if layers is None else True
    if layers is not None:
        expect(found, model, x)
    tracer(x, None, IDS).sum().backward()  # and the next call trains
    assert model.body.weight.grad is not None
    assert len(stored(tracer)["logits"]) == 2 * BATCH


def test_layers_that_run_with_other_parameters_are_recorded_with_these(make: Any) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.changed = {name: -2 * value.detach() for name, value in self.net.named_parameters()}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(self.net, self.changed, (x,))

    model, x = Functional(), torch.randn(BATCH, WIDTH)
    tracer = make(model, layers={"body": "net.body", "act": "net.act"})
    output = tracer(x, None, IDS)
    other = Net()
    other.load_state_dict(model.changed)
    expect(stored(tracer), other, x)
    assert torch.equal(output, other(x))
