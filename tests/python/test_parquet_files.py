"""`Trace.to_parquet`: many files that engines read as one table."""

from __future__ import annotations

import errno
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ml_debugger import TracerConfig, load_export, open_trace
from ml_debugger.errors import InvalidInputError, StorageError
from ml_debugger.exporting import export_trace
from ml_debugger.trace.trace import Trace
from ml_debugger.training import ClassificationTracer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
FEATURES = "extracted_feature"


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """Three ranks, epochs -1, 0 and 1, every sample of epoch 1 twice."""
    for rank in range(3):
        torch.manual_seed(rank)
        model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
        config = TracerConfig(data_dir=tmp_path / "data", durability="process", data_rank=rank)
        with ClassificationTracer(model, "net", "v1", {"stem": "0"}, config=config) as tracer:
            for epoch in (None, 0, 1, 1):
                tracer(
                    torch.randn(10, 4), list(range(10)), [f"{rank}-{i}" for i in range(10)], "train", epoch
                )
    export_trace(next((tmp_path / "data").glob("*/*")), tmp_path / "out.zip")
    return open_trace("net", "v1", data_dir=tmp_path / "data")


def test_files_hold_the_rows_of_all_ranks_by_epoch(trace: Trace, tmp_path: Path) -> None:
    files = trace.to_parquet(FEATURES, tmp_path / "out", rows_a_file=20)
    names = [str(path.relative_to(tmp_path / "out")) for path in files]
    assert {name.split("/")[0] for name in names} == {"n_epoch=-1", "n_epoch=0", "n_epoch=1"}
    assert len(names) >= 6
    for epoch in (-1, 0, 1):
        expected = trace.to_arrow(FEATURES, epoch).drop_columns(["n_epoch"])
        folder = tmp_path / "out" / f"n_epoch={epoch}"
        parts = [pq.read_table(path, partitioning=None) for path in sorted(folder.iterdir())]
        assert all(part.num_rows <= 20 for part in parts)
        assert pa.concat_tables(parts).equals(expected)


def test_an_export_is_written_alike_and_dedupe_leaves_the_newest(trace: Trace, tmp_path: Path) -> None:
    exported = load_export(tmp_path / "out.zip")
    for source, name in ((trace, "a"), (exported, "b")):
        source.to_parquet(FEATURES, tmp_path / name, ["input_id", "stem"], dedupe=True)
    read = [pq.read_table(tmp_path / name / "n_epoch=1", partitioning=None) for name in "ab"]
    assert read[0].num_rows == 30
    assert read[0].equals(read[1])


def test_duckdb_reads_the_files_as_one_table(trace: Trace, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    trace.to_parquet(FEATURES, tmp_path / "features", rows_a_file=7)
    trace.to_parquet("ground_truth", tmp_path / "labels", ["row_id", "label"], rows_a_file=7)
    query = """
        select feature.n_epoch, count(*), sum(label) from
        read_parquet($features, hive_partitioning = true) as feature
        join read_parquet($labels, hive_partitioning = true) using (row_id) group by 1 order by 1
    """
    patterns = {name: f"{tmp_path / name}/*/*.parquet" for name in ("features", "labels")}
    with duckdb.connect() as connection:
        found = connection.execute(query, patterns).fetchall()
    assert [tuple(map(int, row)) for row in found] == [(-1, 30, 135), (0, 30, 135), (1, 60, 270)]


def test_pandas_reads_the_files_as_one_table(trace: Trace, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    trace.to_parquet(FEATURES, tmp_path / "out", ["row_id"])
    rows = pandas.read_parquet(tmp_path / "out")["row_id"].to_numpy()
    assert np.array_equal(np.sort(rows), np.sort(trace.arrays(FEATURES)["row_id"]))


def test_a_directory_that_holds_something_is_refused(trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert trace.to_parquet(FEATURES, tmp_path / "out")
    with pytest.raises(InvalidInputError, match="not empty"):
        trace.to_parquet(FEATURES, tmp_path / "out")
    with pytest.raises(InvalidInputError, match="rows_a_file"):
        trace.to_parquet(FEATURES, tmp_path / "other", rows_a_file=0)


def test_a_failure_leaves_nothing(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="No space left"):
        trace.to_parquet(FEATURES, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_example_reads_many_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("duckdb")
    example = Path(__file__).parents[2] / "examples" / "query_with_duckdb.py"
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("16 files")
    assert [line.split(":")[0] for line in lines[1:]] == [f"epoch {epoch}" for epoch in range(4)]
    assert all("512 samples" in line for line in lines[1:])
