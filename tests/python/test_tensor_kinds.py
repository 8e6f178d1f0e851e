"""Every kind of tensor that a layer may return: stored bit for bit, or refused by alias, cause and remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import checkpoint

from ml_debugger import TracerConfig, _core, open_trace
from ml_debugger.errors import InvalidInputError
from ml_debugger.trace.dtypes import RECORDED_DTYPES
from ml_debugger.tracer.outputs import STORABLE_DTYPES
from ml_debugger.training import ClassificationTracer

BATCH = 4
IDS = list(range(BATCH))

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


@pytest.fixture(autouse=True, params=[True, False], ids=["exchange API", "older torch"])
def way_to_the_bytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways in: that of torch 2.10 and newer, and the one of the versions before."""
    _core._use_exchange_api(request.param)
    yield
    _core._use_exchange_api(True)


@pytest.fixture
def trace() -> Iterator[Callable[..., ClassificationTracer]]:
    """Makes a tracer of ``Net(make)`` that records ``layer`` as ``tap``; closes it."""
    made = []

    def factory(make: Callable[[torch.Tensor], Any], **options: Any) -> ClassificationTracer:
        config = TracerConfig(durability="process", **options)
        made.append(ClassificationTracer(Net(make), "net", "v1", {"tap": "layer"}, config=config))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def stored(tracer: ClassificationTracer, column: str = "tap") -> Any:
    tracer.flush()
    return open_trace("net", "v1").tensors("extracted_feature")[column]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def complex_numbers() -> torch.Tensor:
    return torch.randn(BATCH, 3, dtype=torch.complex64)


class Tagged(torch.Tensor):
    """A subclass with memory of its own and no opinion about functions."""


class Jealous(torch.Tensor):
    """A subclass that lets nobody call a torch function on it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called")


class Boxed(torch.Tensor):
    """A wrapper subclass that stays one whatever is done to it."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Boxed:
        boxed = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        boxed.inner = inner
        return boxed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [argument.inner if isinstance(argument, Boxed) else argument for argument in args]
        return cls(func(*plain, **(kwargs or {})))


def test_the_dtypes_that_are_taken_are_those_that_readers_know() -> None:
    assert {str(dtype).removeprefix("torch.") for dtype in STORABLE_DTYPES} == {
        name for name in RECORDED_DTYPES if hasattr(torch, name)
    }


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("dtype", sorted(STORABLE_DTYPES, key=str), ids=str)
def test_every_dtype_is_stored_with_its_bits(dtype: torch.dtype, fraction: float, trace: Any) -> None:
    values = random_bits(BATCH, 32).fill_(1) if dtype == torch.bool else random_bits(BATCH, 32)
    tracer = trace(lambda x: values.view(dtype), sample_fraction=fraction)
    tracer(torch.zeros(BATCH, 4), None, IDS)
    found = stored(tracer)
    kept = [int(text) for text in stored(tracer, "input_id")]
    assert found.dtype is dtype
    assert bits(found) == bits(values[kept])
    assert (len(kept) == BATCH) == (fraction == 1.0)
    assert kept


VIEWS = {
    "conjugate": lambda x: complex_numbers().conj(),
    "negative": lambda x: complex_numbers().conj().imag,
    "negative of a conjugate slice": lambda x: complex_numbers().conj()[:, 1:].imag,
    "transposed": lambda x: torch.randn(3, BATCH).T,
    "expanded": lambda x: torch.randn(1, 3).expand(BATCH, 3),
    "sliced": lambda x: torch.randn(2 * BATCH, 9)[::2, 1::3],
    "channels last": lambda x: torch.randn(BATCH, 3, 5, 5).to(memory_format=torch.channels_last),
    "overlapping": lambda x: torch.arange(8.0).as_strided((BATCH, 3), (1, 1)),
    "real view": lambda x: torch.view_as_real(complex_numbers()),
    "of no elements": lambda x: torch.zeros(BATCH, 0, 3),
    "scalar a sample": lambda x: torch.randn(BATCH),
    "parameter": lambda x: nn.Parameter(torch.randn(BATCH, 2)),
    "buffer": lambda x: getattr(nn, "Buffer", nn.Parameter)(torch.randn(BATCH, 2)),
    "subclass": lambda x: torch.randn(BATCH, 2).as_subclass(Tagged),
    "jealous subclass": lambda x: torch.randn(BATCH, 2).as_subclass(Jealous),
    "in inference mode": torch.inference_mode()(lambda x: torch.randn(BATCH, 2)),
    "of five dimensions": lambda x: torch.randn(BATCH, 2, 3, 2, 2).transpose(1, 4),
}


@pytest.mark.parametrize("options", [{}, {"sample_fraction": 0.5}], ids=["all", "sampled"])
@pytest.mark.parametrize("kind", VIEWS)
def test_views_and_subclasses_are_stored_as_their_values(
    kind: str, options: dict[str, Any], trace: Any
) -> None:
    tracer = trace(VIEWS[kind], **options)
    tracer(torch.zeros(BATCH, 4), None, IDS)
    with torch._C.DisableTorchFunctionSubclass():
        seen = tracer.model.seen.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()
        expected = seen[[int(text) for text in stored(tracer, "input_id")]]
    found = stored(tracer)
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    assert bits(found) == bits(expected)


def packed(dtype: str) -> Any:
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    return lambda x: random_bits(BATCH, 8).view(getattr(torch, dtype))


# What a layer returns: (how, what the message names, a callable that makes it storable).
REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str, Callable[[Any], torch.Tensor] | None]] = {
    "coo": (lambda x: torch.eye(BATCH).to_sparse(), "sparse_coo", lambda t: t.to_dense()),
    "csr": (lambda x: torch.eye(BATCH).to_sparse_csr(), "sparse_csr", lambda t: t.to_dense()),
    "bsr": (lambda x: torch.eye(BATCH).to_sparse_bsr((2, 2)), "sparse_bsr", lambda t: t.to_dense()),
    "mkldnn": (lambda x: torch.ones(BATCH, 2).to_mkldnn(), "_mkldnn", lambda t: t.to_dense()),
    "nested": (
        lambda x: torch.nested.nested_tensor([torch.ones(i + 1, 2) for i in range(BATCH)]),
        "nested",
        lambda t: t.to_padded_tensor(0.0),
    ),
    "jagged": (
        lambda x: torch.nested.nested_tensor([torch.ones(i + 1, 2) for i in IDS], layout=torch.jagged),
        "nested",
        lambda t: t.to_padded_tensor(0.0),
    ),
    "quantized": (
        lambda x: torch.quantize_per_tensor(torch.ones(BATCH, 2), 0.5, 0, torch.qint8),
        "quantized",
        lambda t: t.dequantize(),
    ),
    "masked": (
        lambda x: torch.masked.as_masked_tensor(torch.ones(BATCH, 2), torch.ones(BATCH, 2) > 0),
        "MaskedTensor",
        lambda t: t.get_data(),
    ),
    "boxed": (lambda x: Boxed(torch.ones(BATCH, 2)), "Boxed", lambda t: t.inner),
    "meta": (lambda x: torch.ones(BATCH, 2, device="meta"), "meta device", None),
    "fake": (lambda x: FakeTensorMode().from_tensor(torch.ones(BATCH, 2)), "FakeTensor", None),
    "int4": (lambda x: packed("int4")(x), "int4", lambda t: t.view(torch.uint8)),
    "uint1": (lambda x: packed("uint1")(x), "uint1", lambda t: t.view(torch.uint8)),
    "float4": (lambda x: packed("float4_e2m1fn_x2")(x), "float4_e2m1fn_x2", lambda t: t.view(torch.uint8)),
    "bits8": (lambda x: packed("bits8")(x), "bits8", lambda t: t.view(torch.uint8)),
}
NOISY = pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|MaskedTensors):UserWarning")


@NOISY
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_dense_bytes_is_refused_by_alias_cause_and_remedy(kind: str, trace: Any) -> None:
    make, named, _ = REFUSED[kind]
    tracer = trace(make)
    with pytest.raises(InvalidInputError, match="'tap'") as caught:
        tracer(torch.zeros(BATCH, 4), torch.zeros(BATCH), IDS)
    assert named in str(caught.value)
    assert caught.value.hint
    assert ("TracerConfig.reduce" in caught.value.hint) == (kind != "meta")
    tracer.flush()
    assert tracer.stats().rows_submitted == 0
    trace_now = open_trace("net", "v1")
    assert trace_now.num_rows("extracted_feature") == trace_now.num_rows("ground_truth") == 0


@NOISY
@pytest.mark.parametrize("kind", [kind for kind, (_, _, remedy) in REFUSED.items() if remedy is not None])
def test_a_callable_gets_what_has_no_dense_bytes_and_may_make_it_dense(kind: str, trace: Any) -> None:
    make, _, remedy = REFUSED[kind]
    assert remedy is not None
    tracer = trace(make, reduce={"tap": remedy})
    tracer(torch.zeros(BATCH, 4), None, IDS)
    expected = remedy(tracer.model.seen)
    found = stored(tracer)
    assert found.dtype is expected.dtype
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("where", ["label", "field", "logits"])
@pytest.mark.parametrize("kind", ["coo", "quantized", "meta", "int4"])
def test_labels_fields_and_logits_of_such_kinds_are_refused_by_name(
    kind: str, where: str, data_dir: Path
) -> None:
    value = REFUSED[kind][0](torch.zeros(1))
    model = Layer(lambda x: value) if where == "logits" else Layer(lambda x: x)
    fields = [{"name": "camera", "type": "tensor"}]
    named = {"label": "ground_truth", "field": "'camera'", "logits": "the model's output"}[where]
    with ClassificationTracer(model, "net", "v1", {}, fields) as tracer:
        labels = value if where == "label" else torch.zeros(BATCH)
        camera = value if where == "field" else torch.zeros(BATCH, 1)
        with pytest.raises(InvalidInputError, match=named) as caught:
            tracer(torch.zeros(BATCH, 4), labels, IDS, camera=camera)
        assert REFUSED[kind][1] in str(caught.value)
        assert caught.value.hint
        assert tracer.stats().rows_submitted == 0


class Transformed(nn.Module):
    """A model that runs its own layers inside of a transform of ``torch.func``."""

    def __init__(self, transform: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        self.transform = transform

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transform(self.inner, x)


TRANSFORMS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "vmap": lambda inner, x: torch.vmap(inner)(x),
    "grad": lambda inner, x: torch.func.grad(lambda y: inner(y).sum())(x),
    "jvp": lambda inner, x: torch.func.jvp(inner, (x,), (x,))[1],
    "functionalize": lambda inner, x: torch.func.functionalize(inner)(x),
    "vmap of grad": lambda inner, x: torch.vmap(torch.func.grad(lambda y: inner(y).sum()))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_layer_inside_of_a_function_transform_is_refused_and_one_outside_is_stored(
    name: str, data_dir: Path
) -> None:
    model = Transformed(TRANSFORMS[name])
    x = torch.randn(BATCH, 4)
    with ClassificationTracer(model, "net", "inside", {"tap": "inner.0"}) as tracer:
        with pytest.raises(InvalidInputError, match=r"'tap'.*torch\.func") as caught:
            tracer(x, None, IDS)
        assert "outside of" in caught.value.hint
        assert tracer.stats().rows_submitted == 0
    with ClassificationTracer(model, "net", "v1", {"tap": ""}) as tracer:
        output = tracer(x, None, IDS)
        assert torch.equal(stored(tracer), output)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_tracer_inside_of_a_function_transform_is_refused(name: str, data_dir: Path) -> None:
    inner = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with ClassificationTracer(inner, "net", "v1", {"tap": "0"}) as tracer:

        def call(x: torch.Tensor) -> torch.Tensor:
            batch = x if x.ndim == 2 else x[None]
            return tracer(batch, None, IDS[: len(batch)])

        with pytest.raises(InvalidInputError, match=r"'tap'.*torch\.func"):
            TRANSFORMS[name](call, torch.randn(BATCH, 4))
        assert tracer.stats().rows_submitted == 0
        tracer(torch.randn(BATCH, 4), None, IDS)  # and the tracer goes on
        assert len(stored(tracer)) == BATCH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_the_dtype_by_call_and_each_call_is_stored_in_its_own(
    dtype: torch.dtype, data_dir: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(BATCH, 4)
    with ClassificationTracer(model, "net", "v1", {"tap": "0"}) as tracer:
        with torch.autocast("cpu", dtype=dtype):
            half = tracer(x, None, IDS, n_epoch=0)
            expected = model[0](x).detach()
        full = tracer(x, None, IDS, n_epoch=1)
        tracer.flush()
        trace = open_trace("net", "v1")
        for epoch, (tap, logits) in enumerate([(expected, half), (model[0](x).detach(), full)]):
            columns = trace.tensors("extracted_feature", n_epoch=epoch)
            assert torch.equal(columns["tap"], tap)
            assert torch.equal(columns["logits"], logits)
            assert columns["tap"].dtype is tap.dtype is (torch.float32 if epoch else dtype)


def test_a_grad_scaler_trains_to_the_same_bits_with_and_without_a_tracer(data_dir: Path) -> None:
    def train(traced: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # large enough to skip steps
        call: Any = model
        tracer = None
        if traced:
            tracer = ClassificationTracer(model, "net", "v1", {"tap": "0"})
            call = lambda x: tracer(x, None, IDS)  # noqa: E731
        for _ in range(10):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = call(torch.randn(BATCH, 4)).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if tracer is not None:
            tracer.close()
        return [*(parameter.detach() for parameter in model.parameters()), torch.tensor(scaler.get_scale())]

    assert all(map(torch.equal, train(True), train(False)))


@pytest.mark.parametrize(
    "options", [{}, {"sample_fraction": 0.5}, {"reduce": {"tap": "max"}}], ids=["all", "sampled", "reduced"]
)
def test_a_default_device_is_the_users_business(options: dict[str, Any], trace: Any) -> None:
    values = torch.randn(BATCH, 2, 3)
    tracer = trace(lambda x: values, **options)
    x = torch.randn(BATCH, 4)
    with torch.device("meta"):  # as torch.set_default_device() does: new tensors lie there
        tracer(x, [0, 1, 2, 0], IDS)
        features = tracer.get_hooked_features("tap")
        stored_features = stored(tracer)
    kept = [int(text) for text in stored(tracer, "input_id")]
    expected = (values.amax(2) if "reduce" in options else values)[kept]
    assert torch.equal(features, expected)
    assert torch.equal(stored_features, expected)


class Selective(nn.Module):
    """A block under selective activation checkpointing, whose cache counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.turned = Layer(lambda x: x.T)
        self.head = nn.Linear(4, 3)
        self.inner_head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, self.policy)
        return self.head(checkpoint.checkpoint(self.block, x, use_reentrant=False, context_fn=contexts))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        x = self.turned(self.first(x)).sin()
        x = x.clone() * x.index_select(0, torch.tensor([3, 2, 1, 0])).amax(1, keepdim=True)
        return self.inner_head(x.sin()).clone()

    def policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        aten = torch.ops.aten
        saved = (aten.index_select.default, aten.amax.default, aten.clone.default)
        choice = checkpoint.CheckpointPolicy
        return choice.MUST_SAVE if operator in saved else choice.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    "options",
    [{}, {"sample_fraction": 0.5}, {"reduce": {"tap": lambda t: t.amax(1)}}, None],
    ids=["view", "sampled", "reduced", "head"],
)
def test_our_operators_are_hidden_from_the_modes_of_others(options: Any, data_dir: Path) -> None:
    x = torch.randn(BATCH, 4)

    def gradients(traced: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = Selective()
        if traced:
            layers = None if options is None else {"tap": "turned"}
            config = TracerConfig(**(options or {}))
            with ClassificationTracer(model, "net", "v1", layers, config=config) as tracer:
                tracer(x, None, IDS).sum().backward()
        else:
            model(x).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, gradients(True), gradients(False)))
