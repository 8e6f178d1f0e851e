"""The call never asks a tensor for its values, so nothing in it waits for a GPU.

Shown on CPU tensors, since the code is the same: while the tracer is called, two modes of torch refuse every
operation that brings values of a tensor to Python, or that makes shapes out of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

BATCH = 4
ASKING = (
    "item", "tolist", "numpy", "cpu", "cuda", "data", "storage", "nonzero", "unique",
    "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__repr__", "__contains__",
)  # fmt: skip
BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class AskedForValues(Exception):
    """Something in the call would have waited for a device."""


class NoPythonValues(TorchFunctionMode):
    """Refuses the methods that read a tensor's memory without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ASKING:
            raise AskedForValues(func.__name__)
        return func(*args, **(kwargs or {}))


class NoHostValues(TorchDispatchMode):
    """Refuses operations whose result depends on values, and copies to another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        devices = {argument.device for argument in args if isinstance(argument, torch.Tensor)}
        moves = bool(devices) and kwargs.get("device") is not None and kwargs["device"] not in devices
        if moves or any(tag in func.tags for tag in BY_VALUE):
            raise AskedForValues(str(func))
        return func(*args, **kwargs)


@contextmanager
def no_values() -> Iterator[None]:
    with NoPythonValues(), NoHostValues():
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.body(x).mean((2, 3)))
        return logits


class Shifting(ClassificationTracer):
    """Records other ids and labels than those of the call."""

    def _parse_and_save_io_data(
        self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
    ) -> None:
        kwargs["input_ids"] = kwargs["input_ids"] + 10
        super()._parse_and_save_io_data(model_input, model_output, ground_truth + 1, **kwargs)


@pytest.fixture
def make(data_dir: Path) -> Iterator[Any]:
    made = []

    def factory(cls: Any = ClassificationTracer, fields: Any = None, **options: Any) -> ClassificationTracer:
        made.append(cls(Net(), "net", "v1", {"body": "body"}, fields, config=TracerConfig(**options)))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def call(tracer: ClassificationTracer, ids: Any = None, labels: Any = None, **fields: Any) -> None:
    inputs, ids = torch.randn(BATCH, 1, 2, 2), torch.arange(BATCH) if ids is None else ids
    with no_values():
        tracer(inputs, labels, ids, "train", 0, **fields)
    tracer.flush()


def stored(column: str, table: str = "extracted_feature") -> Any:
    return open_trace("net", "v1").tensors(table)[column]


@pytest.mark.parametrize(
    "ask",
    [
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor[0].item(),
        lambda tensor: int(tensor[0]),
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: np.asarray(tensor),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor[tensor > 1],
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: [value.item() for value in tensor],
    ],
)
def test_the_watch_refuses_what_waits_for_a_device(ask: Callable[[torch.Tensor], Any]) -> None:
    tensor = torch.arange(3)
    with no_values(), pytest.raises(AskedForValues):
        ask(tensor)


ID_FORMS = {
    "int64": lambda: torch.arange(BATCH),
    "uint8": lambda: torch.arange(BATCH, dtype=torch.uint8),
    "uint64": lambda: torch.arange(BATCH).view(torch.uint64),
    "strided": lambda: torch.arange(2 * BATCH).view(BATCH, 2)[:, 0] // 2,
    "a list of tensors": lambda: list(torch.arange(BATCH).unbind()),
}


@pytest.mark.parametrize("form", ID_FORMS)
def test_ids_are_not_looked_at(make: Any, form: str) -> None:
    call(make(), ID_FORMS[form]())
    assert stored("input_id") == ["0", "1", "2", "3"]


LABEL_FORMS = {
    "hard": lambda: torch.arange(BATCH),
    "soft": lambda: torch.arange(2.0 * BATCH).view(BATCH, 2),
    "of a graph": lambda: torch.arange(1.0 * BATCH, requires_grad=True) * 2,
    "a list of tensors": lambda: list(torch.arange(BATCH).unbind()),
}


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_labels_are_not_looked_at(make: Any, form: str) -> None:
    given = LABEL_FORMS[form]()
    call(make(), labels=given)
    expected = torch.stack(given) if isinstance(given, list) else given.detach()
    assert torch.equal(stored("label", "ground_truth"), expected)


FIELD_VALUES = {
    "int": (torch.arange(BATCH, dtype=torch.int16), torch.tensor(7)),
    "float": (torch.arange(BATCH, dtype=torch.bfloat16), torch.tensor(0.5)),
    "bool": (torch.arange(BATCH) > 1, torch.tensor(True)),
    "tensor": (torch.arange(2 * BATCH).view(BATCH, 2), list(torch.eye(BATCH))),
}


@pytest.mark.parametrize("kind", FIELD_VALUES)
def test_fields_are_not_looked_at(make: Any, kind: str) -> None:
    tracer = make(fields=[{"name": "f", "type": kind}])
    each, other = FIELD_VALUES[kind]
    call(tracer, f=each)
    if kind != "tensor":
        call(tracer, f=list(each.unbind()))
        call(tracer, f=other)
        assert stored("f").tolist() == [*each.tolist(), *each.tolist(), *[other.item()] * BATCH]
    else:
        call(tracer, f=other)
        assert [row.tolist() for row in stored("f")] == [*each.tolist(), *torch.eye(BATCH).tolist()]


@pytest.mark.parametrize(
    "options",
    [
        {"reduce": {"body": "mean"}},
        {"reduce": {"body": "max"}},
        {"reduce": {"body": "flatten"}},
        {"capture_dtype": "float16"},
        {"batch_dim": {"body": 0}, "repeat": "all"},
    ],
    ids=str,
)
def test_features_are_not_looked_at(make: Any, options: dict[str, Any]) -> None:
    call(make(**options), labels=torch.arange(BATCH))
    assert len(stored("body")) == BATCH


def test_the_head_is_found_without_a_look_at_values(data_dir: Path) -> None:
    with ClassificationTracer(Net(), "net", "v1") as tracer:
        call(tracer, labels=torch.arange(BATCH))
        call(tracer, labels=torch.arange(BATCH))
    assert stored("features").shape == (2 * BATCH, 5)


def test_a_subclass_may_change_ids_and_labels_on_their_device(make: Any) -> None:
    call(make(Shifting), labels=torch.zeros(BATCH, dtype=torch.int64))
    assert stored("input_id") == ["10", "11", "12", "13"]
    assert stored("label", "ground_truth").tolist() == [1] * BATCH


def test_sampled_rows_are_selected_without_a_look_at_values(make: Any) -> None:
    tracer = make(fields=[{"name": "f", "type": "int"}], sample_fraction=0.5)
    ids = [str(number) for number in range(BATCH)]
    call(tracer, ids, torch.arange(BATCH), f=torch.arange(BATCH))
    kept = [int(text) for text in stored("input_id")]
    assert 0 < len(kept) < BATCH
    assert stored("label", "ground_truth").tolist() == stored("f").tolist() == kept


def test_sampling_by_ids_in_a_tensor_waits_for_them(make: Any) -> None:
    with pytest.raises(AskedForValues):
        call(make(sample_fraction=0.5))


def test_uint64_for_an_int_field_waits_for_its_range_check(make: Any) -> None:
    tracer = make(fields=[{"name": "f", "type": "int"}])
    with pytest.raises(AskedForValues):
        call(tracer, f=torch.arange(BATCH).view(torch.uint64))


def test_ids_and_labels_are_stored_as_they_were_before_the_forward(data_dir: Path) -> None:
    ids, labels, numbers = torch.arange(BATCH), torch.arange(BATCH), torch.arange(BATCH)

    class Overwriting(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for tensor in (ids, labels, numbers):
                tensor.fill_(99)
            return super().forward(x)

    fields = [{"name": "f", "type": "int"}]
    with ClassificationTracer(Overwriting(), "net", "v1", {"body": "body"}, fields) as tracer:
        call(tracer, ids, labels, f=numbers)
    assert stored("input_id") == ["0", "1", "2", "3"]
    assert stored("label", "ground_truth").tolist() == stored("f").tolist() == [0, 1, 2, 3]
