"""capture_dtype, reduce and sample_fraction work on the device, before the copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ml_debugger import open_trace
from patterns import Emitter, pattern, same_bits
from recording import recording, row_ids, stored, waits_are_errors

CALLS, SHAPE = 6, (5, 8, 6, 6)


def features(call: int, device: torch.device) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(call)).to(device)


def record(device: torch.device, **options: Any) -> None:
    with recording(Emitter(), device, **options) as tracer:
        tracer(features(0, device), None, row_ids(0, SHAPE[0]))
        calls = [features(call, device) for call in range(1, CALLS)]
        with waits_are_errors(device):
            for call, values in enumerate(calls, 1):
                tracer(values, None, row_ids(call, SHAPE[0]))


def expected(device: torch.device, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat([change(features(call, device)).cpu() for call in range(CALLS)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_capture_dtype_casts_before_the_copy(device: torch.device, dtype: torch.dtype) -> None:
    record(device, capture_dtype=str(dtype).removeprefix("torch."))
    assert same_bits(stored("out"), expected(device, lambda values: values.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_capture_dtype_leaves_what_is_not_floating_alone(device: torch.device, dtype: torch.dtype) -> None:
    with recording(Emitter(), device, capture_dtype="float16") as tracer:
        tracer(pattern((4, 6), dtype, 1, device), None, row_ids(0, 4))
    assert same_bits(stored("out"), pattern((4, 6), dtype, 1))


REDUCTIONS: dict[str, Any] = {
    "mean": lambda values: values.flatten(2).mean(2),
    "max": lambda values: values.flatten(2).amax(2),
    "flatten": lambda values: values.flatten(1),
}


@pytest.mark.parametrize("name", sorted(REDUCTIONS))
def test_reduce_runs_on_the_device(device: torch.device, name: str) -> None:
    record(device, reduce={"out": name})
    assert same_bits(stored("out"), expected(device, REDUCTIONS[name]))


def test_reduce_takes_a_callable_and_casts_after_it(device: torch.device) -> None:
    record(
        device, reduce={"out": lambda values: values[:, 1:3].square().sum((2, 3))}, capture_dtype="bfloat16"
    )
    change = lambda values: values[:, 1:3].square().sum((2, 3)).bfloat16()  # noqa: E731
    assert same_bits(stored("out"), expected(device, change))


def test_sample_fraction_keeps_whole_rows_chosen_by_id(device: torch.device) -> None:
    options = {"sample_fraction": 0.5}
    batch_size = 64
    with recording(Emitter(), device, **options) as tracer:
        calls = [pattern((batch_size, 9), torch.bfloat16, call, device) for call in range(CALLS)]
        tracer(calls[0], None, row_ids(0, batch_size))
        with waits_are_errors(device):
            for call in range(1, CALLS):
                tracer(calls[call], None, row_ids(call, batch_size))
    kept = open_trace("net", "v1").tensors("extracted_feature", columns=["input_id", "out", "logits"])
    ids, out = kept["input_id"], kept["out"]
    assert isinstance(out, torch.Tensor)
    assert 0.3 < len(ids) / (CALLS * batch_size) < 0.7
    for position, input_id in enumerate(ids):
        call, row = map(int, input_id.split("-"))
        assert same_bits(out[position], pattern((batch_size, 9), torch.bfloat16, call)[row])
        assert kept["logits"][position].tolist() == [2 * row, 2 * row + 1]
