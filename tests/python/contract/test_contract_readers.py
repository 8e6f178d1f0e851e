"""Contract 5, for every reader over every kind of source: filters, dedupe, tables and epochs that are not
there; DataLoader workers; reading while another process records; all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import batch, refused
from torch.utils.data import DataLoader

from ml_debugger import TracerConfig, errors, load_export, open_trace

Source = Callable[[Any], Any]

# Each gives the ids that a reader finds, in row order.
READERS: dict[str, Callable[..., list[str]]] = {
    "arrays": lambda trace, *args, **rows: trace.arrays(*args, **rows)["input_id"].tolist(),
    "tensors": lambda trace, *args, **rows: trace.tensors(*args, **rows)["input_id"],
    "iter_batches": lambda trace, *args, **rows: [
        one for found in trace.iter_batches(*args, batch_size=3, **rows) for one in found["input_id"].tolist()
    ],
    "to_arrow": lambda trace, *args, **rows: trace.to_arrow(*args, **rows)["input_id"].to_pylist(),
    "to_pandas": lambda trace, *args, **rows: trace.to_pandas(*args, **rows)["input_id"].tolist(),
    "dataset": lambda trace, *args, **rows: [row["input_id"] for row in trace.dataset(*args, **rows)],
}
NEEDS = {"to_arrow": "pyarrow", "to_pandas": "pandas"}
FILTERS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    # filter, ids of extracted_feature, ids of ground_truth
    ({}, ["n", "n", "a", "b", "a", "c", "a", "a"], ["n", "n", "a", "b", "a"]),
    ({"dedupe": True}, ["n", "n", "b", "a", "c", "a", "a"], ["n", "n", "b", "a"]),
    ({"n_epoch": -1}, ["n", "n"], ["n", "n"]),
    ({"n_epoch": -1, "dedupe": True}, ["n", "n"], ["n", "n"]),
    ({"n_epoch": 0}, ["a", "b", "a", "c", "a"], ["a", "b", "a"]),
    ({"n_epoch": np.int64(0), "dedupe": True}, ["b", "a", "c", "a"], ["b", "a"]),
    ({"n_epoch": 5}, [], []),
    ({"dataset_type": "val"}, ["c", "a"], []),
    ({"dataset_type": "nowhere"}, [], []),
    ({"n_epoch": 0, "dataset_type": "train", "dedupe": True}, ["b", "a"], ["b", "a"]),
]


@pytest.fixture(params=["live", "closed", "npy", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """How a reader gets at what a tracer recorded."""

    def read(tracer: Any) -> Any:
        if request.param in ("npy", "parquet"):
            if request.param == "parquet":
                pytest.importorskip("pyarrow")
            path = tracer.export(tmp_path / "out.zip", dedupe=False, format=request.param)
            return load_export(path)
        tracer.flush()
        if request.param == "closed":
            tracer.close()
        return open_trace("net", "v1")

    return read


@pytest.fixture
def repeated(make_tracer: Any) -> Any:
    """Samples that come again: in a later call, in another dataset type, epoch, and without an epoch."""
    tracer = make_tracer()
    x = torch.randn(3, 4)
    tracer(x[:2], [0, 1], ["a", "b"], "train", 0)
    tracer(x[:1], [0], ["a"], "train", 0)
    tracer(x[:2], None, ["c", "a"], "val", 0)
    tracer(x[:1], None, ["a"], "train", 1)
    tracer(x[:2], [0, 1], ["n", "n"], "train", None)
    return tracer


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_selects_alike(reader: str, repeated: Any, source: Source) -> None:
    pytest.importorskip(NEEDS.get(reader, "torch"))
    trace = source(repeated)
    assert trace.epochs == [-1, 0, 1]
    for rows, features, truths in FILTERS:
        for table, expected in (("extracted_feature", features), ("ground_truth", truths)):
            assert READERS[reader](trace, table, **rows) == expected, (table, rows)
            assert trace.num_rows(table, **rows) == len(expected)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_other_tables_columns_and_epochs(reader: str, repeated: Any) -> None:
    pytest.importorskip(NEEDS.get(reader, "torch"))
    repeated.flush()
    read = getattr(open_trace("net", "v1"), reader)  # iter_batches too refuses at once, not when iterated
    with refused(errors.InvalidInputError):
        read("features")
    with refused(errors.InvalidInputError):
        read("extracted_feature", columns=["nothing"])
    with refused(errors.InvalidInputError):
        read("extracted_feature", n_epoch=-2)
    for epoch in (True, 0.0, "0"):
        with refused(errors.InvalidTypeError):
            read("extracted_feature", n_epoch=epoch)


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_no_rows_in_an_empty_trace(reader: str, make_tracer: Any, source: Source) -> None:
    pytest.importorskip(NEEDS.get(reader, "torch"))
    trace = source(make_tracer())
    assert trace.epochs == []
    for table in ("extracted_feature", "ground_truth"):
        assert READERS[reader](trace, table) == [] and trace.num_rows(table, dedupe=True) == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_dataset_is_one_of_torch_and_works_with_workers(
    context: str, repeated: Any, source: Source
) -> None:
    trace = source(repeated)
    found = trace.dataset("extracted_feature", columns=["row_id", "input_id", "hidden"])
    assert isinstance(found, torch.utils.data.Dataset) and len(found) == 8
    loader = DataLoader(found, batch_size=3, shuffle=True, num_workers=2, multiprocessing_context=context)
    rows = {
        row_id: (name, hidden)
        for one in loader
        for row_id, name, hidden in zip(one["row_id"].tolist(), one["input_id"], one["hidden"], strict=True)
    }
    expected = trace.tensors("extracted_feature")
    for row_id, name, hidden in zip(
        expected["row_id"].tolist(), expected["input_id"], expected["hidden"], strict=True
    ):
        assert rows[row_id][0] == name and torch.equal(rows[row_id][1], hidden)


def test_another_process_reads_while_a_tracer_writes(make_tracer: Any, run_child: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(4)
    tracer(x, y, ids, "train", 0)
    tracer.flush()
    found = run_child(
        """
        import json
        from ml_debugger import open_trace
        trace = open_trace("net", "v1")
        arrays = trace.arrays("extracted_feature")
        print(json.dumps([arrays["input_id"].tolist(), arrays["hidden"].tolist(), trace.epochs]))
        """
    )
    assert found.returncode == 0, found.stderr
    read_ids, hidden, epochs = json.loads(found.stdout)
    assert read_ids == [str(one) for one in ids] and epochs == [0]
    assert np.array_equal(
        np.array(hidden, np.float32), open_trace("net", "v1").arrays("extracted_feature")["hidden"]
    )
    tracer(x, y, ids, "train", 1)
    tracer.flush()
    assert open_trace("net", "v1").epochs == [0, 1]


def test_a_reader_that_is_open_sees_rows_that_come_later(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(4)
    tracer(x, y, ids, "train", 0)
    tracer.flush()
    trace = open_trace("net", "v1")
    batches = trace.iter_batches("extracted_feature", batch_size=3)
    assert trace.num_rows("extracted_feature") == 4
    tracer(x, y, ids, "train", 1)
    tracer.flush()
    assert trace.num_rows("extracted_feature") == 8 and trace.epochs == [0, 1]
    # An iterator gives the rows that were there when it was made.
    assert sum(len(one["row_id"]) for one in batches) == 4


def test_all_ranks_are_seen(make_tracer: Any) -> None:
    for rank in (0, 1, 3):
        tracer = make_tracer(config=TracerConfig(data_rank=rank))
        x, y, ids = batch(3, rank)
        tracer(x, y, ids, "train", 0)
        tracer.close()
    trace = open_trace("net", "v1")
    expected = {str(one) for rank in (0, 1, 3) for one in batch(3, rank)[2]}
    assert trace.num_rows("extracted_feature") == 9
    for reader in ("arrays", "tensors", "iter_batches", "dataset"):
        assert set(READERS[reader](trace, "extracted_feature")) == expected
