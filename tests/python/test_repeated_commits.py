"""A commit of unknown outcome is made again in the next segment: `ls` and `info` count its calls once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from format_writer import Column, FormatWriter
from ml_debugger import open_trace
from ml_debugger.cli.listing import info, ls
from ml_debugger.errors import CorruptDataError
from ml_debugger.store.survey import survey_trace

ROWS = {0: 2, 1: 3, 2: 1, 3: 4, 4: 2}  # of each call
LABELLED = {1, 3}


@pytest.fixture
def writer(tmp_path: Path) -> FormatWriter:
    return FormatWriter(tmp_path)


def put(writer: FormatWriter, sequence: int, *calls: int, **where: Any) -> None:
    for call in calls:
        rows = ROWS[call]
        truths = {"label": Column(np.zeros(rows, "<i8"))} if call in LABELLED else None
        writer.call(
            call,
            [f"{call}-{row}" for row in range(rows)],
            {"features": Column(np.ones(rows, "<f4"))},
            truths,
            sequence=sequence,
            first_row=100 * call,
            **where,
        )


def assert_counts_are_the_readers(trace_dir: Path) -> None:
    survey = survey_trace(trace_dir)
    trace = open_trace("model", "v1", data_dir=trace_dir.parent.parent)
    assert survey.totals.rows == trace.num_rows("extracted_feature")
    assert survey.totals.ground_truth_rows == trace.num_rows("ground_truth")
    assert survey.totals.calls == len(np.unique(trace.arrays("extracted_feature")["row_id"] // 100))
    assert sum(rank.totals.rows for rank in survey.ranks) == survey.totals.rows
    for epoch, totals in survey.epochs.items():
        assert totals.rows == trace.num_rows("extracted_feature", n_epoch=epoch)


@pytest.mark.parametrize(
    "segments",
    [
        [(0, 1, 2), (2, 3, 4)],
        [(0, 1), (0, 1), (0, 1, 2)],
        [(0, 1, 2), (1, 3), (1, 2, 4)],
        [(0, 2, 4), (1, 3)],  # the calls of two threads: these overlap, and nothing is there twice
        [(0, 1), (2, 3)],
        [(0,)],
    ],
    ids=str,
)
def test_a_call_in_several_segments_counts_once(writer: FormatWriter, segments: list[Any]) -> None:
    for sequence, calls in enumerate(segments):
        put(writer, sequence, *calls)
    assert_counts_are_the_readers(writer.write())


def test_the_same_numbers_in_other_epochs_attempts_and_ranks_are_other_calls(writer: FormatWriter) -> None:
    put(writer, 0, 0, 1)
    put(writer, 0, 0, 1, attempt=1)
    put(writer, 1, 1, 2, attempt=1)
    put(writer, 0, 0, epoch=1)
    put(writer, 0, 0, 1, rank=1)
    survey = survey_trace(writer.write())
    assert survey.totals.calls == 2 + 3 + 1 + 2
    assert survey.epochs[0].rows == 5 + 6 + 5
    assert survey.epochs[1].rows == 2


def test_a_gap_in_two_segments_counts_once(writer: FormatWriter) -> None:
    put(writer, 0, 0)
    writer.gap(1, 2, 7, sequence=0)
    writer.gap(1, 2, 7, sequence=1)
    put(writer, 1, 3)
    totals = survey_trace(writer.write()).totals
    assert (totals.discarded_rows, totals.rows, totals.calls) == (7, 6, 2)


def test_ls_and_info_tell_the_same_as_the_readers(writer: FormatWriter, tmp_path: Path) -> None:
    put(writer, 0, 0, 1)
    put(writer, 1, 1, 2)
    data_dir = str(writer.write().parent.parent)
    listed = CliRunner().invoke(ls, ["--json", "--data-dir", data_dir])
    told = CliRunner().invoke(info, ["model", "v1", "--json", "--data-dir", data_dir])
    for figures in (
        json.loads(listed.stdout)[0],
        json.loads(told.stdout),
        json.loads(told.stdout)["epochs"][0],
    ):
        assert (figures["rows"], figures["ground_truth_rows"], figures["calls"]) == (6, 3, 3)


def test_a_repeated_header_that_cannot_be_read_is_named(
    writer: FormatWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(writer, 0, 0)
    put(writer, 1, 0)
    trace_dir = writer.write()
    monkeypatch.setattr("ml_debugger.store.repeats.msgpack.unpackb", lambda encoded: [0, {}, None, b"", 0])
    with pytest.raises(CorruptDataError, match=r"a header of .* is damaged"):
        list(_repeats_of(trace_dir))


def _repeats_of(trace_dir: Path) -> Any:
    from ml_debugger.store import layout, repeats

    (_, rank_dir), *_ = layout.rank_directories(trace_dir)
    (partition,) = layout.partitions(rank_dir)
    yield from repeats.repeated([(segment, 0) for segment in layout.segments(partition.path)])
