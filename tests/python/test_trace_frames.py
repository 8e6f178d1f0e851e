"""`to_arrow`, `to_arrow_reader`, `to_pandas`, and the filter by ids that all readers have."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger.errors import InvalidInputError, InvalidTypeError, NotFoundError, StorageError
from ml_debugger.exporting import export_trace
from ml_debugger.trace import Trace, load_export, open_trace
from test_export_zip import rich_trace

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")

FEATURES = "extracted_feature"


@pytest.fixture(params=["store", "npy", "parquet"])
def rich(request: pytest.FixtureRequest, tmp_path: Path) -> Trace:
    """The rich trace: from its store, and over its exports."""
    trace_dir = rich_trace(tmp_path / "data").write()
    if request.param == "store":
        return open_trace("model", "v1", data_dir=tmp_path / "data")
    return load_export(export_trace(trace_dir, tmp_path / "out.zip", format=request.param, dedupe=False))


def opened(writer: FormatWriter) -> Trace:
    writer.write()
    return open_trace("model", "v1", data_dir=writer.directory.parent.parent)


def call(writer: FormatWriter, number: int, values: Any, ids: str = "ab", **options: Any) -> None:
    column = values if isinstance(values, Column) else Column(values)
    writer.call(number, list(ids), {"features": column}, **options)


@pytest.mark.parametrize("selection", [{}, {"n_epoch": 1}, {"n_epoch": -1}, {"dedupe": True}, {"n_epoch": 9}])
def test_an_arrow_table_holds_what_the_arrays_hold(rich: Trace, selection: dict[str, Any]) -> None:
    for table in (FEATURES, "ground_truth"):
        arrays, found = rich.arrays(table, **selection), rich.to_arrow(table, **selection)
        assert found.column_names == [
            name
            for column in arrays
            for name in ([column, "ragged.shapes"] if column == "ragged" else [column])
        ]
        for name, values in arrays.items():
            rows = found.column(name).to_pylist()
            expected = [value.reshape(-1).tolist() if name == "ragged" else value for value in values]
            assert len(rows) == len(values)
            for row, value in zip(rows, expected, strict=True):
                np.testing.assert_array_equal(row, value)
        if "ragged" in arrays:
            assert found.column("ragged.shapes").to_pylist() == [list(row.shape) for row in arrays["ragged"]]


def test_arrow_types_are_those_that_the_contract_names(rich: Trace) -> None:
    schema = rich.to_arrow(FEATURES).schema
    assert schema.field("features").type == pa.list_(pa.field("item", pa.float32(), nullable=False), 4)
    assert schema.field("half").type.value_type == pa.float32()  # bfloat16, widened
    assert schema.field("input_id").type == schema.field("camera").type == pa.string()
    assert schema.field("blob").type == pa.binary()
    assert schema.field("row_id").type == schema.field("n_epoch").type == pa.int64()
    assert schema.field("flag").type == pa.bool_() and schema.field("weight").type == pa.float64()
    assert b'"bfloat16"' in schema.field("half").metadata[b"ml_debugger"]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 2)])
@pytest.mark.parametrize("dtype", ["<f4", "?", "<c8", "<u8", "<f2"])
def test_dimensions_become_nested_lists(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    writer = FormatWriter(tmp_path)
    values = np.arange(2 * int(np.prod(shape)), dtype="<f4").reshape(2, *shape).astype(dtype)
    call(writer, 0, values)
    column = opened(writer).to_arrow(FEATURES).column("features")
    expected = np.stack([values.real, values.imag], -1) if dtype == "<c8" else values
    assert column.to_pylist() == expected.tolist()
    assert pa.types.is_fixed_size_list(column.type) == (shape[0] > 0)


def test_a_row_without_the_column_is_null(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], {"features": Column(np.ones((1, 2), "<f4")), "camera": Column(["left"], "str")})
    call(writer, 1, np.ones((1, 3), "<f4"), "b")
    writer.call(2, ["c"], {"other": Column(np.ones(1, "<f4"))})
    found = opened(writer).to_arrow(FEATURES)
    assert found.column("features").to_pylist() == [[1, 1], [1, 1, 1], None]
    assert found.column("features.shapes").to_pylist() == [[2], [3], None]
    assert found.column("camera").to_pylist() == ["left", None, None]
    assert found.column("other").to_pylist() == [None, None, [1]]


def test_a_reader_gives_batches_of_the_size_asked_for(rich: Trace) -> None:
    whole = rich.to_arrow(FEATURES)
    reader = rich.to_arrow_reader(FEATURES, batch_size=5)
    batches = list(reader)
    assert reader.schema == whole.schema and max(batch.num_rows for batch in batches) <= 5
    assert pa.Table.from_batches(batches).equals(whole)


def test_a_reader_over_a_dropped_epoch_is_not_found(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(4):
        call(writer, number, np.ones((2, 2), "<f4"), epoch=number)
    reader = opened(writer).to_arrow_reader(FEATURES, batch_size=2)
    reader.read_next_batch()
    shutil.rmtree(writer.directory / "rank-00000" / "epoch-1")
    with pytest.raises(NotFoundError, match="epoch 1 of rank 0 was dropped"):
        list(reader)


def test_arrow_refuses_dtypes_that_have_no_common_one(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    call(writer, 0, np.array([2**60 + 1], "<i8"), "a")
    call(writer, 1, np.array([0.5], "<f8"), "b")
    with pytest.raises(StorageError, match="float64, int64"):
        opened(writer).to_arrow(FEATURES)


def test_a_data_frame_has_one_row_a_sample(rich: Trace) -> None:
    arrays, frame = rich.arrays(FEATURES), rich.to_pandas(FEATURES)
    assert list(frame.columns) == list(arrays) and len(frame) == len(arrays["row_id"])
    assert frame["row_id"].dtype == np.int64 and frame["weight"].dtype == np.float64
    for name, values in arrays.items():
        for one, other in zip(frame[name], values, strict=True):
            np.testing.assert_array_equal(one, other)
    assert rich.to_pandas(FEATURES, n_epoch=9).shape == (0, len(arrays))
    assert rich.to_pandas(FEATURES, columns=["half", "input_id"]).columns.tolist() == ["half", "input_id"]


def ids_of(trace: Trace, wanted: Any, **selection: Any) -> list[str]:
    return list(trace.arrays(FEATURES, input_ids=wanted, columns=["input_id"], **selection)["input_id"])


@pytest.mark.parametrize("selection", [{}, {"dedupe": True}, {"input_ids": ["id1", "id4"]}])
def test_batches_of_every_size_hold_what_the_arrays_hold(rich: Trace, selection: dict[str, Any]) -> None:
    """Whether blocks lie within a batch, span several, or end with one."""
    for table in (FEATURES, "ground_truth"):
        arrays = rich.arrays(table, **selection)
        rows = len(arrays["row_id"])
        for size in (*range(1, rows + 2), 10**9):
            batches = list(rich.iter_batches(table, batch_size=size, **selection))
            assert [len(batch["row_id"]) for batch in batches] == [
                min(size, rows - start) for start in range(0, rows, size)
            ]
            for name, expected in arrays.items():
                found = [row for batch in batches for row in batch[name]]
                for row, value in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(row, value)


def test_batches_are_memory_of_their_own(rich: Trace) -> None:
    first, second, *_ = rich.iter_batches(FEATURES, batch_size=4)
    kept = {name: values.copy() for name, values in second.items()}
    for values in first.values():
        values[:] = values[::-1].copy()
    for name, values in second.items():
        assert values.flags.writeable
        for row, expected in zip(values, kept[name], strict=True):
            np.testing.assert_array_equal(row, expected)


def test_every_reader_takes_ids(rich: Trace) -> None:
    everything = rich.arrays(FEATURES)
    keep = np.isin(everything["input_id"], ["id1", "id4"])
    choice: dict[str, Any] = {"input_ids": ["id1", "id4", "nobody"]}
    rows = everything["row_id"][keep].tolist()
    assert 0 < len(rows) < len(keep)
    assert rich.arrays(FEATURES, **choice)["row_id"].tolist() == rows
    assert rich.tensors(FEATURES, **choice)["row_id"].tolist() == rows
    assert rich.num_rows(FEATURES, **choice) == len(rows)
    batches = rich.iter_batches(FEATURES, batch_size=3, **choice)
    assert np.concatenate([batch["row_id"] for batch in batches]).tolist() == rows
    assert rich.to_arrow(FEATURES, **choice)["row_id"].to_pylist() == rows
    assert rich.to_pandas(FEATURES, **choice)["row_id"].tolist() == rows
    dataset = rich.dataset(FEATURES, **choice)
    assert [int(item["row_id"]) for item in dataset] == rows
    labels = rich.arrays("ground_truth")
    expected = labels["row_id"][np.isin(labels["input_id"], ["id1", "id4"])].tolist()
    assert rich.arrays("ground_truth", **choice)["row_id"].tolist() == expected


def test_ids_and_dedupe_go_together(rich: Trace) -> None:
    newest = rich.arrays(FEATURES, dedupe=True)
    expected = newest["row_id"][newest["input_id"] == "id3"].tolist()
    assert rich.arrays(FEATURES, dedupe=True, input_ids=["id3"])["row_id"].tolist() == expected
    assert len(expected) < rich.num_rows(FEATURES, input_ids=["id3"])


@pytest.mark.parametrize(
    "wanted", [[7], (7,), {7}, ["7"], np.array([7]), np.array(["7"]), torch.tensor([7]), iter([7])]
)
def test_ids_are_given_as_to_the_tracer(tmp_path: Path, wanted: Any) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["7", "8"], {"features": Column(np.ones(2, "<f4"))})
    assert ids_of(opened(writer), wanted) == ["7"]


def test_no_ids_are_no_rows(rich: Trace) -> None:
    assert rich.num_rows(FEATURES, input_ids=[]) == 0
    assert rich.to_arrow(FEATURES, input_ids=[]).num_rows == len(rich.dataset(FEATURES, input_ids=[])) == 0


@pytest.mark.parametrize("wanted", ["id1", b"id1", 7, [True], [1.5], [None], torch.tensor(7)])
def test_other_ids_are_refused(rich: Trace, wanted: Any) -> None:
    with pytest.raises(InvalidTypeError):
        rich.num_rows(FEATURES, input_ids=wanted)


@pytest.mark.parametrize(
    ("method", "module", "extra"), [("to_arrow", "pyarrow", "arrow"), ("to_pandas", "pandas", "pandas")]
)
def test_a_missing_package_is_named_with_its_command(
    rich: Trace, monkeypatch: pytest.MonkeyPatch, method: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidInputError, match=rf'pip install "ml-debugger\[{extra}\]"'):
        getattr(rich, method)(FEATURES)
