"""Reading a trace: order, selection, dtypes, shapes; of traces that are written from the format document."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger.errors import (
    CorruptDataError,
    InvalidInputError,
    InvalidTypeError,
    NotFoundError,
    StorageError,
)
from ml_debugger.trace import Trace, open_trace

TABLES = ("extracted_feature", "ground_truth")


def features(*rows: float) -> dict[str, Column]:
    return {"features": Column(np.array([[row, -row] for row in rows], "<f4"))}


def labels(*rows: int) -> dict[str, Column]:
    return {"label": Column(np.array(rows, "<i8"))}


def opened(writer: FormatWriter) -> Trace:
    writer.write()
    return open_trace("model", "v1", data_dir=writer.directory.parent.parent)


def order(trace: Trace, table: str = "extracted_feature", **selection: object) -> list[str]:
    return trace.tensors(table, columns=["input_id"], **selection)["input_id"]


def test_rows_are_ordered_by_epoch_attempt_call_and_rank(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    places = [
        (1, 0, 5, 0),
        (0, 1, 2, 0),
        (0, 0, 7, 1),
        (0, 0, 7, 0),
        (0, 0, 3, 1),
        (None, 0, 9, 0),
        (0, 0, 10, 0),
    ]
    for epoch, attempt, call, rank in places:
        name = f"{-1 if epoch is None else epoch}/{attempt}/{call:02d}/{rank}"
        writer.call(call, [name], features(call), labels(rank), epoch=epoch, attempt=attempt, rank=rank)
    trace = opened(writer)
    expected = ["-1/0/09/0", "0/0/03/1", "0/0/07/0", "0/0/07/1", "0/0/10/0", "0/1/02/0", "1/0/05/0"]
    assert order(trace) == expected
    assert order(trace, "ground_truth") == expected
    arrays = trace.arrays("extracted_feature")
    assert arrays["n_epoch"].tolist() == [-1, 0, 0, 0, 0, 0, 1]
    np.testing.assert_array_equal(arrays["row_id"], trace.arrays("ground_truth")["row_id"])
    assert trace.epochs == [-1, 0, 1]
    assert trace.attempts == [0, 1]


def test_segments_of_one_rank_that_overlap_are_merged_by_call(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for call, sequence in [(0, 0), (2, 0), (4, 0), (1, 1), (3, 1), (5, 1)]:
        writer.call(call, [str(call)], features(call), sequence=sequence)
    assert order(opened(writer)) == ["0", "1", "2", "3", "4", "5"]


def test_a_call_in_two_segments_counts_once(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1), labels(1))
    for sequence in (0, 1):
        writer.call(1, ["b", "c"], features(2, 3), labels(2, 3), sequence=sequence, first_row=1)
    trace = opened(writer)
    assert trace.num_rows("extracted_feature") == trace.num_rows("ground_truth") == 3
    assert trace.arrays("extracted_feature")["row_id"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(trace.arrays("extracted_feature")["features"][:, 0], [1, 2, 3])


def test_chunks_may_lie_in_an_earlier_segment_in_pieces_or_inline(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    values = np.arange(999, dtype="<f8").reshape(3, 333)
    columns = {"features": Column(values), "logits": Column(values[:, :2])}
    writer.segment(0, sequence=0)
    writer.call(
        0, list("abc"), columns, sequence=1, chunk_sequence=0, pieces=7, inline=["logits", "input_id"]
    )
    arrays = opened(writer).arrays("extracted_feature")
    np.testing.assert_array_equal(arrays["features"], values)
    np.testing.assert_array_equal(arrays["logits"], values[:, :2])


def test_more_headers_than_one_step_are_all_read(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for call in range(700):
        writer.call(call * 3, [str(call)], features(call), dataset_type="val" if call % 2 else "train")
    trace = opened(writer)
    np.testing.assert_array_equal(trace.arrays("extracted_feature")["features"][:, 0], np.arange(700))
    assert order(trace, dataset_type="val") == [str(call) for call in range(1, 700, 2)]
    assert trace.num_rows("extracted_feature", dataset_type="test") == 0


def test_epochs_select_rows_and_an_absent_one_is_empty(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1), labels(1), epoch=3)
    writer.call(1, ["b"], features(2), epoch=None)
    trace = opened(writer)
    assert order(trace, n_epoch=3) == ["a"]
    assert order(trace, n_epoch=np.int64(-1)) == ["b"]
    assert trace.num_rows("ground_truth") == 1
    assert trace.num_rows("ground_truth", n_epoch=-1) == 0
    empty = trace.arrays("extracted_feature", n_epoch=7)
    assert {name: values.shape for name, values in empty.items()} == {
        "row_id": (0,), "input_id": (0,), "dataset_type": (0,), "n_epoch": (0,), "features": (0, 2),
    }  # fmt: skip
    assert empty["features"].dtype == np.float32
    assert list(trace.iter_batches("extracted_feature", n_epoch=7)) == []
    assert trace.tensors("extracted_feature", n_epoch=7)["features"].shape == (0, 2)


@pytest.mark.parametrize("n_epoch", [True, np.True_, 1.0, "1", b"1", [1], 1 + 0j])
def test_an_epoch_that_is_no_int_is_refused(tmp_path: Path, n_epoch: object) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1))
    trace = opened(writer)
    for read in (trace.num_rows, trace.arrays, trace.tensors, trace.iter_batches):
        with pytest.raises(InvalidTypeError, match="n_epoch must be an int"):
            read("extracted_feature", n_epoch=n_epoch)


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1))
    trace = opened(writer)
    for read in (trace.num_rows, trace.arrays, trace.tensors, trace.iter_batches):
        with pytest.raises(InvalidInputError, match="at least -1"):
            read("extracted_feature", n_epoch=-2)
        with pytest.raises(InvalidInputError, match=r"no table 'features'.*extracted_feature"):
            read("features")
        with pytest.raises(InvalidTypeError, match="dataset_type"):
            read("extracted_feature", dataset_type=1)
    with pytest.raises(InvalidInputError):
        trace.columns("labels")
    for read in (trace.arrays, trace.tensors, trace.iter_batches):
        with pytest.raises(InvalidInputError, match=r"no column 'logit'.*'features'"):
            read("extracted_feature", columns=["logit"])
        with pytest.raises(InvalidTypeError, match=r"pass \['features'\]"):
            read("extracted_feature", columns="features")
    with pytest.raises(InvalidInputError, match="batch_size"):
        trace.iter_batches("extracted_feature", batch_size=0)
    with pytest.raises(InvalidTypeError, match="batch_size"):
        trace.iter_batches("extracted_feature", batch_size=2.0)


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], {**features(1), "logits": Column(np.ones((1, 2), "<f4"))})
    trace = opened(writer)
    assert trace.columns("extracted_feature") == [
        "row_id",
        "input_id",
        "dataset_type",
        "n_epoch",
        "features",
        "logits",
    ]
    assert list(trace.arrays("extracted_feature", columns=["logits", "input_id"])) == ["logits", "input_id"]
    assert trace.arrays("extracted_feature", columns=[]) == {}


def test_a_trace_without_ground_truth_has_an_empty_table(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1))
    trace = opened(writer)
    assert trace.num_rows("ground_truth") == 0
    assert trace.columns("ground_truth") == ["row_id", "input_id", "dataset_type", "n_epoch", "label"]
    assert all(len(values) == 0 for values in trace.arrays("ground_truth").values())


def test_a_trace_that_recorded_nothing_is_empty(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path, aliases=["hidden"], fields=[{"name": "camera", "type": "str"}])
    trace = opened(writer)
    assert trace.epochs == [] and trace.attempts == []
    assert trace.columns("extracted_feature")[4:] == ["hidden", "logits", "camera"]
    assert trace.arrays("extracted_feature")["camera"].shape == (0,)


def test_an_unknown_trace_is_not_found_and_nothing_is_made(tmp_path: Path) -> None:
    data_dir = tmp_path / "none"
    with pytest.raises(NotFoundError, match="no trace"):
        open_trace("model", "v1", data_dir=data_dir)
    with pytest.raises(KeyError):
        open_trace("model", "../../x", data_dir=data_dir)
    assert not data_dir.exists()


def test_text_is_numpy_text_unless_it_is_wide_or_ends_in_nul(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    texts = {"plain": ["", "äöü", "x" * 256], "wide": ["", "b", "x" * 257], "nul": ["a\0", "b", "c"]}
    writer.call(0, ["", "1", "2"], {name: Column(values, "str") for name, values in texts.items()})
    trace = opened(writer)
    arrays = trace.arrays("extracted_feature")
    assert (
        arrays["plain"].dtype == "<U256" and arrays["wide"].dtype == object and arrays["nul"].dtype == object
    )
    for name, values in texts.items():
        assert arrays[name].tolist() == values
        assert trace.tensors("extracted_feature")[name] == values


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_comes_back_bit_for_bit_and_widens_without_loss(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    generator = np.random.default_rng(7)
    names = [
        "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "complex32", "bool",
        "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    ]  # fmt: skip
    recorded = {}
    for name in names:
        width = getattr(torch, name).itemsize
        raw = generator.integers(0, 2 if name == "bool" else 256, (5, 3, width), dtype=np.uint8)
        recorded[name] = torch.from_numpy(raw).view(getattr(torch, name))[..., 0]
        writer.version["aliases"][name] = name
    columns = {name: Column(_raw(tensor), dtype=name) for name, tensor in recorded.items()}
    writer.call(0, list("abcde"), columns, pieces=2)
    trace = opened(writer)
    tensors, arrays = trace.tensors("extracted_feature"), trace.arrays("extracted_feature")
    wide = {"bfloat16": torch.float32, "complex32": torch.complex64}
    for name, tensor in recorded.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(_raw(tensors[name]), _raw(tensor), err_msg=name)
        expected = tensor.to(torch.float32 if "float8" in name else wide.get(name, tensor.dtype)).numpy()
        assert arrays[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(arrays[name], expected, err_msg=name)


def _raw(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return (
        tensor.view(torch.uint8).reshape(*tensor.shape, -1).numpy().view(f"V{tensor.element_size()}")[..., 0]
    )


def test_broadcast_columns_are_repeated_for_every_row(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    columns = {
        "count": Column(np.array([7], "<i8"), "int", broadcast=True),
        "camera": Column(["left"], "str", broadcast=True),
    }
    writer.call(0, list("abc"), {**features(1, 2, 3), **columns})
    arrays = opened(writer).arrays("extracted_feature")
    assert arrays["count"].tolist() == [7, 7, 7]
    assert arrays["camera"].tolist() == ["left"] * 3


def test_rows_of_differing_shape_are_object_arrays_and_lists(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    within = [np.arange(6, dtype="<f4").reshape(2, 3), np.array(5, "<f4"), np.empty((0, 4), "<f4")]
    writer.call(0, list("abc"), {"features": Column(within), "length": Column(np.zeros((3, 2), "<f4"))})
    writer.call(
        1, list("de"), {"features": Column(np.ones((2, 7), "<f4")), "length": Column(np.zeros((2, 4), "<f4"))}
    )
    trace = opened(writer)
    expected = [*within, np.ones(7, "<f4"), np.ones(7, "<f4")]
    array = trace.arrays("extracted_feature")["features"]
    assert array.dtype == object and array.shape == (5,)
    for found, tensor, value in zip(
        array, trace.tensors("extracted_feature")["features"], expected, strict=True
    ):
        np.testing.assert_array_equal(found, value)
        assert found.shape == value.shape and tuple(tensor.shape) == value.shape
    assert [row.shape for row in trace.arrays("extracted_feature")["length"]] == [(2,)] * 3 + [(4,)] * 2
    batches = list(trace.iter_batches("extracted_feature", batch_size=2, columns=["length"]))
    assert [batch["length"].dtype for batch in batches] == [object] * 3


def test_a_column_that_some_calls_lack_has_none_there(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1))
    writer.call(1, ["b"], {**features(2), "features.1": Column(np.ones((1, 2), "<f4"))})
    trace = opened(writer)
    array = trace.arrays("extracted_feature")["features.1"]
    assert array[0] is None and array[1].tolist() == [1, 1]
    assert trace.tensors("extracted_feature")["features.1"][0] is None


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ("<f2", "<f4", "f4"),
        ("<i4", "<f8", "f8"),
        ("?", "i1", "i1"),
        ("u1", "<i2", "i2"),
        ("<f4", "<c8", "c8"),
    ],
)
def test_several_dtypes_take_the_common_one_where_nothing_is_lost(
    tmp_path: Path, first: str, second: str, common: str
) -> None:
    writer = FormatWriter(tmp_path)
    for call, dtype in enumerate((first, second)):
        writer.call(call, ["a", "b"], {"features": Column(np.array([0, 1], dtype))})
    array = opened(writer).arrays("extracted_feature")["features"]
    assert array.dtype == np.dtype(common) and array.tolist() == [0, 1, 0, 1]


def test_several_dtypes_that_would_be_rounded_are_refused_by_name(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], {"features": Column(np.array([2**60 + 1], "<i8"))})
    writer.call(1, ["b"], {"features": Column(np.array([0.5], "<f8"))}, dataset_type="val")
    trace = opened(writer)
    with pytest.raises(StorageError, match=r"'features'.*float64, int64"):
        trace.arrays("extracted_feature")
    with pytest.raises(StorageError, match="float64, int64"):
        trace.iter_batches("extracted_feature")
    with pytest.raises(StorageError, match="float64, int64") as caught:
        trace.tensors("extracted_feature")
    assert "tensors" not in caught.value.hint  # it names only what helps
    assert trace.arrays("extracted_feature", dataset_type="train")["features"].tolist() == [2**60 + 1]
    assert trace.arrays("extracted_feature", columns=["input_id"])["input_id"].tolist() == ["a", "b"]


def test_half_types_widen_to_a_common_type(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], {"features": Column(np.array([0x3F80], "<u2"), dtype="bfloat16")})
    writer.call(1, ["b"], {"features": Column(np.array([0.5], "<f2"))})
    trace = opened(writer)
    assert trace.arrays("extracted_feature")["features"].tolist() == [1.0, 0.5]
    assert trace.tensors("extracted_feature")["features"].dtype == torch.float32


def test_dedupe_keeps_the_newest_row_of_a_sample_within_an_epoch(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(5, ["a", "b", "a"], features(1, 2, 3), labels(1, 2, 3))
    writer.call(0, ["b"], features(4), labels(4), attempt=1)
    writer.call(5, ["a"], features(5), labels(5), rank=1)
    writer.call(6, ["a"], features(6), labels(6), dataset_type="val")
    writer.call(7, ["a"], features(7), labels(7), epoch=1)
    writer.call(8, ["a", "a"], features(8, 9), labels(8, 9), epoch=None)
    trace = opened(writer)
    for table, column in (("extracted_feature", "features"), ("ground_truth", "label")):
        newest = trace.arrays(table, dedupe=True)
        assert newest[column].reshape(len(newest["row_id"]), -1)[:, 0].tolist() == [8, 9, 5, 6, 4, 7]
        assert trace.num_rows(table) == 9
        assert trace.num_rows(table, dedupe=True) == 6
    batches = trace.iter_batches("extracted_feature", dedupe=True, batch_size=4)
    assert [len(batch["input_id"]) for batch in batches] == [4, 2]


def test_a_ground_truth_row_goes_with_its_feature_row(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a", "b"], features(1, 2), labels(1, 2))
    writer.call(1, ["a"], features(3))
    trace = opened(writer)
    truth = trace.arrays("ground_truth", dedupe=True)
    assert truth["label"].tolist() == [2]
    assert set(truth["row_id"]) <= set(trace.arrays("extracted_feature", dedupe=True)["row_id"])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_batches_are_the_rows_in_order(tmp_path: Path, batch_size: int) -> None:
    writer = FormatWriter(tmp_path)
    for call in range(6):
        writer.call(
            call, [f"{call}-{row}" for row in range(call + 1)], features(*range(call + 1)), epoch=call // 3
        )
    trace = opened(writer)
    batches = list(trace.iter_batches("extracted_feature", batch_size=batch_size))
    whole = trace.arrays("extracted_feature")
    assert [len(batch["row_id"]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), values)


def test_an_open_iterator_over_a_dropped_epoch_is_not_found(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a", "b", "c"], features(1, 2, 3), epoch=1)
    writer.call(1, ["d"], features(4), epoch=2)
    trace = opened(writer)
    started = trace.iter_batches("extracted_feature", batch_size=1)
    waiting = trace.iter_batches("extracted_feature", n_epoch=1)
    other = trace.iter_batches("extracted_feature", n_epoch=2)
    next(started)
    shutil.rmtree(writer.directory / "rank-00000" / "epoch-1")
    for iterator in (started, waiting):
        with pytest.raises(NotFoundError, match="epoch 1 of rank 0 was dropped"):
            next(iterator)
    assert next(other)["input_id"].tolist() == ["d"]
    assert trace.epochs == [2] and order(trace) == ["d"]


def test_a_segment_from_before_a_power_cut_is_left_out_with_a_warning(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1))
    writer.write(sealed=False, durability="process", boot_id="another boot")
    (writer.directory / "rank-00000" / "epoch-0" / "a00000-s00000" / "data.mdb").write_bytes(b"torn")
    trace = open_trace("model", "v1", data_dir=tmp_path)
    with pytest.warns(UserWarning, match="lost power"):
        assert trace.num_rows("extracted_feature") == 0


def test_gaps_are_no_rows(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1))
    writer.gap(1, 4, 40)
    writer.call(5, ["b"], features(2))
    writer.gap(9, 9, 10, "stall", epoch=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = opened(writer)
        assert order(trace) == ["a", "b"]
        assert trace.epochs == [0]


def test_a_damaged_chunk_is_corrupt_data(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], features(1.0))
    segment = writer.segment(0)
    key, data = segment.chunks[-1]
    segment.chunks[-1] = (key, b"\xff" + data[1:])
    trace = opened(writer)
    with pytest.raises(CorruptDataError):
        trace.arrays("extracted_feature", columns=["features"])
