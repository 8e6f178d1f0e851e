"""From what a layer returns to the tensor that is stored."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ml_debugger.errors import InvalidInputError
from ml_debugger.tracer.outputs import CallState, OutputPicker, find_logits, plain_tensor, select_rows

BATCH = 4


def picker(rows: list[int] | None = None, **options: Any) -> OutputPicker:
    state = CallState()
    state.batch_size, state.rows = BATCH, rows
    return OutputPicker("layer", state, sampled=rows is not None, **options)


@dataclass
class Output:
    loss: torch.Tensor
    hidden: Any


FEATURES = torch.arange(8.0).reshape(BATCH, 2)
Pair = collections.namedtuple("Pair", ["first", "second"])

NESTS = [
    FEATURES,
    (torch.zeros(()), FEATURES),
    [[torch.zeros(9, 9)], {"a": FEATURES}],
    {"loss": torch.zeros(1), "hidden": FEATURES},
    Output(torch.zeros(()), (FEATURES, torch.zeros(BATCH, 1))),
    Pair(None, FEATURES),
]


@pytest.mark.parametrize("output", NESTS, ids=lambda output: type(output).__name__)
def test_first_tensor_with_the_batch_size_is_taken(output: Any) -> None:
    assert torch.equal(picker()(output), FEATURES)


@pytest.mark.parametrize(
    ("picks", "output"),
    [
        ((0,), (FEATURES, torch.zeros(BATCH))),
        ((-1,), [torch.zeros(BATCH), FEATURES]),
        (("hidden", 1), Output(torch.zeros(BATCH), (torch.zeros(BATCH), FEATURES))),
        ((1,), Output(torch.zeros(BATCH), FEATURES)),
        (("b",), {"a": torch.zeros(BATCH), "b": FEATURES}),
        (("second",), Pair(torch.zeros(BATCH), FEATURES)),
        ((1,), {"a": torch.zeros(BATCH), "b": FEATURES}),
    ],
)
def test_a_path_picks(picks: tuple[Any, ...], output: Any) -> None:
    assert torch.equal(picker(picks=picks)(output), FEATURES)


@pytest.mark.parametrize(
    ("picks", "output"),
    [((5,), (FEATURES,)), (("x",), {"a": FEATURES}), ((0,), FEATURES), (("x",), Output(FEATURES, 1))],
)
def test_a_pick_that_is_not_there_is_an_error_that_names_the_layer(
    picks: tuple[Any, ...], output: Any
) -> None:
    with pytest.raises(InvalidInputError, match="'layer'"):
        picker(picks=picks)(output)


@pytest.mark.parametrize(
    "output", [torch.zeros(3, 2), torch.zeros(()), None, "text", (torch.zeros(5),)], ids=str
)
def test_an_output_without_the_batch_size_is_an_error(output: Any) -> None:
    with pytest.raises(InvalidInputError, match="4 samples"):
        picker()(output)


def test_the_batch_dimension_is_moved_to_the_front() -> None:
    sequence_first = torch.randn(7, BATCH, 2)
    stored = picker(batch_dim=1)(sequence_first)
    assert torch.equal(stored, sequence_first.transpose(0, 1))
    assert stored.is_contiguous()
    assert torch.equal(picker(batch_dim=-1)(torch.randn(2, BATCH).zero_()), torch.zeros(BATCH, 2))


REDUCTIONS = [
    ("mean", (BATCH, 3, 2, 2), lambda x: x.mean((2, 3))),
    ("max", (BATCH, 3, 2, 2), lambda x: x.amax((2, 3))),
    ("mean", (BATCH, 3), lambda x: x),
    ("flatten", (BATCH, 3, 2), lambda x: x.flatten(1)),
    ("flatten", (BATCH,), lambda x: x.reshape(BATCH, 1)),
    (lambda x: x.sum(-1), (BATCH, 3, 2), lambda x: x.sum(-1)),
]


@pytest.mark.parametrize(("reduction", "shape", "expected"), REDUCTIONS)
def test_reductions(reduction: Any, shape: tuple[int, ...], expected: Any) -> None:
    output = torch.randn(shape, requires_grad=True)
    stored = picker(reduction=reduction)(output)
    assert torch.equal(stored, expected(output.detach()))
    assert not stored.requires_grad


@pytest.mark.parametrize(
    "reduction", [lambda x: x.sum(), lambda x: x[:2], lambda x: 3, lambda x: x.reshape(3, 7)]
)
def test_a_reduction_that_loses_the_samples_is_an_error(reduction: Any) -> None:
    with pytest.raises(InvalidInputError, match="reduce"):
        picker(reduction=reduction)(torch.randn(BATCH, 3))


def test_only_floating_features_are_cast() -> None:
    assert picker(capture_dtype="bfloat16")(torch.ones(BATCH)).dtype == torch.bfloat16
    assert picker(capture_dtype="float16")(torch.ones(BATCH, dtype=torch.int32)).dtype == torch.int32


DTYPES = [
    torch.float64,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex128,
    torch.bool,
    torch.int8,
    torch.uint16,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_rows_are_kept_bit_for_bit(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [4.0, 1.0]]).to(dtype)
    kept = picker(rows=[1, 3])(values)
    assert kept.dtype == dtype
    assert kept.to(torch.complex128).tolist() == values.to(torch.complex128)[[1, 3]].tolist()
    assert select_rows(values, None) is values


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(BATCH, 2).to_sparse(),
        torch.zeros(BATCH, 2, device="meta"),
        torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)] * 2),
        torch.quantize_per_tensor(torch.zeros(BATCH), 1.0, 0, torch.quint8),
    ],
    ids=["sparse", "meta", "nested", "quantized"],
)
def test_what_is_not_dense_is_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match="'layer'"):
        picker()(tensor)


def test_subclasses_conjugates_and_views_become_plain() -> None:
    class Tagged(torch.Tensor):
        pass

    values = torch.randn(BATCH, 2, dtype=torch.complex64)
    for given, expected in [
        (values.as_subclass(Tagged), values),
        (torch.nn.Parameter(values), values),
        (values.conj(), values.conj().resolve_conj()),
        (values.conj().imag, values.conj().resolve_conj().imag.contiguous()),
        (values[:, 1], values[:, 1].contiguous()),
        (values[:1].expand(BATCH, 2), values[:1].repeat(BATCH, 1)),
    ]:
        plain = plain_tensor(given, "it")
        assert type(plain) is torch.Tensor
        assert plain.is_contiguous()
        assert not plain.is_conj()
        assert not plain.is_neg()
        assert not plain.requires_grad
        assert torch.equal(plain, expected)


def test_logits_are_the_output_or_its_logits_or_its_first_fitting_tensor() -> None:
    @dataclass
    class Named:
        other: torch.Tensor
        logits: torch.Tensor

    other = torch.zeros(BATCH, 9)
    for output in (FEATURES, (FEATURES, other), {"x": other, "logits": FEATURES}, Named(other, FEATURES)):
        assert find_logits(output, BATCH) is FEATURES
    assert find_logits(torch.zeros(3, 2), BATCH) is None
    assert find_logits("text", BATCH) is None
