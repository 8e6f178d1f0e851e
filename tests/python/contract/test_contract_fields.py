"""Contract 2, additional fields: types, fixed dtype and shape, defaults, one a batch or one a sample, no
silent conversion; label fields."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract_models import batch, by_id, nothing_visible, refused, rows_of

from ml_debugger import errors, open_trace

ONE = {"int": 7, "float": 0.1, "bool": True, "str": "left 模", "bytes": b"\x00\xff\n"}
EACH = {
    "int": [1, -(2**63), 2**63 - 1],
    "float": [0.5, float("inf"), -0.0],
    "bool": [True, False, True],
    "str": ["", "é", "x" * 20],
    "bytes": [b"", b"\x00", b"abc"],
}


def recorded(name: str = "field", table: str = "extracted_feature") -> list[Any]:
    data = open_trace("net", "v1").tensors(table)
    order = np.argsort(np.asarray(data["row_id"]))
    return [data[name][int(i)] for i in order]


def plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value


@pytest.mark.parametrize("kind", sorted(ONE))
def test_one_value_stands_for_the_batch(kind: str, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": kind}])
    tracer(*batch(3), field=ONE[kind])
    tracer.flush()
    assert [plain(v) for v in recorded()] == [ONE[kind]] * 3


@pytest.mark.parametrize("kind", sorted(EACH))
def test_one_value_a_sample(kind: str, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": kind}])
    tracer(*batch(3), field=EACH[kind])
    tracer.flush()
    assert [plain(v) for v in recorded()] == EACH[kind]


@pytest.mark.parametrize("kind", ["int", "float", "bool"])
@pytest.mark.parametrize("form", [np.asarray, torch.tensor, tuple])
def test_arrays_and_tensors_are_one_value_a_sample(kind: str, form: Any, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": kind}])
    values = [1, 2, 3] if kind == "int" else EACH[kind]
    tracer(*batch(3), field=form(values))
    tracer.flush()
    assert [plain(v) for v in recorded()] == values


def test_a_tensor_field_is_one_a_sample(make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": "tensor"}])
    values = torch.randn(3, 2, 5, dtype=torch.float64)
    tracer(*batch(3), field=values)
    tracer.flush()
    assert torch.equal(torch.stack([torch.as_tensor(v) for v in recorded()]), values)


def test_a_tensor_whose_whole_shape_is_the_fixed_shape_stands_for_the_batch(make_tracer: Any) -> None:
    field = {"name": "field", "type": "tensor", "dtype": "float32", "shape": [3, 2]}
    tracer = make_tracer(additional_fields=[field])
    value = torch.randn(3, 2)
    tracer(*batch(3), field=value)
    tracer.flush()
    assert all(torch.equal(torch.as_tensor(v), value) for v in recorded())


def test_a_tensor_of_fixed_shape_a_sample(make_tracer: Any) -> None:
    field = {"name": "field", "type": "tensor", "dtype": "float32", "shape": [2]}
    tracer = make_tracer(additional_fields=[field])
    values = torch.randn(3, 2)
    tracer(*batch(3), field=values)
    tracer.flush()
    assert torch.equal(torch.stack([torch.as_tensor(v) for v in recorded()]), values)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 3),
        torch.randn(3, 2).double(),
        torch.ones(3, 2, dtype=torch.int64),
        torch.randn(4, 2),
        "text",
    ],
)
def test_a_tensor_against_the_fixed_dtype_or_shape_is_refused(value: Any, make_tracer: Any) -> None:
    field = {"name": "field", "type": "tensor", "dtype": "float32", "shape": [2]}
    tracer = make_tracer(additional_fields=[field])
    with refused(ValueError, TypeError) as caught:
        tracer(*batch(3), field=value)
    assert "field" in str(caught.value)
    nothing_visible(tracer)


def test_a_default_fills_in_a_missing_value(make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": "int", "default": -5}])
    tracer(*batch(2, 0))
    tracer(*batch(1, 1), field=9)
    tracer.flush()
    assert [plain(v) for v in recorded()] == [-5, -5, 9]


def test_a_missing_value_without_default_is_an_error(make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "camera", "type": "str"}])
    with refused(errors.InvalidInputError) as caught:
        tracer(*batch(3))
    assert "camera" in str(caught.value)
    nothing_visible(tracer)


def test_an_unknown_keyword_is_an_error_that_names_it(make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "camera", "type": "str"}])
    with refused(ValueError, TypeError) as caught:
        tracer(*batch(3), camera="left", camrea="right")
    assert "camrea" in str(caught.value)
    nothing_visible(tracer)


WRONG = [
    ("str", 3),
    ("str", b"bytes"),
    ("str", [1, 2, 3]),
    ("int", "3"),
    ("int", 3.0),
    ("int", True),
    ("int", [1, True, 2]),
    ("float", "0.5"),
    ("float", True),
    ("float", [0.5, False, 1.0]),
    ("bool", 1),
    ("bool", "True"),
    ("bool", [0, 1, 0]),
    ("bytes", "text"),
    ("bytes", 3),
    ("tensor", 3),
    ("tensor", "text"),
]


@pytest.mark.parametrize(("kind", "value"), WRONG)
def test_a_value_of_another_type_is_refused_never_converted(kind: str, value: Any, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": kind}])
    with refused(errors.InvalidTypeError) as caught:
        tracer(*batch(3), field=value)
    assert "field" in str(caught.value)
    nothing_visible(tracer)


@pytest.mark.parametrize("kind", ["int", "float", "bool", "str", "bytes"])
@pytest.mark.parametrize("length", [2, 4])
def test_values_a_sample_must_be_as_many_as_samples(kind: str, length: int, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": kind}])
    with refused(errors.InvalidInputError):
        tracer(*batch(3), field=[ONE[kind]] * length)
    nothing_visible(tracer)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, [0, 0, 2**70]])
def test_an_int_that_needs_more_than_64_bits_is_refused(value: Any, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": "int"}])
    with refused(ValueError, TypeError):
        tracer(*batch(3), field=value)
    nothing_visible(tracer)


@pytest.mark.parametrize("value", [3, [1, 2, 3], [1, 0.5, 2]])
def test_an_int_is_accepted_for_float(value: Any, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "field", "type": "float"}])
    tracer(*batch(3), field=value)
    tracer.flush()
    expected = value if isinstance(value, list) else [value] * 3
    assert [plain(v) for v in recorded()] == expected
    assert open_trace("net", "v1").arrays("extracted_feature")["field"].dtype == np.float64


@pytest.mark.parametrize(
    "field",
    [
        {"name": "field"},
        {"type": "int"},
        {"name": "field", "type": "integer"},
        {"name": "field", "type": int},
        {"name": 3, "type": "int"},
        {"name": "field", "type": "int", "defualt": 3},
        {"name": "field", "type": "int", "default": "3"},
        {"name": "field", "type": "tensor", "dtype": "float33"},
        {"name": "field", "type": "tensor", "shape": [-2]},
        "field",
    ],
)
def test_a_malformed_field_is_refused(field: Any, make_tracer: Any, store: Any) -> None:
    with refused(ValueError, TypeError):
        make_tracer(additional_fields=[field])
    assert not store.exists()


def test_label_fields_go_to_the_ground_truth_table(make_tracer: Any) -> None:
    tracer = make_tracer(additional_label_fields=[{"name": "annotator", "type": "str"}])
    x, y, ids = batch(3)
    tracer(x, y, ids, annotator=["ann", "bob", "eve"])
    tracer.flush()
    trace = open_trace("net", "v1")
    assert "annotator" in trace.columns("ground_truth")
    assert "annotator" not in trace.columns("extracted_feature")
    assert by_id(trace.arrays("ground_truth"), "annotator") == dict(
        zip(ids, ["ann", "bob", "eve"], strict=True)
    )


def test_label_fields_are_ignored_in_calls_without_ground_truth(make_tracer: Any) -> None:
    tracer = make_tracer(additional_label_fields=[{"name": "annotator", "type": "str"}])
    x, y, ids = batch(3, 0)
    tracer(x, None, ids)
    tracer(x, None, ids, annotator="ann")
    tracer.flush()
    assert rows_of() == 6
    assert rows_of(table="ground_truth") == 0
    with refused(errors.InvalidInputError):
        tracer(x, y, ids)
    nothing_visible(tracer, rows=6)
