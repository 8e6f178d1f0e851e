"""Runs of calls that are alike: what is read is what call by call would give, and no header is believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from format_writer import Column, FormatWriter, crc32c
from ml_debugger.errors import CorruptDataError
from ml_debugger.trace import Trace, call_stream, open_trace, runs
from ml_debugger.trace.catalog import Snapshot
from ml_debugger.trace.header import Call
from ml_debugger.trace.runs import CallRun
from test_export_zip import assert_same, rich_trace


def opened(writer: FormatWriter) -> Trace:
    writer.write()
    return open_trace("model", "v1", data_dir=writer.directory.parent.parent)


def runs_of(writer: FormatWriter) -> list[Call | CallRun]:
    return list(Snapshot(writer.write()).runs())


def alike(writer: FormatWriter, number: int, rows: int = 2, **options: Any) -> None:
    values = np.arange(number * 10, number * 10 + rows, dtype="<f4")
    columns = {
        "features": Column(values),
        "camera": Column([f"c{number}"], "str", broadcast=True),
        "count": Column(np.array([number], "<i8"), "int", broadcast=True),
    }
    options.setdefault("truths", {"label": Column(values.astype("<i8"))})
    writer.call(number, [f"{number}-{row}" for row in range(rows)], columns, options.pop("truths"), **options)


def test_calls_that_are_alike_are_one_run(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(10):
        alike(writer, number)
    (run,) = runs_of(writer)
    assert isinstance(run, CallRun) and run.keys.tolist() == list(range(10))
    assert run.rows == run.ground_truth_rows == 20 and run.row_ids.tolist() == list(range(20))


def test_a_run_ends_where_calls_differ(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(2):
        alike(writer, number)
    alike(writer, 2, dataset_type="val")
    alike(writer, 3, truths=None)
    alike(writer, 4, rows=3)
    writer.gap(5, 6, 4)
    alike(writer, 7, rows=3)
    alike(writer, 8, rows=3, chunk_sequence=1)  # its bytes lie in another segment
    alike(writer, 9, rows=3)
    writer.call(10, ["x", "y"], {"features": Column([np.ones(1, "<f4"), np.ones(2, "<f4")])})
    found = runs_of(writer)
    keys = [run.keys.tolist() if isinstance(run, CallRun) else run.call for run in found]
    assert keys == [[0, 1], [2], [3], [4], [7], 8, [9], 10]


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("inline", [[], ["features", "input_id"], ["label", "camera", "count"]])
@pytest.mark.parametrize("run_bytes", [1, 40, 8 << 20])
def test_runs_read_as_single_calls_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, inline: list[str], run_bytes: int
) -> None:
    monkeypatch.setattr(runs, "RUN_BYTES", run_bytes)
    writer = FormatWriter(tmp_path)
    for number in range(12):
        alike(writer, number, rows=1 + number // 4, pieces=pieces, inline=inline, epoch=number // 6)
    trace = opened(writer)
    arrays = trace.arrays("extracted_feature")
    expected = [number * 10 + row for number in range(12) for row in range(1 + number // 4)]
    assert arrays["features"].tolist() == expected
    assert trace.arrays("ground_truth")["label"].tolist() == expected
    assert arrays["input_id"].tolist() == [f"{value // 10}-{value % 10}" for value in expected]
    assert arrays["camera"].tolist() == [f"c{value // 10}" for value in expected]
    assert arrays["count"].tolist() == [value // 10 for value in expected]
    assert arrays["row_id"].tolist() == list(range(len(expected)))
    assert arrays["n_epoch"].tolist() == [value // 60 for value in expected]
    some = trace.arrays("extracted_feature", input_ids=["9-1", "2-0", "7-0"])
    assert some["features"].tolist() == [20, 70, 91] and some["camera"].tolist() == ["c2", "c7", "c9"]


def test_the_rich_trace_reads_the_same_with_runs_of_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_dir = rich_trace(tmp_path / "data").write()
    trace = open_trace("model", "v1", data_dir=tmp_path / "data")
    whole = trace.arrays("extracted_feature")
    monkeypatch.setattr(call_stream, "scan", one_by_one)
    again = open_trace("model", "v1", data_dir=tmp_path / "data")
    for name, values in again.arrays("extracted_feature").items():
        for one, other in zip(values, whole[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert_same(again, trace, dedupe=True)
    assert trace_dir.exists()


def one_by_one(segment: Any, decoder: Any, after: int | None, *, is_checked: bool) -> Any:
    headers = segment.headers(after, 3)
    return [decoder.decode(key, value) for key, value in headers], headers[-1][0] if headers else None


def test_a_call_found_in_two_segments_counts_once_within_a_run(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(6):
        alike(writer, number)
    for number in (2, 3):
        alike(writer, number, sequence=1, first_row=2 * number)
    trace = opened(writer)
    assert trace.num_rows("extracted_feature") == 12
    assert trace.arrays("extracted_feature")["features"][::2].tolist() == [0, 10, 20, 30, 40, 50]


def test_rows_that_vary_only_between_runs_are_ragged(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(6):
        shape = (2, 1 + number // 3)
        fixed = Column(np.full((1, 1 + number // 3), number, "<f4"), broadcast=True)
        writer.call(number, ["a", "b"], {"features": Column(np.full(shape, number, "<f4")), "fixed": fixed})
    trace = opened(writer)
    for name in ("features", "fixed"):
        rows = trace.arrays("extracted_feature")[name]
        assert [row.tolist() for row in rows] == [
            [number] * (1 + number // 3) for number in range(6) for _ in range(2)
        ]


Change = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda core, description: core.update(rows=3), "samples"),
        (lambda core, description: core.update(rows=2**33 + 2), "samples|contradict"),
        (lambda core, description: core.update(ground_truth_rows=1), "contradict"),
        (lambda core, description: core.update(first_row=2**63 - 1), "contradict"),
        (lambda core, description: core.update(rank=1), "another segment"),
        (lambda core, description: core.update(call=9), "another segment"),
        (lambda core, description: core.update(epoch=4), "another segment"),
        (lambda core, description: core["chunks"][1].__setitem__(3, 4), "bytes where its shape needs"),
        (lambda core, description: description["columns"][1].update(shape=[2, 2**40]), "bytes where|shape"),
        (lambda core, description: description["columns"][1].update(capture=77), "0 bytes where"),
        (lambda core, description: description["columns"][1].update(dtype="int3"), "int3"),
        (lambda core, description: description["columns"].clear(), "no input_id"),
        (lambda core, description: description.update(dataset_type=7), "not text"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(3):
        alike(writer, number)
    segment = writer.segment(0)
    key, value = segment.calls[1]
    kind, core, description, inline, _ = msgpack.unpackb(value)
    change(core, description)
    body = b"\x95" + b"".join(msgpack.packb(part) for part in (kind, core, description, inline))
    segment.calls[1] = (key, body + b"\xce" + crc32c(body).to_bytes(4, "big"))
    with pytest.raises(CorruptDataError, match=message):
        opened(writer).arrays("extracted_feature")


def test_a_damaged_chunk_within_a_run_is_corrupt_data(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(3):
        alike(writer, number)
    segment = writer.segment(0)
    key, data = segment.chunks[-1]
    segment.chunks[-1] = (key, b"\xff" + data[1:])
    with pytest.raises(CorruptDataError, match="checksum"):
        opened(writer).arrays("ground_truth")


def test_text_that_is_no_text_within_a_run_is_corrupt_data(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(3):
        writer.call(number, ["a"], {"camera": Column([number, "x"][number % 2 : number % 2 + 1], "str")})
    with pytest.raises(CorruptDataError, match="camera"):
        opened(writer).arrays("extracted_feature")
