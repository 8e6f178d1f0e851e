"""Contract 5: open_trace, epochs, columns, num_rows, arrays, tensors, iter_batches, dedupe; load_export has
the same face; unknown traces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, batch, by_id, carrier_tracer, carry, refused, same_array

from ml_debugger import errors, load_export, open_trace

Source = Callable[[Any], Any]


@pytest.fixture(params=["live", "closed", "export"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """How a reader gets at what a tracer recorded."""

    def read(tracer: Any) -> Any:
        if request.param == "export":
            return load_export(tracer.export(tmp_path / "out.zip", dedupe=False))
        tracer.flush()
        if request.param == "closed":
            tracer.close()
        return open_trace("net", "v1")

    return read


@pytest.fixture
def mixed(make_tracer: Any) -> Any:
    """Epochs 0, 1 and none; train and val; with and without ground truth: 30 feature rows, 20 labels."""
    tracer = make_tracer(additional_fields=[{"name": "camera", "type": "str"}])
    plan = [
        (0, "train", True),
        (0, "val", True),
        (1, "train", True),
        (1, "val", False),
        (None, "train", True),
        (None, "test", False),
    ]
    for i, (epoch, kind, labelled) in enumerate(plan):
        x, y, ids = batch(5, i)
        tracer(x, y if labelled else None, ids, kind, epoch, camera=f"c{i}")
    return tracer


def test_epochs_lists_minus_one_for_rows_without_one(mixed: Any, source: Source) -> None:
    assert sorted(source(mixed).epochs) == [-1, 0, 1]


def test_columns_of_each_table(mixed: Any, source: Source) -> None:
    trace = source(mixed)
    common = {"row_id", "input_id", "dataset_type", "n_epoch"}
    assert set(trace.columns("extracted_feature")) == common | {"hidden", "logits", "camera"}
    assert set(trace.columns("ground_truth")) == common | {"label"}


@pytest.mark.parametrize(
    ("table", "epoch", "rows"),
    [
        ("extracted_feature", None, 30),
        ("extracted_feature", 0, 10),
        ("extracted_feature", -1, 10),
        ("extracted_feature", 7, 0),
        ("ground_truth", None, 20),
        ("ground_truth", 1, 5),
        ("ground_truth", -1, 5),
    ],
)
def test_num_rows_by_table_and_epoch(
    table: str, epoch: int | None, rows: int, mixed: Any, source: Source
) -> None:
    assert source(mixed).num_rows(table, n_epoch=epoch) == rows


@pytest.mark.parametrize("method", ["arrays", "tensors"])
@pytest.mark.parametrize(
    ("epoch", "kind", "calls"),
    [
        (None, None, range(6)),
        (0, None, (0, 1)),
        (0, "val", (1,)),
        (-1, "test", (5,)),
        (1, "test", ()),
        (None, "val", (1, 3)),
    ],
)
def test_rows_are_selected_by_epoch_and_dataset_type(
    method: str, epoch: Any, kind: Any, calls: Any, mixed: Any, source: Source
) -> None:
    keywords = {} if kind is None else {"dataset_type": kind}
    data = getattr(source(mixed), method)("extracted_feature", n_epoch=epoch, **keywords)
    expected = {}
    for call in calls:
        x, _, ids = batch(5, call)
        expected.update(dict(zip(ids, Net().body(x).detach().numpy(), strict=True)))
    hidden = by_id(data, "hidden")
    assert set(hidden) == set(expected)
    assert all(same_array(hidden[key], expected[key]) for key in expected)
    cameras = by_id(data, "camera")
    assert all(str(cameras[key]) == f"c{key[1]}" for key in expected)


def test_all_columns_of_a_table_are_in_one_row_order(mixed: Any, source: Source) -> None:
    trace = source(mixed)
    data = trace.arrays("extracted_feature")
    assert len({len(column) for column in data.values()}) == 1
    again = {name: trace.arrays("extracted_feature", columns=[name])[name] for name in data}
    assert all(same_array(data[name], again[name]) for name in data)
    for input_id, camera, epoch in zip(data["input_id"], data["camera"], data["n_epoch"], strict=True):
        call = int(str(input_id)[1])
        assert camera == f"c{call}" and epoch == [0, 0, 1, 1, -1, -1][call]


def test_columns_select_and_nothing_else_comes(mixed: Any, source: Source) -> None:
    trace = source(mixed)
    assert set(trace.arrays("extracted_feature", columns=["input_id", "hidden"])) == {"input_id", "hidden"}
    assert set(trace.tensors("ground_truth", columns=["label"])) == {"label"}


def test_an_unknown_column_is_refused_by_name(mixed: Any, source: Source) -> None:
    with refused(ValueError, KeyError) as caught:
        source(mixed).arrays("extracted_feature", columns=["hiden"])
    assert "hiden" in str(caught.value)


def test_tensors_are_in_the_recorded_dtype_and_text_is_a_list_of_str(
    make_tracer: Any, source: Source
) -> None:
    tracer = carrier_tracer(make_tracer, additional_fields=[{"name": "camera", "type": "str"}])
    payload = torch.randn(4, 3).to(torch.bfloat16)
    carry(tracer, payload, list("abcd"), ground_truth=[1, 2, 3, 4], camera=["", "ü", "c", "d"])
    trace = source(tracer)
    data = trace.tensors("extracted_feature")
    assert isinstance(data["tap"], torch.Tensor) and data["tap"].dtype is torch.bfloat16
    assert data["row_id"].dtype is torch.int64 and data["n_epoch"].dtype is torch.int64
    for name in ("input_id", "dataset_type", "camera"):
        assert type(data[name]) is list and all(type(value) is str for value in data[name])
    assert torch.equal(torch.stack([by_id(data, "tap")[key] for key in "abcd"]), payload)
    assert trace.tensors("ground_truth")["label"].dtype is torch.int64


def test_arrays_are_numpy_arrays_widened_where_numpy_has_no_name(make_tracer: Any, source: Source) -> None:
    tracer = carrier_tracer(make_tracer)
    carry(tracer, torch.randn(4, 3).to(torch.bfloat16), list("abcd"))
    data = source(tracer).arrays("extracted_feature")
    assert all(isinstance(column, np.ndarray) for column in data.values())
    assert data["tap"].dtype == np.float32 and data["tap"].shape == (4, 3)
    assert data["input_id"].dtype.kind == "U" and data["row_id"].dtype == np.int64


def test_rows_of_differing_shape_are_an_object_array_or_a_list(make_tracer: Any, source: Source) -> None:
    tracer = carrier_tracer(make_tracer)
    sent = {}
    for call, shape in enumerate([(3,), (5,), (2, 2), (0,)]):
        payload = torch.randn(2, *shape)
        ids = [f"{call}-0", f"{call}-1"]
        carry(tracer, payload, ids)
        sent.update(dict(zip(ids, payload, strict=True)))
    trace = source(tracer)
    arrays, tensors = trace.arrays("extracted_feature"), trace.tensors("extracted_feature")
    assert arrays["tap"].dtype == object and arrays["tap"].shape == (8,)
    assert type(tensors["tap"]) is list
    for key, value in sent.items():
        assert same_array(by_id(arrays, "tap")[key], value.numpy())
        assert torch.equal(by_id(tensors, "tap")[key], value)


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_iter_batches_yields_dicts_by_column_that_add_up(size: int, mixed: Any, source: Source) -> None:
    trace = source(mixed)
    batches = list(trace.iter_batches("extracted_feature", columns=["input_id", "hidden"], batch_size=size))
    assert all(set(b) == {"input_id", "hidden"} for b in batches)
    lengths = [len(b["input_id"]) for b in batches]
    assert sum(lengths) == 30 and max(lengths) <= size and min(lengths) >= 1
    assert [len(b["hidden"]) for b in batches] == lengths
    together = {k: np.asarray(v) for b in batches for k, v in by_id(b, "hidden").items()}
    expected = by_id(trace.arrays("extracted_feature"), "hidden")
    assert set(together) == set(expected)
    assert all(np.array_equal(together[key], expected[key]) for key in expected)


def test_iter_batches_selects_like_arrays(mixed: Any, source: Source) -> None:
    trace = source(mixed)
    batches = list(trace.iter_batches("extracted_feature", n_epoch=0, dataset_type="val", batch_size=2))
    ids = [str(i) for b in batches for i in b["input_id"]]
    assert sorted(ids) == sorted(batch(5, 1)[2])


def test_nothing_is_deduplicated_unless_asked(make_tracer: Any, tmp_path: Path) -> None:
    for attempt in range(3):
        tracer = make_tracer()
        x, y, ids = batch(4)
        tracer(x + attempt, y, ids, n_epoch=0)
        tracer(x + attempt, y, ids, n_epoch=None)
        tracer.close()
    for trace in (open_trace("net", "v1"), load_export(tracer.export(tmp_path / "all.zip", dedupe=False))):
        for table in ("extracted_feature", "ground_truth"):
            assert trace.num_rows(table) == 24
            assert trace.num_rows(table, dedupe=True) == 16
            assert trace.num_rows(table, n_epoch=0, dedupe=True) == 4
            assert trace.num_rows(table, n_epoch=-1, dedupe=True) == 12
        for data in (
            trace.arrays("extracted_feature", n_epoch=0, dedupe=True),
            trace.tensors("extracted_feature", n_epoch=0, dedupe=True),
            *trace.iter_batches("extracted_feature", n_epoch=0, dedupe=True, batch_size=100),
        ):
            hidden = by_id(data, "hidden")
            expected = Net().body(x + 2).detach().numpy()
            assert np.array_equal(np.stack([np.asarray(hidden[key]) for key in ids]), expected)


def test_dedupe_keeps_one_for_each_dataset_type_epoch_and_id_the_newest_in_the_call(make_tracer: Any) -> None:
    tracer = make_tracer()
    x = torch.arange(6.0).unsqueeze(1).expand(6, 4).contiguous()
    y = torch.arange(6) % 3
    tracer(x[:3], y[:3], ["a", "b", "a"], "train", 0)
    tracer(x[3:], y[3:], ["a", "c", "c"], "train", 0)
    tracer(x[:1], y[:1], ["a"], "val", 0)
    tracer(x[:1], y[:1], ["a"], "train", 1)
    tracer.flush()
    trace = open_trace("net", "v1")
    assert trace.num_rows("extracted_feature", dedupe=True) == 5
    data = trace.arrays("extracted_feature", n_epoch=0, dataset_type="train", dedupe=True)
    hidden = by_id(data, "hidden")
    expected = Net().body(x).detach().numpy()
    assert set(hidden) == {"a", "b", "c"}
    for key, position in (("a", 3), ("b", 1), ("c", 5)):
        assert np.array_equal(hidden[key], expected[position])


def test_a_table_that_the_trace_does_not_have_has_no_rows(make_tracer: Any, source: Source) -> None:
    tracer = make_tracer()
    x, _, ids = batch(3)
    tracer(x, None, ids)
    trace = source(tracer)
    assert trace.num_rows("ground_truth") == 0
    assert all(len(column) == 0 for column in trace.arrays("ground_truth").values())
    assert list(trace.iter_batches("ground_truth", batch_size=2)) == []


@pytest.mark.parametrize("method", ["columns", "num_rows", "arrays", "tensors"])
@pytest.mark.parametrize("table", ["features", "", "../ground_truth"])
def test_another_table_name_is_an_invalid_input(method: str, table: str, mixed: Any, source: Source) -> None:
    with refused(errors.InvalidInputError):
        getattr(source(mixed), method)(table)


def test_an_unknown_trace_is_not_found_and_creates_nothing(store: Path, tmp_path: Path) -> None:
    for folder in (None, tmp_path / "other", tmp_path):
        before = sorted(tmp_path.iterdir())
        with refused(errors.NotFoundError) as caught:
            open_trace("nobody", "v1", data_dir=folder)
        assert isinstance(caught.value, KeyError) and "nobody" in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before
    assert not store.exists()


def test_an_unknown_version_is_not_found(make_tracer: Any, store: Path) -> None:
    make_tracer()(*batch(2))
    before = sorted(store.rglob("version.json"))
    with refused(errors.NotFoundError):
        open_trace("net", "v2")
    assert sorted(store.rglob("version.json")) == before


def test_none_is_mld_data_dir_or_mld_data(
    make_tracer: Any, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    tracer = make_tracer()
    tracer(*batch(2))
    tracer.close()
    monkeypatch.delenv("MLD_DATA_DIR")
    monkeypatch.chdir(store.parent)
    with refused(errors.NotFoundError):
        open_trace("net", "v1")
    store.rename(store.parent / "mld_data")
    assert open_trace("net", "v1").num_rows("extracted_feature") == 2
    assert open_trace("net", "v1", data_dir=str(store.parent / "mld_data")).num_rows("ground_truth") == 2


def test_a_file_that_is_no_export_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("not a zip")
    with refused(OSError, ValueError):
        load_export(tmp_path / "text.zip")
    with refused(KeyError, OSError):
        load_export(tmp_path / "missing.zip")
    assert not (tmp_path / "missing.zip").exists()
