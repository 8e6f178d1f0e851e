"""Labels, ids and fields that live on the device: stored as given, without a wait."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from patterns import Emitter, pattern, same_bits, spoil
from recording import keep_busy, recording, stored, waits_are_errors

CALLS, BATCH_SIZE = 8, 6
FIELDS = [
    {"name": "camera", "type": "int"},
    {"name": "weight", "type": "float"},
    {"name": "flipped", "type": "bool"},
    {"name": "image", "type": "tensor"},
    {"name": "box", "type": "tensor", "dtype": "float16", "shape": [4]},
]
LABEL_FIELDS = [{"name": "rater", "type": "int"}]


@dataclass
class Given:
    """What one call is given besides the model's input; all of it on the host."""

    labels: torch.Tensor
    ids: Any
    fields: dict[str, Any] = field(default_factory=dict)


def given(call: int) -> Given:
    generator = torch.Generator().manual_seed(call)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    return Given(
        draw(100, BATCH_SIZE),
        torch.arange(BATCH_SIZE) + 1000 * call,
        {
            "camera": draw(1 << 40, BATCH_SIZE),
            "weight": torch.rand(BATCH_SIZE, generator=generator),
            "flipped": draw(2, BATCH_SIZE).bool(),
            "image": pattern((BATCH_SIZE, 3, 5), torch.uint8, call),
            "box": pattern((BATCH_SIZE, 4), torch.int16, call).view(torch.float16),
            "rater": draw(9, BATCH_SIZE).to(torch.int32),
        },
    )


KINDS = (
    "nothing",
    "labels",
    "soft labels",
    "ids",
    "camera",
    "weight",
    "flipped",
    "image",
    "box",
    "rater",
    "everything",
)


def moved(kind: str, call: int, device: torch.device) -> Given:
    """What a call is given, with ``kind`` of it on the device."""
    values = given(call)
    if kind == "soft labels":
        values.labels = pattern((BATCH_SIZE, 3), torch.int32, call).view(torch.float32)
    if kind in ("labels", "soft labels", "everything"):
        values.labels = values.labels.to(device)
    values.ids = values.ids.to(device) if kind in ("ids", "everything") else values.ids.tolist()
    for name, value in values.fields.items():
        if kind in (name, "everything"):
            values.fields[name] = value.to(device)
    return values


def on_device(values: Given) -> list[torch.Tensor]:
    every = [values.labels, values.ids, *values.fields.values()]
    return [value for value in every if isinstance(value, torch.Tensor)]


def check_stored(kind: str) -> None:
    values = [given(call) for call in range(CALLS)]
    assert stored("input_id") == [str(number) for call in values for number in call.ids.tolist()]
    labels = [moved(kind, call, torch.device("cpu")).labels for call in range(CALLS)]
    assert same_bits(stored("label", table="ground_truth"), torch.cat(labels))
    for name in ("camera", "weight", "flipped", "image", "box", "rater"):
        table = "ground_truth" if name == "rater" else "extracted_feature"
        expected = torch.cat([call.fields[name] for call in values])
        found = stored(name, table=table)
        if name in ("image", "box"):
            assert same_bits(found, expected), name
        else:
            assert found.tolist() == expected.tolist(), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_on_the_device_is_stored_as_given(device: torch.device, kind: str) -> None:
    with recording(
        Emitter(), device, additional_fields=FIELDS, additional_label_fields=LABEL_FIELDS
    ) as tracer:
        for call in range(CALLS):
            values = moved(kind, call, device)
            inputs = pattern((BATCH_SIZE, 4), torch.float32, call, device)
            tracer(inputs, values.labels, values.ids, n_epoch=0, **values.fields)
            for tensor in on_device(
                values
            ):  # what the caller does with its tensors afterwards is its own affair
                spoil(tensor)
    check_stored(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_with_values_on_the_device_never_synchronises(device: torch.device, kind: str) -> None:
    with recording(
        Emitter(), device, additional_fields=FIELDS, additional_label_fields=LABEL_FIELDS
    ) as tracer:
        calls = [moved(kind, call, device) for call in range(CALLS)]
        inputs = [pattern((BATCH_SIZE, 4), torch.float32, call, device) for call in range(CALLS)]
        tracer(inputs[0], calls[0].labels, calls[0].ids, n_epoch=0, **calls[0].fields)
        with waits_are_errors(device):
            for values, tensor in zip(calls[1:], inputs[1:], strict=True):
                tracer(tensor, values.labels, values.ids, n_epoch=0, **values.fields)
    check_stored(kind)


@pytest.mark.cuda_only
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_returns_while_the_gpu_is_still_busy(device: torch.device, kind: str) -> None:
    """No wait of any kind, in torch or in the driver: the call is over before what was enqueued before it."""
    with recording(
        Emitter(), device, additional_fields=FIELDS, additional_label_fields=LABEL_FIELDS
    ) as tracer:
        calls = [moved(kind, call, device) for call in range(CALLS)]
        inputs = [pattern((BATCH_SIZE, 4), torch.float32, call, device) for call in range(CALLS)]
        tracer(inputs[0], calls[0].labels, calls[0].ids, n_epoch=0, **calls[0].fields)
        torch.cuda.synchronize()
        keep_busy(device, 1.0)
        is_done = torch.cuda.Event()
        is_done.record()
        for values, tensor in zip(calls[1:], inputs[1:], strict=True):
            tracer(tensor, values.labels, values.ids, n_epoch=0, **values.fields)
        was_busy = not is_done.query()
    assert was_busy
    check_stored(kind)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16], ids=str)
def test_ids_of_every_integer_type_are_text(device: torch.device, dtype: torch.dtype) -> None:
    with recording(Emitter(), device) as tracer:
        ids = torch.tensor([0, 7, 255 if dtype is torch.uint8 else -3, 7], dtype=dtype, device=device)
        tracer(pattern((4, 4), torch.float32, 0, device), None, ids)
    assert stored("input_id") == ["0", "7", "255" if dtype is torch.uint8 else "-3", "7"]
