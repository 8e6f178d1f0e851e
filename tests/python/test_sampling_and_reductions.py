"""What is left out or made smaller: samples, calls, values; alone and together with fields of all types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import InvalidInputError, NotFoundError
from ml_debugger.tracer.sampling import SampleFilter
from ml_debugger.training import ClassificationTracer

BATCH = 8
IDS = [str(number) for number in range(40)]
# Golden: fixed for ever, or ranks, machines and epochs recorded by different releases hold different samples.
KEPT = {
    0.1: [18, 29],
    0.25: [2, 6, 17, 18, 23, 29, 34],
    0.5: [2, 4, 6, 12, 14, 16, 17, 18, 20, 22, 23, 25, 26, 28, 29, 32, 34, 36, 38, 39],
}
TEXTS = [
    "",
    "0",
    "00",
    "cat.png",
    "cat.PNG",
    "ä",
    "a\u0308",
    "日本",
    "🎉",
    " x",
    "x ",
    "-1",
    "train/0001.jpg",
]
KEPT_TEXTS = ["00", "cat.png", "🎉", " x", "x ", "-1", "train/0001.jpg"]
HALF = [2, 4, 6]  # of the first BATCH ids

pytestmark = pytest.mark.usefixtures("data_dir")


class Net(nn.Module):
    """Convolution, head over its mean: features (B, 5, 4, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.body(x)
        return self.head(self.seen.mean((2, 3)))


Make = Callable[..., ClassificationTracer]


@pytest.fixture
def trace() -> Iterator[Make]:
    """Makes tracers of ``Net`` that record ``body`` as ``map``; closes them."""
    made = []

    def factory(
        model: nn.Module | None = None,
        layers: Mapping[str, str] | None = None,
        fields: Any = None,
        label_fields: Any = None,
        **options: Any,
    ) -> ClassificationTracer:
        config = TracerConfig(durability="process", **options)
        layers = {"map": "body"} if layers is None else layers
        made.append(
            ClassificationTracer(model or Net(), "net", "v1", layers, fields, label_fields, config=config)
        )
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def images(count: int = BATCH) -> torch.Tensor:
    return torch.randn(count, 2, 4, 3)


def columns(
    tracer: ClassificationTracer, table: str = "extracted_feature", **selection: Any
) -> dict[str, Any]:
    tracer.flush()
    return open_trace("net", "v1").tensors(table, **selection)


@pytest.mark.parametrize("fraction", KEPT)
@pytest.mark.parametrize("form", ["text", "ints", "array", "tensor"])
def test_sample_fraction_keeps_the_golden_ids_in_every_epoch(fraction: float, form: str, trace: Make) -> None:
    given: Any = {
        "text": IDS,
        "ints": list(range(40)),
        "array": np.arange(40, dtype=np.int16),
        "tensor": torch.arange(40),
    }[form]
    tracer = trace(sample_fraction=fraction)
    order = torch.randperm(40)
    tracer(images(40), None, given, n_epoch=0)
    shuffled = given[order] if form in ("array", "tensor") else [given[position] for position in order]
    tracer(images(40), None, shuffled, n_epoch=1)
    for epoch in (0, 1):
        assert sorted(map(int, columns(tracer, n_epoch=epoch)["input_id"])) == KEPT[fraction]


def test_sample_fraction_keeps_golden_texts_whatever_they_hold() -> None:
    assert [TEXTS[row] for row in SampleFilter(0.5).rows(TEXTS)] == KEPT_TEXTS
    assert SampleFilter(1.0).rows(TEXTS) == list(range(len(TEXTS)))


def test_a_larger_fraction_keeps_what_a_smaller_one_keeps() -> None:
    ids = [f"img-{number}" for number in range(4000)]
    before: set[int] = set()
    for fraction in (0.001, 0.1, 0.3, 0.6, 0.999):
        rows = SampleFilter(fraction).rows(ids)
        assert before <= set(rows)
        assert abs(len(rows) / len(ids) - fraction) < 0.03
        before = set(rows)


def test_a_call_of_which_no_sample_is_kept_is_a_plain_forward(trace: Make) -> None:
    tracer = trace(sample_fraction=0.5)
    x = images(2)
    assert torch.equal(tracer(x, torch.zeros(2), ["0", "1"]), tracer.model(x))
    with pytest.raises(NotFoundError):
        tracer.get_hooked_features("map")
    assert tracer.stats().rows_submitted == 0
    with pytest.raises(InvalidInputError, match="NUL"):  # inputs are checked all the same
        tracer(x, None, ["0", "\0"])
    tracer(images(), None, IDS[:BATCH])
    assert [int(text) for text in columns(tracer)["input_id"]] == HALF


FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "int": ({"type": "int"}, list(range(BATCH))),
    "int array": ({"type": "int"}, np.arange(BATCH, dtype=np.uint8)),
    "float": ({"type": "float"}, [number / 3 for number in range(BATCH)]),
    "bool": ({"type": "bool"}, torch.arange(BATCH) % 2 == 0),
    "str": ({"type": "str"}, [f"camera-{number}" * number for number in range(BATCH)]),
    "bytes": ({"type": "bytes"}, [bytes([number] * number) for number in range(BATCH)]),
    "tensor": ({"type": "tensor"}, torch.arange(3.0 * BATCH).reshape(BATCH, 3)),
    "half": (
        {"type": "tensor", "dtype": "bfloat16", "shape": [2]},
        torch.ones(BATCH, 2, dtype=torch.bfloat16),
    ),
    "ragged": ({"type": "tensor"}, [torch.arange(number) for number in range(BATCH)]),
    "broadcast": ({"type": "str"}, "one for all"),
    "default": ({"type": "float", "default": 0.25}, None),
    "fixed": ({"type": "tensor", "shape": [2]}, torch.tensor([1.0, 2.0])),
}
ONE_FOR_ALL = {"broadcast": "one for all", "default": 0.25, "fixed": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize("table", ["extracted_feature", "ground_truth"])
def test_fields_of_all_types_follow_their_samples_through_every_option(table: str, trace: Make) -> None:
    specifications = [{"name": name, **field} for name, (field, _) in FIELDS.items()]
    where = {"fields" if table == "extracted_feature" else "label_fields": specifications}
    tracer = trace(
        reduce={"map": "max"}, capture_dtype="float16", every_n_calls=2, sample_fraction=0.5, **where
    )
    values = {name: value for name, (_, value) in FIELDS.items() if value is not None}
    labels = torch.arange(BATCH) % 3
    seen = []
    for call in range(4):
        output = tracer(images(), labels, IDS[:BATCH], n_epoch=call, **values)
        assert output.dtype is torch.float32
        seen.append(tracer.model.seen.detach())
    for epoch in (0, 2):
        features = columns(tracer, n_epoch=epoch)
        assert [int(text) for text in features["input_id"]] == HALF
        assert features["map"].dtype is torch.float16
        assert torch.equal(features["map"], seen[epoch].amax((2, 3)).half()[HALF])
        assert features["logits"].dtype is torch.float32
        truth = columns(tracer, "ground_truth", n_epoch=epoch)
        assert torch.equal(truth["label"], labels[HALF])
        check_fields(columns(tracer, table, n_epoch=epoch))
    assert open_trace("net", "v1").epochs == [0, 2]


def check_fields(stored: dict[str, Any]) -> None:
    for name, (_, given) in FIELDS.items():
        for position, sample in enumerate(HALF):
            expected = ONE_FOR_ALL[name] if name in ONE_FOR_ALL else given[sample]
            found = stored[name][position]
            if isinstance(found, torch.Tensor) and found.ndim > 0:
                assert torch.equal(found, expected), name
            else:
                assert found == expected, name


def test_left_out_calls_and_samples_are_not_counted_as_lost(trace: Make) -> None:
    tracer = trace(every_n_calls=3, sample_fraction=0.5)
    for call in range(7):
        tracer(images(), None, IDS[:BATCH], n_epoch=call)
    tracer.flush()
    stats = tracer.stats()
    assert stats.rows_submitted == stats.rows_committed == 3 * len(HALF)
    assert stats.rows_discarded == stats.rows_failed == 0
    tracer.wait_for_save()
    assert open_trace("net", "v1").epochs == [0, 3, 6]


def test_the_head_is_found_in_the_first_recorded_call_when_others_are_left_out(trace: Make) -> None:
    config = TracerConfig(every_n_calls=2, sample_fraction=0.5)
    model = Net()
    with ClassificationTracer(model, "net", "v1", config=config) as tracer:
        for call in range(3):
            tracer(images(), None, IDS[:BATCH], n_epoch=call)
            last = model.seen.detach().mean((2, 3))
        assert torch.equal(columns(tracer, n_epoch=2)["features"], last[HALF])
        assert len(columns(tracer)["features"]) == 2 * len(HALF)


REDUCTIONS: dict[str, tuple[Any, Callable[[torch.Tensor], torch.Tensor]]] = {
    "mean": ("mean", lambda t: t.flatten(2).mean(2)),
    "max": ("max", lambda t: t.amax((2, 3))),
    "flatten": ("flatten", lambda t: t.reshape(BATCH, -1)),
    "callable": (lambda t: t[:, :, 0], lambda t: t[:, :, 0]),
    "a view of its argument": (lambda t: t, lambda t: t),
    "another dtype": (lambda t: t.argmax(1), lambda t: t.argmax(1)),
    "one number": (lambda t: t.flatten(1).norm(dim=1), lambda t: t.flatten(1).norm(dim=1)),
    "something else": (lambda t: torch.arange(BATCH), lambda t: torch.arange(BATCH)),
}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_runs_over_all_samples_and_leaves_the_output_alone(
    name: str, fraction: float, trace: Make
) -> None:
    reduction, expected = REDUCTIONS[name]
    tracer = trace(reduce={"map": reduction}, sample_fraction=fraction)
    x = images()
    tracer(x, None, IDS[:BATCH])
    seen = tracer.model.seen
    assert torch.equal(seen, tracer.model.body(x))
    kept = list(range(BATCH)) if fraction == 1.0 else HALF
    assert torch.equal(columns(tracer)["map"], expected(seen.detach())[kept])
    assert torch.equal(tracer.get_hooked_features("map"), expected(seen.detach())[kept])


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 5)])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_pooling_leaves_what_has_no_dimension_behind_the_channel(
    shape: tuple[int, ...], reduction: str, trace: Make
) -> None:
    values = torch.randn(shape)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.body(values)
            return x[:, 0, 0]

    tracer = trace(Model(), reduce={"map": reduction})
    tracer(images(), None, IDS[:BATCH])
    assert torch.equal(columns(tracer)["map"], values)


def raise_it(error: Exception) -> Any:
    def reduction(tensor: torch.Tensor) -> torch.Tensor:
        raise error

    return reduction


@pytest.mark.parametrize(
    ("reduction", "said"),
    [
        (lambda t: t.mean(0), r"\(5, 4, 3\)"),
        (lambda t: t.mean(), r"\(\)"),
        (lambda t: t[1:], r"\(7, 5, 4, 3\)"),
        (lambda t: t.transpose(0, 1), r"\(5, 8, 4, 3\)"),
        (lambda t: None, "NoneType"),
        (lambda t: t.tolist(), "list"),
        (lambda t: t.detach().numpy(), "ndarray"),
        (lambda t: (t, t), "tuple"),
        (lambda t: t.flatten(1).to_sparse(), "sparse"),
        (raise_it(ValueError("my own words")), "my own words"),
        (raise_it(KeyError("my own words")), "my own words"),
        (lambda t: t.mul_(2), "in place"),
        (lambda t: t.view(BATCH, -1).zero_() + 1, "in place"),
    ],
)
def test_a_callable_that_fails_or_gives_something_else_is_refused(
    reduction: Any, said: str, trace: Make
) -> None:
    tracer = trace(reduce={"map": reduction})
    with pytest.raises(InvalidInputError, match=said) as caught:
        tracer(images(), torch.zeros(BATCH), IDS[:BATCH])
    assert "'map'" in str(caught.value)
    assert caught.value.hint
    tracer.flush()
    assert tracer.stats().rows_submitted == 0
    assert open_trace("net", "v1").num_rows("extracted_feature") == 0


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_a_reduction_that_a_dtype_does_not_have_is_refused_by_alias(reduction: str, trace: Make) -> None:
    class Complex(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.other(x[:, 0].to(torch.complex64 if reduction == "max" else torch.int64).unsqueeze(1))
            return super().forward(x)

    model = Complex()
    model.other = nn.Identity()
    tracer = trace(model, {"map": "other"}, reduce={"map": reduction})
    with pytest.raises(InvalidInputError, match=r"'map'.*(complex64|int64)"):
        tracer(images(), None, IDS[:BATCH])
    assert tracer.stats().rows_submitted == 0


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("dtype", "is_cast"),
    [
        (torch.float64, True),
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float8_e5m2, True),
        (torch.complex64, False),
        (torch.int64, False),
        (torch.bool, False),
    ],
    ids=str,
)
def test_capture_dtype_casts_what_is_floating_and_nothing_else(
    name: str, dtype: torch.dtype, is_cast: bool, trace: Make
) -> None:
    values = torch.randn(BATCH, 6).to(dtype)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.body(values)
            return x[:, 0, 0]

    tracer = trace(Model(), capture_dtype=name)
    tracer(images(), torch.rand(BATCH, 3), IDS[:BATCH])
    expected = values.to(getattr(torch, name)) if is_cast else values
    stored = columns(tracer)
    assert stored["map"].dtype is expected.dtype
    assert torch.equal(stored["map"], expected)
    assert stored["logits"].dtype is torch.float32
    assert columns(tracer, "ground_truth")["label"].dtype is torch.float32
