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
    id_texts,
    parse_ids,
    parse_labels,
    require_epoch,
    select_epoch,
    select_ids,
)
from ml_debugger.tracer.outputs import dtype_name
from ml_debugger.tracer.sampling import SampleFilter

IDS = [
    (["a", "b"], ["a", "b"]),
    (("a", ""), ["a", ""]),
    ([1, -2], ["1", "-2"]),
    ([1, "b"], ["1", "b"]),
    ([10**30], [str(10**30)]),
    ([2**63, -(2**63)], ["9223372036854775808", "-9223372036854775808"]),
    (range(3), ["0", "1", "2"]),
    (range(2**63, 2**63 + 1), ["9223372036854775808"]),
    (range(0), []),
    (np.array([1, 2], ">u8"), ["1", "2"]),
    (np.array([2**64 - 1], np.uint64), ["18446744073709551615"]),
    (np.arange(6)[::-2], ["5", "3", "1"]),
    (np.array([1, 2], np.uint8), ["1", "2"]),
    (np.array(["x", "ü"]), ["x", "ü"]),
    (np.array(["x", 3], dtype=object), ["x", "3"]),
    ([np.str_("x"), np.int64(3)], ["x", "3"]),
    (torch.tensor([5, 6], dtype=torch.int16), ["5", "6"]),
    (torch.tensor([-1]).view(torch.uint64), ["18446744073709551615"]),
    (torch.arange(6)[::2], ["0", "2", "4"]),
    ([torch.tensor(5), torch.tensor(6)], ["5", "6"]),
    ([torch.tensor(5), torch.tensor(6, dtype=torch.int8), 7, "8"], ["5", "6", "7", "8"]),
    ([torch.tensor(5, dtype=torch.uint16)], ["5"]),
    ([], []),
]


@pytest.mark.parametrize(("given_ids", "expected"), IDS, ids=str)
def test_ids_become_text(given_ids: Any, expected: list[str]) -> None:
    assert id_texts(parse_ids(given_ids)) == expected


INTEGERS = [
    (range(3), torch.int64),
    ([1, np.int64(2)], torch.int64),
    (np.array([1, 2], np.uint8), torch.uint8),
    (np.array([1, 2], ">u4"), torch.uint32),
    (torch.tensor([5, 6], dtype=torch.int16), torch.int16),
    ([torch.tensor(5, dtype=torch.int8), torch.tensor(6, dtype=torch.int8)], torch.int8),
]


@pytest.mark.parametrize(("given_ids", "dtype"), INTEGERS, ids=str)
def test_integer_ids_stay_integers_in_their_dtype(given_ids: Any, dtype: torch.dtype) -> None:
    ids = parse_ids(given_ids)
    assert isinstance(ids, torch.Tensor)
    assert (type(ids), ids.dtype, ids.is_contiguous()) == (torch.Tensor, dtype, True)
    assert id_texts(select_ids(ids, [1])) == [str(int(given_ids[1]))]


@pytest.mark.parametrize("given_ids", [["a", "b"], [1, 2], np.array([1, 2]), torch.tensor([1, 2])], ids=repr)
def test_ids_share_no_memory_with_what_was_given(given_ids: Any) -> None:
    before = list(map(str, np.asarray(given_ids)))
    ids = parse_ids(given_ids)
    given_ids[0] = given_ids[1]
    assert id_texts(ids) == before


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
        [torch.zeros(1, dtype=torch.int64)],
        [np.timedelta64(1)],
        [torch.tensor(True), torch.tensor(False)],
        [1, True],
        [1, 1.0],
    ],
    ids=str,
)
def test_other_ids_are_refused_by_type(given_ids: Any) -> None:
    with pytest.raises(InvalidTypeError):
        parse_ids(given_ids)


@pytest.mark.parametrize(
    "given_ids",
    [["a\0"], ["\ud800"], np.zeros((2, 2), int), torch.tensor(3)],
    ids=repr,
)
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
    ([torch.tensor(1, dtype=torch.uint8)] * 3, "int64", (3,)),
    ([torch.tensor(1, dtype=torch.uint64)] * 3, "int64", (3,)),
    ([torch.tensor(1.0), torch.tensor(2), torch.tensor(0)], "float64", (3,)),
    ([torch.ones(2, dtype=torch.bfloat16)] * 3, "float64", (3, 2)),
    ([torch.tensor(True)] * 3, "bool", (3,)),
    ([torch.tensor(1j)] * 3, "complex128", (3,)),
    ([True, False, True], "bool", (3,)),
]


@pytest.mark.parametrize(("labels", "dtype", "shape"), LABELS, ids=str)
def test_labels_keep_their_dtype_and_shape(labels: Any, dtype: str, shape: tuple[int, ...]) -> None:
    parsed = parse_labels(labels, 3)
    assert (dtype_name(parsed.dtype), tuple(parsed.shape)) == (dtype, shape)
    as_listed = [value.tolist() if isinstance(value, torch.Tensor) else value for value in labels]
    assert parsed.tolist() == np.asarray(as_listed).tolist()


def test_labels_of_an_array_that_may_not_be_written_are_copied() -> None:
    labels = np.arange(3)
    labels.flags.writeable = False
    assert parse_labels(labels, 3).tolist() == [0, 1, 2]


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
