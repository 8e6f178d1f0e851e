"""Several ranks: their calls take turns, and what is read is what call by call would give."""

from __future__ import annotations

import heapq
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger.errors import CorruptDataError, NotFoundError
from ml_debugger.exporting import export_trace
from ml_debugger.trace import braid, call_stream, open_trace, runs
from ml_debugger.trace.braid import BraidedRun
from ml_debugger.trace.catalog import Snapshot
from ml_debugger.trace.header import Call
from ml_debugger.trace.runs import CallRun
from test_trace_runs import alike


def in_turns(chains: list[Iterator[Any]]) -> Iterator[Any]:
    """The plain way: call by call."""

    def singly(chain: Iterator[Call | CallRun]) -> Iterator[Call | CallRun]:
        for found in chain:
            if isinstance(found, Call):
                yield found
                continue
            for number in range(len(found.keys)):
                one = found.select(np.arange(len(found.keys)) == number)
                assert one is not None
                yield one

    return heapq.merge(*map(singly, chains), key=lambda call: (call.call, call.rank))


def random_trace(folder: Path, seed: int) -> Path:
    """Ranks that agree for a while and differ for a while, in every way that matters for a run."""
    chance = random.Random(seed)
    writer = FormatWriter(folder)
    for rank in range(3):
        sequence = 0
        for number in range(40):
            kind = (number // 8 + (number > 24) * rank) % 4
            if chance.random() < 0.1:
                continue  # this rank had fewer calls
            if chance.random() < 0.05:
                sequence += 1
            rows = 1 + kind if chance.random() < 0.8 else 5
            if kind == 3 and chance.random() < 0.3:
                ragged = [np.full(1 + row, number, "<f4") for row in range(rows)]
                writer.call(
                    number, [f"r{row}" for row in range(rows)], {"features": Column(ragged)}, rank=rank
                )
                continue
            alike(
                writer,
                number,
                rows=rows,
                rank=rank,
                sequence=sequence,
                epoch=number // 20,
                dataset_type="val" if kind == 2 else "train",
                **({"truths": None} if kind == 1 else {}),
                pieces=chance.choice([1, 2]),
                inline=chance.choice([[], ["input_id"], ["features", "label"]]),
            )
    return writer.write()


def everything(trace_dir: Path, folder: Path) -> list[Any]:
    trace = open_trace("model", "v1", data_dir=trace_dir.parent.parent)
    found: list[Any] = []
    for table in ("extracted_feature", "ground_truth"):
        for options in ({}, {"n_epoch": 1, "dedupe": True}, {"input_ids": ["12-0", "30-1", "r0"]}):
            found += [trace.arrays(table, **options), trace.tensors(table, **options)]
        found += list(trace.iter_batches(table, batch_size=7, dataset_type="train"))
    archive = export_trace(trace_dir, folder / "out.zip")
    assert archive is not None
    return [*found, archive.read_bytes()]


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list) or (isinstance(one, np.ndarray) and one.dtype == object):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    elif isinstance(one, np.ndarray):
        # A batch is as wide as the widest text that was read with it.
        assert one.dtype == other.dtype or one.dtype.kind == other.dtype.kind == "U"
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("run_bytes", [1, 200, 8 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_read_together_as_they_do_call_by_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, run_bytes: int
) -> None:
    trace_dir = random_trace(tmp_path / "data", seed)
    monkeypatch.setattr(runs, "RUN_BYTES", run_bytes)
    monkeypatch.setattr(braid, "RUN_BYTES", run_bytes)
    together = everything(trace_dir, tmp_path)
    monkeypatch.setattr(call_stream, "braided", in_turns)
    assert_equal(together, everything(trace_dir, tmp_path))


def test_calls_of_all_ranks_that_are_alike_are_one_run(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for rank in range(4):
        for number in range(10):
            alike(writer, number, rank=rank)
    (run,) = Snapshot(writer.write()).runs()
    assert isinstance(run, BraidedRun)
    assert run.keys.tolist() == [number for number in range(10) for _ in range(4)]
    assert (run.row_ids >> 49).tolist() == [rank for _ in range(10) for rank in range(4) for _ in range(2)]


def test_a_braid_is_no_larger_than_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FormatWriter(tmp_path)
    for rank in range(4):
        for number in range(20):
            alike(writer, number, rank=rank)
    trace_dir = writer.write()
    size = int(next(iter(Snapshot(trace_dir).runs())).lengths[0].sum())  # of a call
    monkeypatch.setattr(braid, "RUN_BYTES", 10 * size)
    found = list(Snapshot(trace_dir).runs())
    assert max(len(run.keys) for run in found if isinstance(run, CallRun)) <= 12  # whole turns of four ranks
    assert sum(run.rows for run in found) == 160


def test_an_epoch_dropped_on_one_rank_ends_the_iterator(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for rank in range(2):
        for number in range(6):
            alike(writer, number, rank=rank)
    trace_dir = writer.write()
    batches = open_trace("model", "v1", data_dir=trace_dir.parent.parent).iter_batches(
        "extracted_feature", batch_size=4
    )
    next(batches)
    shutil.rmtree(next(trace_dir.glob("rank-00001/epoch-0")))
    with pytest.raises(NotFoundError, match="of rank 1 was dropped"):
        list(batches)


def test_damage_within_a_braid_names_its_ranks(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for rank in range(2):
        for number in range(2):
            camera = Column([number, "x"][number : number + 1], "str")  # the first one is no text
            writer.call(number, ["a"], {"camera": camera}, rank=rank)
    trace = open_trace("model", "v1", data_dir=writer.write().parent.parent)
    with pytest.raises(CorruptDataError, match=r"'camera' of call 0 \(ranks 0, 1, attempt 0\)"):
        trace.arrays("extracted_feature")
