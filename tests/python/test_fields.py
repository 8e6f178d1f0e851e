"""Additional fields: specifications, names, and the values that calls bring."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.tracer.fields import Field, FieldValue, parse_fields
from ml_debugger.tracer.names import check_column_names

BATCH = 3


def field(kind: str, **more: Any) -> Field:
    return parse_fields([{"name": "f", "type": kind, **more}], "additional_fields")[0]


def parse(kind: str, value: Any, rows: list[int] | None = None, **more: Any) -> FieldValue:
    return field(kind, **more).parse(value, BATCH, rows)


def listed(value: FieldValue) -> list[Any]:
    """What a reader would get back, one entry for each stored sample."""
    if isinstance(value.payload, bytes):
        unpacked: list[Any] = msgpack.unpackb(value.payload)
        return unpacked
    return value.payload.tolist()


ACCEPTED = [
    ("int", 7, [7]),
    ("int", np.uint8(7), [7]),
    ("int", [1, -2, 3], [1, -2, 3]),
    ("int", np.array([1, 2, 3], np.uint64), [1, 2, 3]),
    ("int", torch.tensor([1, 2, 3], dtype=torch.int8), [1, 2, 3]),
    ("int", torch.tensor([1, 2, 3]).view(torch.uint64), [1, 2, 3]),
    ("int", torch.arange(6)[::2], [0, 2, 4]),
    ("int", torch.tensor(5), [5]),
    ("int", np.array(5, ">i2"), [5]),
    ("int", [torch.tensor(5), torch.tensor(6), torch.tensor(7)], [5, 6, 7]),
    ("int", [torch.tensor(5), 6, torch.tensor(7, dtype=torch.uint64)], [5, 6, 7]),
    ("float", [torch.tensor(0.5), torch.tensor(2), 1], [0.5, 2.0, 1.0]),
    ("float", torch.tensor([2**53 + 1, 2**62 + 1, 3]), [float(2**53), float(2**62), 3.0]),
    ("float", torch.tensor(0.5, dtype=torch.float16), [0.5]),
    ("float", torch.tensor([-1, 2, 3]).view(torch.uint64), [float(2**64 - 1), 2.0, 3.0]),
    ("float", np.array([2**64 - 1, 2**53 + 1, 3], np.uint64), [float(2**64 - 1), float(2**53), 3.0]),
    ("bool", np.array([True, False, True]), [True, False, True]),
    ("str", np.array(["a", "b", "c"], dtype=object), ["a", "b", "c"]),
    ("str", np.array("abc"), ["abc"]),
    ("float", 0.5, [0.5]),
    ("float", 2, [2.0]),
    ("float", [1, 2.5, np.float32(0.5)], [1.0, 2.5, 0.5]),
    ("float", np.array([1, 2, 3], np.float16), [1.0, 2.0, 3.0]),
    ("float", torch.tensor([1, 2, 3], dtype=torch.bfloat16), [1.0, 2.0, 3.0]),
    ("bool", True, [True]),
    ("bool", [True, np.bool_(False), True], [True, False, True]),
    ("bool", torch.tensor([True, False, True]), [True, False, True]),
    ("str", "abc", ["abc"]),
    ("str", ["", "ü\0", "c"], ["", "ü\0", "c"]),
    ("str", np.array(["a", "b", "c"]), ["a", "b", "c"]),
    ("bytes", b"\0\xff", [b"\0\xff"]),
    ("bytes", [b"", bytearray(b"a"), b"b"], [b"", b"a", b"b"]),
]


@pytest.mark.parametrize(("kind", "value", "stored"), ACCEPTED, ids=str)
def test_value_is_stored_as_it_is(kind: str, value: Any, stored: list[Any]) -> None:
    parsed = parse(kind, value)
    assert listed(parsed) == stored
    assert parsed.broadcast == (len(stored) == 1)


WRONG = [
    ("int", 1.0),
    ("int", True),
    ("int", "1"),
    ("int", [1, 2, True]),
    ("int", np.timedelta64(1)),
    ("float", [0.5, np.timedelta64(1), 0.5]),
    ("tensor", np.zeros((3, 2), np.longdouble)),
    ("int", [torch.zeros(1, dtype=torch.int64)] * 3),
    ("int", [torch.tensor(1.0)] * 3),
    ("int", torch.tensor([True, False, True])),
    ("str", torch.tensor([1, 2, 3])),
    ("int", None),
    ("int", torch.tensor([1.0, 2.0, 3.0])),
    ("int", np.array([True, False, True])),
    ("float", True),
    ("float", "0.5"),
    ("float", [0.5, None, 1.0]),
    ("float", torch.tensor([True, False, True])),
    ("bool", 1),
    ("bool", np.array([1, 0, 1])),
    ("str", 1),
    ("str", b"a"),
    ("str", ["a", "b", 3]),
    ("bytes", "a"),
    ("bytes", [b"a", b"b", "c"]),
    ("tensor", [1, 2, 3]),
    ("tensor", 1.0),
    ("tensor", np.array(["a", "b", "c"])),
]


@pytest.mark.parametrize(("kind", "value"), WRONG, ids=str)
def test_another_type_is_refused(kind: str, value: Any) -> None:
    with pytest.raises(InvalidTypeError, match="'f'"):
        parse(kind, value)


OUT_OF_RANGE = [
    ("int", [1, 2]),
    ("int", 1 << 63),
    ("int", torch.tensor([-1, 2, 3]).view(torch.uint64)),
    ("int", np.array([2**63, 2, 3], np.uint64)),
    ("int", torch.zeros(3, 2, dtype=torch.int64)),
    ("int", torch.zeros(2, dtype=torch.int64)),
    ("int", np.zeros((3, 2), int)),
    ("float", 10**400),
    ("str", ["a"] * 4),
    ("str", "\ud800"),
    ("tensor", torch.zeros(2, 5)),
    ("tensor", torch.tensor(1.0)),
    ("tensor", [torch.zeros(1)] * 2),
    ("tensor", [torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64)]),
    ("tensor", torch.zeros(3, 2).to_sparse()),
]


@pytest.mark.parametrize(("kind", "value"), OUT_OF_RANGE, ids=str)
def test_another_length_shape_or_range_is_refused(kind: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match="'f'"):
        parse(kind, value)


NUMBER_DTYPES = {"int": "int64", "float": "float64", "bool": "bool"}


@pytest.mark.parametrize("kind", NUMBER_DTYPES)
@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_numbers_take_the_dtype_of_the_field_in_whatever_form_they_come(kind: str, form: Any) -> None:
    one = kind == "bool" or 1
    single = one if form is list else form(one)
    for given, shape in ((form([one] * BATCH), (BATCH,)), (single, (1,))):
        value = parse(kind, given)
        assert (value.dtype, value.shape, value.broadcast) == (NUMBER_DTYPES[kind], shape, shape == (1,))
        assert isinstance(value.payload, torch.Tensor)
        assert value.payload.dtype == getattr(torch, NUMBER_DTYPES[kind])


def test_int64_limits_are_kept() -> None:
    limits = [-(1 << 63), (1 << 63) - 1, 0]
    assert listed(parse("int", limits)) == limits


def test_a_tensor_is_one_a_sample_unless_its_whole_shape_is_the_fixed_one() -> None:
    assert parse("tensor", torch.zeros(3, 2)).shape == (3, 2)
    one = parse("tensor", torch.zeros(3, 2), shape=[3, 2])
    assert (one.shape, one.broadcast) == ((1, 3, 2), True)
    many = parse("tensor", torch.zeros(3, 3, 2), shape=(3, 2))
    assert (many.shape, many.broadcast) == ((3, 3, 2), False)


def test_fixed_dtype_and_shape_are_checked() -> None:
    assert parse("tensor", torch.zeros(3, 2), dtype="float32", shape=[2]).dtype == "float32"
    with pytest.raises(InvalidTypeError, match="float64"):
        parse("tensor", torch.zeros(3, 2, dtype=torch.float64), dtype="float32")
    with pytest.raises(InvalidInputError, match=r"\(3, 2\)"):
        parse("tensor", torch.zeros(3, 4), shape=[2])


def test_samples_of_differing_shape_keep_their_shapes() -> None:
    value = parse("tensor", [torch.arange(2.0), torch.ones(1, 3), torch.tensor(9.0)])
    assert value.shape is None
    assert value.shapes is not None
    assert value.shapes.tolist() == [[-1, 2], [1, 3], [-1, -1]]
    assert listed(value) == [0, 1, 1, 1, 1, 9]


def test_sampled_rows_are_selected() -> None:
    assert listed(parse("int", [1, 2, 3], rows=[0, 2])) == [1, 3]
    assert listed(parse("int", torch.tensor([1, 2, 3]), rows=[0, 2])) == [1, 3]
    assert listed(parse("float", np.array([1, 2, 3]), rows=[2])) == [3.0]
    assert listed(parse("str", ["a", "b", "c"], rows=[1])) == ["b"]
    assert parse("tensor", torch.arange(3), rows=[2]).payload.tolist() == [2]
    assert parse("tensor", [torch.zeros(1), torch.ones(2), torch.ones(2)], rows=[1, 2]).shape == (2, 2)
    assert parse("int", 5, rows=[1, 2]).broadcast


def test_a_default_stands_for_all_samples() -> None:
    default = field("str", default="unknown").default
    assert default is not None
    assert (listed(default), default.broadcast) == (["unknown"], True)
    given = torch.ones(2)
    default = field("tensor", default=given).default
    given.zero_()
    assert default is not None
    assert default.payload.tolist() == [[1.0, 1.0]]
    assert field("int").default is None
    with pytest.raises(InvalidTypeError):
        field("int", default="none")


BAD_SPECIFICATIONS: list[tuple[Any, type[Exception]]] = [
    ("camera", InvalidTypeError),
    ([3], InvalidTypeError),
    ([{"name": "a"}], InvalidInputError),
    ([{"type": "str"}], InvalidInputError),
    ([{"name": "a", "type": "text"}], InvalidInputError),
    ([{"name": "a", "type": str}], InvalidTypeError),
    ([{"name": "a", "type": "str", "kind": 1}], InvalidInputError),
    ([{"name": "a", "type": "int", "dtype": "int64"}], InvalidInputError),
    ([{"name": "a", "type": "tensor", "dtype": "float33"}], InvalidInputError),
    ([{"name": "a", "type": "tensor", "shape": [-1]}], InvalidInputError),
    ([{"name": "a", "type": "tensor", "shape": 3}], InvalidTypeError),
    ([{"name": 3, "type": "str"}], InvalidTypeError),
]


@pytest.mark.parametrize(("specifications", "error"), BAD_SPECIFICATIONS, ids=str)
def test_bad_specification_is_refused(specifications: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_fields(specifications, "additional_fields")


BAD_NAMES = ["", "a" * 101, "a/b", "a\\b", "a..b", "a\nb", "a\x7f", "\ud800", "input_id", "label", "row_id"]
BAD_NAMES += ["model_input", "ground_truth", "input_ids", "dataset_type", "n_epoch", "logits", "self"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_bad_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_fields([{"name": name, "type": "int"}], "additional_fields")


@pytest.mark.parametrize(
    "names", [["a", "a"], ["a", "a.1"], ["x.values", "x"], ["logits.shapes"], ["a.b", "a.b.12"]]
)
def test_repeated_and_derived_names_are_refused(names: list[str]) -> None:
    with pytest.raises(InvalidInputError):
        check_column_names(names)


def test_a_derived_name_without_its_base_is_fine() -> None:
    check_column_names(["layer.1", "other.values", "layer.one"])
