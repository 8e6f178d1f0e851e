"""Whatever a layer returns, and however its samples lie in it: the column is what the path says."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, load_export, open_trace
from ml_debugger.errors import InvalidInputError
from ml_debugger.training import ClassificationTracer

BATCH = 4
A, B, C = (torch.arange(BATCH * width, dtype=torch.float32).reshape(BATCH, width) for width in (2, 3, 5))
STATE = torch.zeros(7, 9)  # no batch size anywhere

pytestmark = pytest.mark.usefixtures("data_dir")


class Layer(nn.Module):
    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x)


class Net(nn.Module):
    """A layer whose output is what ``make`` says, and a head that does not use it."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = Layer(make)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.layer(x)
        return self.head(x)


@pytest.fixture
def trace() -> Iterator[Callable[..., ClassificationTracer]]:
    """Makes tracers of the trace ("net", "v1") and closes them."""
    made = []

    def factory(model: nn.Module, layers: Mapping[str, str], **options: Any) -> ClassificationTracer:
        config = TracerConfig(durability="process", **options)
        made.append(ClassificationTracer(model, "net", "v1", layers, config=config))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def stored(tracer: ClassificationTracer, column: str) -> Any:
    tracer.flush()
    return open_trace("net", "v1").tensors("extracted_feature")[column]


def ids(count: int = BATCH, first: int = 0) -> list[str]:
    return [f"s{number}" for number in range(first, first + count)]


class Pair(NamedTuple):
    state: torch.Tensor
    values: Any


@dataclass
class Report:
    state: torch.Tensor
    values: Any = None
    unset: torch.Tensor | None = None


@dataclass(frozen=True)
class Slotted:
    __slots__ = ("state", "values")
    state: torch.Tensor
    values: Any


class Output(OrderedDict[str, Any]):
    """Like ``ModelOutput`` of transformers: a dataclass, and a mapping of what is not None."""

    def __init_subclass__(cls) -> None:
        dataclass(cls)

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Encoded(Output):
    state: Any = None
    last_hidden_state: Any = None
    hidden_states: Any = None


def encoded() -> Encoded:
    return Encoded(None, A, (STATE, B, C))


# path, output, expected
OUTPUTS: dict[str, tuple[str, Any, torch.Tensor]] = {
    "tensor": ("layer", A, A),
    "tuple": ("layer", (STATE, B), B),
    "list": ("layer", [STATE, [STATE, (C,)]], C),
    "mapping": ("layer", {"state": STATE, "values": C}, C),
    "mapping of another class": ("layer", UserDict(state=STATE, values=C), C),
    "dataclass": ("layer", Report(STATE, [B]), B),
    "dataclass with slots": ("layer", Slotted(STATE, B), B),
    "named tuple": ("layer", Pair(STATE, B), B),
    "model output": ("layer", encoded(), A),
    "None before it": ("layer", (None, 3, "text", A), A),
    "[0]": ("layer[0]", (A, B), A),
    "[1]": ("layer[1]", (A, B), B),
    "[-1]": ("layer[-1]", [A, B, C], C),
    '["key"]': ('layer["values"]', {"other": A, "values": B}, B),
    "['key']": ("layer['values']", {"other": A, "values": B}, B),
    "key with a dot": ('layer["a.b"]', {"a.b": B, "a": A}, B),
    "key with brackets": ('layer["[0]"]', {"[0]": B, "a": A}, B),
    "key with a quote": (r'layer["say \"hi\""]', {'say "hi"': B}, B),
    "integer key": ("layer[7]", {0: A, 7: B}, B),
    "position in a mapping": ("layer[1]", {"a": A, "b": B}, B),
    "dataclass field": ('layer["values"]', Report(A, B), B),
    "position in a dataclass": ("layer[1]", Report(A, B), B),
    "named tuple field": ('layer["values"]', Pair(A, B), B),
    "attribute": ('layer["values"]', SimpleNamespace(values=B), B),
    "model output key": ('layer["last_hidden_state"]', encoded(), A),
    "model output number": ("layer[0]", encoded(), A),
    "nested": ('layer["values"][1]["deep"]', Report(A, [A, {"deep": C}]), C),
    "nested model output": ('layer["hidden_states"][-1]', encoded(), C),
    "a pick of a nest": ("layer[1]", (A, [STATE, {"x": B}]), B),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_path_or_the_first_tensor_with_the_batch_size_says_what_is_stored(form: str, trace: Any) -> None:
    path, output, expected = OUTPUTS[form]
    tracer = trace(Net(lambda x: output), {"tap": path})
    tracer(torch.zeros(BATCH, 4), None, ids())
    assert tracer.model.seen is output
    assert torch.equal(stored(tracer, "tap"), expected)


def test_outputs_of_transformers_are_mappings_and_dataclasses(trace: Any) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model_output = outputs.BaseModelOutput(last_hidden_state=A, hidden_states=(B, C))
    layers = {"first": "layer", "key": 'layer["last_hidden_state"]', "last": 'layer["hidden_states"][-1]'}
    tracer = trace(Net(lambda x: model_output), layers)
    tracer(torch.zeros(BATCH, 4), None, ids())
    for alias, expected in {"first": A, "key": A, "last": C}.items():
        assert torch.equal(stored(tracer, alias), expected)


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("layer[2]", (A, B)),
        ("layer[-3]", [A, B]),
        ('layer["nope"]', {"values": A}),
        ('layer["nope"]', Report(A)),
        ('layer["nope"]', encoded()),
        ("layer[0]", A),
        ('layer["shape"]', A),
        ('layer["values"][0]', Report(A, B)),
        ('layer["unset"]', Report(A)),
        ("layer[0]", None),
    ],
)
def test_a_path_that_does_not_fit_the_output_is_refused_and_nothing_is_stored(
    path: str, output: Any, trace: Any
) -> None:
    tracer = trace(Net(lambda x: output), {"tap": path})
    with pytest.raises(InvalidInputError, match="'tap'"):
        tracer(torch.zeros(BATCH, 4), None, ids())
    assert tracer.stats().rows_submitted == 0


@pytest.mark.parametrize(
    "output", [(A, B), [STATE, A], {"x": STATE, "logits": A}, Report(STATE, A), Pair(STATE, A), encoded()]
)
def test_logits_are_found_in_every_form_of_the_models_output(output: Any, trace: Any) -> None:
    tracer = trace(Layer(lambda x: output), {})
    assert tracer(torch.zeros(BATCH, 4), None, ids()) is output
    assert torch.equal(stored(tracer, "logits"), A)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.layer = kind(3, 6, num_layers=2, batch_first=batch_first)
        self.head = nn.Linear(6, 3)
        self.batch_first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # samples first
        self.out, self.state = self.layer(x if self.batch_first else x.transpose(0, 1))
        return self.head(self.out[:, -1] if self.batch_first else self.out[-1])


@pytest.mark.parametrize("steps", [1, BATCH, 6], ids=["T=1", "T=B", "T=6"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_a_recurrent_layer_gives_its_outputs_and_states_samples_first(
    kind: type[nn.RNNBase], batch_first: bool, steps: int, trace: Any
) -> None:
    model = Recurrent(kind, batch_first)
    state = "layer[1][0]" if kind is nn.LSTM else "layer[1]"
    dims = {"state": 1} if batch_first else {"out": 1, "state": 1}
    tracer = trace(model, {"out": "layer[0]", "state": state}, batch_dim=dims)
    tracer(torch.randn(BATCH, steps, 3), None, ids())
    out = model.out if batch_first else model.out.transpose(0, 1)
    hidden = model.state[0] if kind is nn.LSTM else model.state
    assert torch.equal(stored(tracer, "out"), out)
    assert torch.equal(stored(tracer, "state"), hidden.transpose(0, 1))


def test_sequence_first_without_batch_dim_is_refused_unless_the_sequence_is_as_long_as_the_batch(
    trace: Any,
) -> None:
    model = Recurrent(nn.GRU, batch_first=False)
    tracer = trace(model, {"out": "layer[0]"})
    with pytest.raises(InvalidInputError, match=r"'out'.*\(6, 4, 6\)") as caught:
        tracer(torch.randn(BATCH, 6, 3), None, ids())
    assert "batch_dim" in caught.value.hint
    tracer(torch.randn(BATCH, BATCH, 3), None, ids())  # T == B: cannot be seen, as the documentation says
    assert torch.equal(stored(tracer, "out"), model.out)
    assert "T == B" in str(TracerConfig.__doc__)


@pytest.mark.parametrize("dimension", [-1, 2, -2, 1])
def test_batch_dim_counts_from_either_end(dimension: int, trace: Any) -> None:
    shape = [3, 5, 2]
    shape[dimension] = BATCH
    values = torch.randn(shape)
    tracer = trace(Net(lambda x: (STATE, values)), {"tap": "layer"}, batch_dim={"tap": dimension})
    tracer(torch.zeros(BATCH, 4), None, ids())
    assert torch.equal(stored(tracer, "tap"), values.movedim(dimension, 0))


def test_batch_dim_of_the_logits(trace: Any) -> None:
    values = torch.randn(3, BATCH)
    tracer = trace(Layer(lambda x: values), {}, batch_dim={"logits": 1})
    tracer(torch.zeros(BATCH, 4), None, ids())
    assert torch.equal(stored(tracer, "logits"), values.T)


@pytest.mark.parametrize("sizes", [(8, 8, 3), (1, 1, 1), (1, 5, 1), (8192,), (8192, 1)], ids=str)
def test_batches_of_any_and_changing_size(sizes: tuple[int, ...], trace: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    tracer = trace(model, {"hidden": "0", "again": "1"})
    expected, given = [], []
    for call, size in enumerate(sizes):
        x = torch.randn(size, 4)
        with torch.no_grad():
            expected.append(model[0](x).clone())
        given += ids(size, 10_000 * call)
        tracer(x, torch.zeros(size), given[-size:], n_epoch=0)
    tracer.flush()
    columns = open_trace("net", "v1").tensors("extracted_feature", n_epoch=0)
    assert list(columns["input_id"]) == given
    assert torch.equal(columns["hidden"], torch.cat(expected))
    assert torch.equal(columns["again"], torch.cat(expected).relu())
    assert open_trace("net", "v1").num_rows("ground_truth") == sum(sizes)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).mean(1))


def test_sequences_of_another_length_in_each_call_are_rows_of_shapes_of_their_own(
    trace: Any, tmp_path: Any
) -> None:
    model = Tokens()
    tracer = trace(model, {"tokens": "embed"})
    lengths = (7, 3, 7, 1)
    expected = []
    for call, length in enumerate(lengths):
        tokens = torch.randint(0, 10, (BATCH, length))
        tracer(tokens, None, ids(BATCH, BATCH * call), n_epoch=call % 2)
        expected += list(model.embed(tokens).detach())
    by_id = dict(zip(ids(BATCH * len(lengths)), expected, strict=True))
    tracer.flush()
    for source in (open_trace("net", "v1"), load_export(tracer.export(tmp_path / "net.zip"))):
        tensors, arrays = source.tensors("extracted_feature"), source.arrays("extracted_feature")
        assert isinstance(tensors["tokens"], list)
        assert arrays["tokens"].dtype == object
        assert sorted(tensors["input_id"]) == sorted(by_id)
        for input_id, tensor, array in zip(
            tensors["input_id"], tensors["tokens"], arrays["tokens"], strict=True
        ):
            assert torch.equal(tensor, by_id[input_id])
            assert np.array_equal(array, by_id[input_id].numpy())
        assert tensors["logits"].shape == (BATCH * len(lengths), 3)
    long = open_trace("net", "v1").tensors("extracted_feature", n_epoch=0)["tokens"]
    assert long.shape == (2 * BATCH, 7, 5)
