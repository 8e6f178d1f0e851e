"""Ids, labels, epochs and dataset types of a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.tracer.inputs import (
    check_dataset_type,
    check_epoch,
    parse_ids,
    parse_labels,
    require_epoch,
    select_epoch,
)
from ml_debugger.tracer.sampling import SampleFilter

IDS = [
    (["a", "b"], ["a", "b"]),
    (("a", ""), ["a", ""]),
    ([1, -2], ["1", "-2"]),
    ([1, "b"], ["1", "b"]),
    ([10**30], [str(10**30)]),
    (range(3), ["0", "1", "2"]),
    (np.array([1, 2], np.uint8), ["1", "2"]),
    (np.array(["x", "ü"]), ["x", "ü"]),
    (np.array(["x", 3], dtype=object), ["x", "3"]),
    ([np.str_("x"), np.int64(3)], ["x", "3"]),
    (torch.tensor([5, 6], dtype=torch.int16), ["5", "6"]),
    ([torch.tensor(5), torch.tensor(6)], ["5", "6"]),
    ([], []),
]


@pytest.mark.parametrize(("given_ids", "expected"), IDS, ids=str)
def test_ids_become_text(given_ids: Any, expected: list[str]) -> None:
    assert parse_ids(given_ids) == expected


@pytest.mark.parametrize(
    "given_ids",
    [
        "abc",
        b"abc",
        None,
        3,
        True,
        {"a": 1},
        {"a"},
        [True],
        [1.0],
        [None],
        [b"a"],
        [["a"]],
        np.array([1.0]),
        np.array([True]),
        np.array([b"a"]),
        torch.tensor([1.0]),
        torch.tensor([True]),
        [torch.tensor(1.0)],
    ],
    ids=str,
)
def test_other_ids_are_refused_by_type(given_ids: Any) -> None:
    with pytest.raises(InvalidTypeError):
        parse_ids(given_ids)


@pytest.mark.parametrize("given_ids", [["a\0"], ["\ud800"], np.zeros((2, 2), int), torch.tensor(3)], ids=repr)
def test_other_ids_are_refused_by_value(given_ids: Any) -> None:
    with pytest.raises(InvalidInputError):
        parse_ids(given_ids)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))))
def test_any_text_is_an_id(ids: list[str]) -> None:
    assert parse_ids(ids) == ids


LABELS = [
    ([1, 2, 3], "int64", (3,)),
    ([1, 2.5, 3], "float64", (3,)),
    ([[0.1, 0.9]] * 3, "float64", (3, 2)),
    ((1, 0, 1), "int64", (3,)),
    (np.array([1, 2, 3], ">i4"), "int32", (3,)),
    (np.array([1, 2, 3], np.float16), "float16", (3,)),
    (torch.zeros(3, dtype=torch.bfloat16), "bfloat16", (3,)),
    (torch.zeros(3, 7), "float32", (3, 7)),
    ([torch.tensor(1), torch.tensor(2), torch.tensor(0)], "int64", (3,)),
    ([True, False, True], "bool", (3,)),
]


@pytest.mark.parametrize(("labels", "dtype", "shape"), LABELS, ids=str)
def test_labels_keep_their_dtype_and_shape(labels: Any, dtype: str, shape: tuple[int, ...]) -> None:
    parsed = parse_labels(labels, 3)
    assert (parsed.dtype, parsed.shape) == (dtype, shape)
    assert np.asarray(torch.as_tensor(np.asarray(parsed.values.tolist()))).shape == shape


@pytest.mark.parametrize(
    "labels", [["a", "b", "c"], "abc", 3, {"a": 1}, np.array(["a"] * 3), [None] * 3, [b"a"] * 3], ids=str
)
def test_labels_of_other_types_are_refused(labels: Any) -> None:
    with pytest.raises(InvalidTypeError):
        parse_labels(labels, 3)


@pytest.mark.parametrize(
    "labels", [[1, 2], torch.zeros(()), torch.zeros(3, 2, 2), [[1], [1, 2], [3]], [10**30, 1, 2]], ids=str
)
def test_labels_of_other_shapes_are_refused(labels: Any) -> None:
    with pytest.raises(InvalidInputError):
        parse_labels(labels, 3)


@pytest.mark.parametrize("n_epoch", [True, 1.0, "1", np.bool_(True), np.float64(1)], ids=repr)
def test_an_epoch_is_an_int(n_epoch: Any) -> None:
    for check in (check_epoch, require_epoch, select_epoch):
        with pytest.raises(InvalidTypeError):
            check(n_epoch)


def test_epochs_count_from_zero_and_minus_one_selects_rows_without() -> None:
    assert (check_epoch(None), check_epoch(0), check_epoch(np.int32(7))) == (-1, 0, 7)
    assert (select_epoch(None), select_epoch(-1), select_epoch(3)) == (None, -1, 3)
    for check, value in ((check_epoch, -1), (require_epoch, -1), (select_epoch, -2), (check_epoch, 1 << 63)):
        with pytest.raises(InvalidInputError):
            check(value)
    with pytest.raises(InvalidTypeError):
        require_epoch(None)


def test_dataset_type_is_text() -> None:
    assert check_dataset_type("val") == "val"
    for value in (None, 3, b"val"):
        with pytest.raises(InvalidTypeError):
            check_dataset_type(value)
    with pytest.raises(InvalidInputError):
        check_dataset_type("\udfff")


def test_sampling_keeps_the_asked_fraction_of_ids_and_always_the_same() -> None:
    ids = [f"sample-{number}" for number in range(20_000)]
    rows = SampleFilter(0.25).rows(ids)
    assert abs(len(rows) / len(ids) - 0.25) < 0.02
    assert rows == SampleFilter(0.25).rows(ids)
    assert set(rows) <= set(SampleFilter(0.5).rows(ids))
    # Fixed for ever: other machines, and files of other versions, hold the same samples.
    assert [SampleFilter(0.5).keeps(str(number)) for number in range(8)] == [
        number in (2, 4, 6) for number in range(8)
    ]
