"""`Trace.dataset`: random access by row, in DataLoader workers too, in bounded memory."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from format_writer import Column, FormatWriter
from ml_debugger.errors import InvalidTypeError, NotFoundError
from ml_debugger.exporting import export_trace
from ml_debugger.trace import Trace, dataset, load_export, open_trace
from test_export_zip import rich_trace

FEATURES = "extracted_feature"
DENSE = ["row_id", "input_id", "features", "half", "flag"]


@pytest.fixture(params=["store", "npy", "parquet"])
def rich(request: pytest.FixtureRequest, tmp_path: Path) -> Trace:
    """The rich trace: from its store, and over its exports."""
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    trace_dir = rich_trace(tmp_path / "data").write()
    if request.param == "store":
        return open_trace("model", "v1", data_dir=tmp_path / "data")
    return load_export(export_trace(trace_dir, tmp_path / "out.zip", format=request.param, dedupe=False))


@pytest.mark.parametrize("selection", [{}, {"dedupe": True}, {"n_epoch": 0}, {"dataset_type": "train"}])
def test_items_are_the_rows_of_tensors(rich: Trace, selection: dict[str, Any]) -> None:
    expected = rich.tensors(FEATURES, **selection)
    found = rich.dataset(FEATURES, **selection)
    assert isinstance(found, Dataset) and len(found) == len(expected["row_id"]) > 0
    for row in np.random.default_rng(0).permutation(len(found)).tolist():
        item = found[row]
        assert list(item) == list(expected)
        for name, value in item.items():
            wanted = expected[name][row]
            if isinstance(wanted, torch.Tensor):
                assert value.dtype == wanted.dtype and torch.equal(value, wanted)
            else:
                assert type(value) is type(wanted) and value == wanted


def test_rows_count_from_the_end_too_and_end(rich: Trace) -> None:
    found = rich.dataset(FEATURES, columns=["row_id"])
    assert found[-1]["row_id"] == found[len(found) - 1]["row_id"]
    assert len(list(found)) == len(found)
    for row in (len(found), -len(found) - 1):
        with pytest.raises(IndexError):
            found[row]
        with pytest.raises(NotFoundError):
            found[row]
    for other in ("0", 1.0, True):
        with pytest.raises(InvalidTypeError):
            found[other]


def test_what_is_done_to_an_item_does_not_reach_the_next_one(rich: Trace) -> None:
    found = rich.dataset(FEATURES, columns=["features", "ragged"])
    first = {name: value.clone() for name, value in found[0].items()}
    for value in found[0].values():
        value.fill_(77)
    assert all(torch.equal(found[0][name], value) for name, value in first.items())


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.timeout(120)
def test_workers_read_by_themselves(rich: Trace, context: str) -> None:
    found = rich.dataset(FEATURES, columns=DENSE)
    found[0]  # what this process has read and opened must not disturb a worker
    loader = DataLoader(found, batch_size=5, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    expected = rich.tensors(FEATURES, columns=DENSE)
    for name in ("row_id", "features", "half", "flag"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])
    assert [value for batch in batches for value in batch["input_id"]] == expected["input_id"]


def test_a_shuffled_batch_reads_each_call_once(rich: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rich.dataset(FEATURES, columns=["row_id"])
    monkeypatch.setattr(dataset, "_CACHE_BYTES", 0)
    reads: list[int] = []
    read = found._index.read
    monkeypatch.setattr(found._index, "read", lambda block: reads.append(block) or read(block))
    order = np.random.default_rng(1).permutation(len(found)).tolist()
    items = found.__getitems__(order)
    assert [int(item["row_id"]) for item in items] == [int(found[row]["row_id"]) for row in order]
    assert len(reads[: len(set(reads))]) == len(set(reads)) and reads[: len(set(reads))] == sorted(set(reads))


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(20):
        writer.call(number, ["a", "b"], {"features": Column(np.ones((2, 128), "<f4"))})
    writer.write()
    monkeypatch.setattr(dataset, "_CACHE_BYTES", 3000)
    found = open_trace("model", "v1", data_dir=tmp_path).dataset(FEATURES, columns=["features"])
    for row in range(len(found)):
        found[row]
        assert found._cached_bytes <= 3000 and len(found._cache) <= 2
    assert len(pickle.dumps(found)) < 4000


def test_a_row_of_a_dropped_epoch_is_not_found(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(3):
        writer.call(number, ["a", "b"], {"features": Column(np.ones((2, 2), "<f4"))}, epoch=number)
    writer.write()
    found = open_trace("model", "v1", data_dir=tmp_path).dataset(FEATURES)
    shutil.rmtree(writer.directory / "rank-00000" / "epoch-1")
    with pytest.raises(NotFoundError, match="epoch 1 of rank 0 was dropped"):
        found[2]
    assert found[4]["n_epoch"] == 2


def test_a_copy_elsewhere_refuses_another_export(tmp_path: Path) -> None:
    trace_dir = rich_trace(tmp_path / "data").write()
    path = export_trace(trace_dir, tmp_path / "out.zip")
    copy = pickle.dumps(load_export(path).dataset(FEATURES))
    assert len(pickle.loads(copy)[0]["input_id"]) == 3
    export_trace(trace_dir, path, n_epoch=1)
    with pytest.raises(NotFoundError, match="another export"):
        pickle.loads(copy)[0]
