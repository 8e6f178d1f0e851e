"""`recover_trace`: an intact trace comes back bit for bit, and of a damaged one all that is sound."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import CorruptDataError, InvalidInputError, NotFoundError, TraceInUseError
from ml_debugger.store import layout
from ml_debugger.store.page_file import PageFile
from ml_debugger.trace.catalog import Snapshot
from ml_debugger.trace.recover import RecoverReport, recover_trace
from ml_debugger.trace.trace import Trace
from ml_debugger.trace.verify import verify_trace
from ml_debugger.training import ClassificationTracer
from test_export_zip import assert_same, rich_trace
from test_verify import changed, segment_of

PAGE_BYTES = 4096
TABLES = ("extracted_feature", "ground_truth")


def many_calls(data_dir: Path, calls: int = 40) -> FormatWriter:
    """One segment with trees of several pages, of two rows a call."""
    writer = FormatWriter(data_dir)
    generator = np.random.default_rng(5)
    for call in range(calls):
        width = 700 if call % 2 else 30
        columns = {"features": Column(generator.normal(size=(2, width)).astype("<f4"))}
        writer.call(call, [f"{call}a", f"{call}b"], columns, {"label": Column(np.array([call, 1], "<i8"))})
    return writer


def recover(trace_dir: Path, output: Path) -> RecoverReport:
    """Recover, and check that what came is sound and that the damaged trace is as it was."""
    before = content(trace_dir)
    report = recover_trace(trace_dir.parent.parent, "model", "v1", output)
    assert content(trace_dir) == before
    checked = verify_trace(report.directory)
    assert checked.ok, checked.problems
    assert (checked.calls, checked.rows) == (report.calls, report.rows)
    return report


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def cells(trace: Trace, table: str) -> dict[int, dict[str, Any]]:
    """Every row by its row_id, as what can be compared bit for bit."""
    columns = trace.arrays(table, dedupe=False)
    rows = {}
    for position, row_id in enumerate(columns["row_id"]):
        rows[int(row_id)] = {name: frozen(values[position]) for name, values in columns.items()}
    return rows


def frozen(value: Any) -> Any:
    """A cell as what can be compared; how wide its column's text is depends on the other rows."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value.item() if isinstance(value, np.generic) else value


def gaps(directory: Path) -> list[tuple[int, int, str]]:
    return sorted(tuple(gap) for gap in Snapshot(directory).gaps)


def assert_equal_traces(data_dir: Path, output: Path) -> None:
    before, after = open_trace("model", "v1", data_dir=data_dir), open_trace("model", "v1", data_dir=output)
    assert after.epochs == before.epochs and after.attempts == before.attempts
    assert_same(before, after)
    assert_same(before, after, dedupe=False)


def test_an_intact_trace_is_recovered_bit_for_bit(tmp_path: Path) -> None:
    trace_dir = rich_trace(tmp_path / "data").write()
    seen: list[tuple[int, int]] = []
    report = recover_trace(
        tmp_path / "data", "model", "v1", tmp_path / "out", lambda done, total: seen.append((done, total))
    )
    assert report.ok and report.problems == [] and report.lost == []
    assert (report.calls, report.rows, report.ground_truth_rows, report.discarded_rows) == (12, 24, 18, 8)
    assert seen[-1][0] == seen[-1][1] > 0
    assert_equal_traces(tmp_path / "data", tmp_path / "out")
    assert gaps(report.directory) == gaps(trace_dir)
    assert layout.read_version(report.directory) == layout.read_version(trace_dir)


def test_what_was_recovered_can_be_recovered_again(tmp_path: Path) -> None:
    rich_trace(tmp_path / "data").write()
    recover_trace(tmp_path / "data", "model", "v1", tmp_path / "once")
    report = recover_trace(tmp_path / "once", "model", "v1", tmp_path / "twice")
    assert report.ok and report.rows == 24
    assert_equal_traces(tmp_path / "data", tmp_path / "twice")


def test_a_trace_that_a_tracer_wrote_is_recovered(data_dir: Path, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 900), torch.nn.Linear(900, 2))
    config = TracerConfig(data_dir=str(data_dir), commit_interval_s=0.01)
    for attempt in range(2):
        with ClassificationTracer(model, "model", "v1", {"hidden": "0"}, config=config) as tracer:
            for step in range(12):
                tracer(torch.randn(4, 3), [0, 1, 2, 3], list(range(4)), "train", attempt + step // 8)
                tracer.flush()
            if not attempt:
                tracer.drop_epoch_data(0)
    report = recover_trace(data_dir, "model", "v1", tmp_path / "out")
    assert report.ok and report.problems == [] and report.rows == 4 * 4 + 12 * 4
    assert_equal_traces(data_dir, tmp_path / "out")
    # Recording goes on in the new trace, with the next attempt.
    there = TracerConfig(data_dir=str(tmp_path / "out"))
    with ClassificationTracer(model, "model", "v1", {"hidden": "0"}, config=there) as tracer:
        tracer(torch.randn(4, 3), None, list(range(4)), "train", 9)
    assert open_trace("model", "v1", data_dir=tmp_path / "out").attempts == [0, 1, 2]


def test_a_segment_that_a_power_cut_set_aside_is_recovered(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write(
        sealed=False, durability="process", boot_id="another boot"
    )
    with pytest.warns(UserWarning, match="ml-debugger recover"):
        assert open_trace("model", "v1", data_dir=tmp_path / "data").epochs == []
    report = recover(trace_dir, tmp_path / "out")
    assert report.ok and report.rows == 80
    assert "lost power" in report.problems[0].problem
    twin = many_calls(tmp_path / "twin")
    twin.write()
    assert_equal_traces(tmp_path / "twin", tmp_path / "out")


def test_a_call_with_a_damaged_chunk_is_lost_alone_and_becomes_a_gap(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    path = segment_of(trace_dir) / "data.mdb"
    place = next(value for value in chunks_of(path) if value.length_bytes > PAGE_BYTES)
    flip(path, place.position + 100)
    report = recover(trace_dir, tmp_path / "out")
    (lost,) = report.lost
    assert (lost.rank, lost.attempt, lost.epoch, lost.calls, lost.rows) == (0, 0, 0, 1, 2)
    assert lost.first_call == lost.last_call == 1 and "chunk" in lost.problem
    assert report.rows == 78 and gaps(report.directory) == [(1, 2, "damaged")]


def chunks_of(path: Path) -> list[Any]:
    with PageFile(path) as pages:
        assert pages.root is not None
        named = {value.key: value for value in pages.walk(pages.root)}
        tree = named[b"chunks"].tree
        assert tree is not None
        return list(pages.walk(tree[1]))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def test_a_damaged_header_costs_its_call_and_row_numbers_say_what_is_missing(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    with lmdb.open(str(segment_of(trace_dir)), max_dbs=2) as environment:
        headers = environment.open_db(b"headers", create=False)
        with environment.begin(write=True) as transaction:
            key = (7).to_bytes(8, "big")
            value = bytes(transaction.get(key, db=headers))
            transaction.put(key, value[:-9] + b"!" + value[-8:], db=headers)
    scrub_free_pages(segment_of(trace_dir) / "data.mdb")
    report = recover(trace_dir, tmp_path / "out")
    (lost,) = report.lost
    assert (lost.epoch, lost.first_call, lost.last_call, lost.rows) == (0, 7, 7, 2)
    assert report.rows == 78 and gaps(report.directory) == [(7, 2, "damaged")]


def scrub_free_pages(path: Path) -> None:
    """Overwrite pages that no tree leads to: they may hold what was there before."""
    used = set()
    with PageFile(path) as pages:
        assert pages.root is not None
        found = list(pages.walk(pages.root))
        for value in found:
            if value.tree is not None and value.tree[0]:
                found_there = list(pages.walk(value.tree[1]))
                for big in found_there:
                    first, last = big.position, big.position + big.length_bytes
                    used |= set(range(first // PAGE_BYTES, last // PAGE_BYTES + 1))
        states = bytes(pages._states)
    data = bytearray(path.read_bytes())
    for number in range(2, len(data) // PAGE_BYTES):
        if not states[number] and number not in used:
            data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)
    path.write_bytes(data)


def test_an_earlier_state_of_a_page_gives_a_damaged_header_back(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    changed(segment_of(trace_dir), b"headers", lambda key, value: value[:-9] + b"!" + value[-8:])
    report = recover(trace_dir, tmp_path / "out")
    assert report.ok and report.rows == 80


def test_damaged_tree_pages_cost_nothing_that_is_sound(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    path = segment_of(trace_dir) / "data.mdb"
    data = bytearray(path.read_bytes())
    for page in range(2 * PAGE_BYTES, len(data), PAGE_BYTES):
        if int.from_bytes(data[page : page + 8], "little") == page // PAGE_BYTES and data[page + 10] in (
            1,
            2,
        ):
            # A branch or a leaf: the lower end of its free space.
            data[page + 12 : page + 14] = b"\xff\xff"
    path.write_bytes(data)
    report = recover(trace_dir, tmp_path / "out")
    assert report.ok and report.rows == 80 and "page" in report.problems[0].problem


@pytest.mark.parametrize("page", [0, 1])
def test_lost_meta_pages_cost_nothing_that_is_sound(tmp_path: Path, page: int) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    path = segment_of(trace_dir) / "data.mdb"
    data = bytearray(path.read_bytes())
    data[: (page + 1) * PAGE_BYTES] = bytes((page + 1) * PAGE_BYTES)
    path.write_bytes(data)
    report = recover(trace_dir, tmp_path / "out")
    assert report.ok and report.rows == 80 and "meta" in report.problems[0].problem


def test_a_file_cut_off_anywhere_gives_what_is_before_the_cut(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    path = segment_of(trace_dir) / "data.mdb"
    whole = path.read_bytes()
    rows = []
    cuts = [0, 5, PAGE_BYTES, *range(3 * PAGE_BYTES + 17, len(whole), len(whole) // 12)]
    for number, cut in enumerate(cuts):
        path.write_bytes(whole[:cut])
        report = recover(trace_dir, tmp_path / f"out{number}")
        assert report.problems and report.ok == (report.rows == 80)
        assert report.rows + sum(lost.rows or 0 for lost in report.lost) == 80
        assert sum(rows for _, rows, _ in gaps(report.directory)) == 80 - report.rows
        rows.append(report.rows)
    assert rows == sorted(rows) and rows[0] == 0 < rows[-1]


def test_no_flipped_bytes_get_through_and_each_loss_is_told(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    path = segment_of(trace_dir) / "data.mdb"
    whole = path.read_bytes()
    good = cells(open_trace("model", "v1", data_dir=tmp_path / "data"), TABLES[0])
    choice = random.Random(11)
    for number in range(25):
        data = bytearray(whole)
        for _ in range(choice.choice([1, 3, 40])):
            data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
        path.write_bytes(data)
        output = tmp_path / f"out{number}"
        report = recover(trace_dir, output)
        assert report.rows + sum(lost.rows or 0 for lost in report.lost) == 80, (number, report.lost)
        assert report.ok == (report.rows == 80)
        if report.rows:
            found = cells(open_trace("model", "v1", data_dir=output), TABLES[0])
            assert found.items() <= good.items()
        shutil.rmtree(output)


def test_garbage_instead_of_a_file_is_told(tmp_path: Path) -> None:
    trace_dir = many_calls(tmp_path / "data").write()
    path = segment_of(trace_dir) / "data.mdb"
    path.write_bytes(random.Random(1).randbytes(40 * PAGE_BYTES))
    report = recover(trace_dir, tmp_path / "out")
    assert report.rows == 0 and [lost.rows for lost in report.lost] == [80]
    path.unlink()
    report = recover(trace_dir, tmp_path / "out2")
    assert report.rows == 0 and [(lost.calls, lost.rows) for lost in report.lost] == [(40, 80)]


def three_segments(data_dir: Path) -> Path:
    writer = FormatWriter(data_dir)
    for call in range(9):
        writer.call(call, ["a", "b"], {"features": Column(np.ones(2, "<f4") * call)}, sequence=call // 3)
    return writer.write()


def test_a_missing_segment_is_told_by_the_calls_around_it(tmp_path: Path) -> None:
    trace_dir = three_segments(tmp_path / "data")
    shutil.rmtree(segment_of(trace_dir).with_name("a00000-s00001"))
    report = recover(trace_dir, tmp_path / "out")
    (lost,) = report.lost
    assert (lost.epoch, lost.first_call, lost.last_call, lost.rows) == (0, 3, 5, 6)
    assert report.rows == 12 and gaps(report.directory) == [(3, 6, "damaged")]


def test_a_call_whose_bytes_are_in_a_missing_segment_is_lost(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path / "data")
    writer.call(0, ["a"], {"features": Column(np.ones(1, "<f4"))})
    writer.call(1, ["b"], {"features": Column(np.ones(1, "<f4"))}, chunk_sequence=0, sequence=1)
    trace_dir = writer.write()
    assert recover(trace_dir, tmp_path / "whole").ok
    shutil.rmtree(segment_of(trace_dir))
    report = recover(trace_dir, tmp_path / "out")
    assert report.rows == 0 and sum(lost.rows or 0 for lost in report.lost) == 2
    assert sorted(gaps(report.directory)) == [(0, 1, "damaged"), (1, 1, "damaged")]


def test_a_dropped_epoch_is_not_taken_for_a_loss(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path / "data")
    for call in range(4):
        writer.call(call, ["a"], {"features": Column(np.ones(1, "<f4"))}, epoch=call)
    trace_dir = writer.write()
    shutil.rmtree(trace_dir / "rank-00000" / "epoch-1")
    assert recover(trace_dir, tmp_path / "out").ok
    (trace_dir / "rank-00000" / "epoch-3" / "a00000-s00000" / "data.mdb").write_bytes(b"")
    report = recover(trace_dir, tmp_path / "out2")
    assert [(lost.epoch, lost.rows) for lost in report.lost] == [(3, 1)]


def test_a_call_that_is_sound_in_another_segment_is_not_lost(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path / "data")
    first = writer.call(0, ["a"], {"features": Column(np.ones(1, "<f4"))})
    writer.call(0, ["a"], {"features": Column(np.ones(1, "<f4"))}, first_row=first, sequence=1)
    trace_dir = writer.write()
    changed(segment_of(trace_dir), b"chunks", lambda key, value: b"!" * len(value))
    scrub_free_pages(segment_of(trace_dir) / "data.mdb")
    report = recover(trace_dir, tmp_path / "out")
    assert report.ok and report.calls == 1


@pytest.mark.parametrize("text", ["{", None, "[1]"])
@pytest.mark.parametrize("name", ["version.json", "attempts.json", "segment.json", "sealed.json"])
def test_damaged_small_files_cost_no_row(tmp_path: Path, name: str, text: str | None) -> None:
    trace_dir = rich_trace(tmp_path / "data").write()
    for path in list(trace_dir.rglob(name)):
        path.unlink() if text is None else path.write_text(text)
    report = recover(trace_dir, tmp_path / "out")
    assert report.ok and report.rows == 24 and report.attempts == [0, 1]
    assert report.problems or (name, text) == ("sealed.json", None)
    twin = rich_trace(tmp_path / "twin")
    twin.write()
    assert_equal_traces(tmp_path / "twin", tmp_path / "out")


def test_a_damaged_slice_gives_its_sound_calls(tmp_path: Path) -> None:
    many_calls(tmp_path / "data").write()
    once = recover_trace(tmp_path / "data", "model", "v1", tmp_path / "once")
    (path,) = once.directory.rglob("*.zip")
    data = path.read_bytes()
    flip(path, len(data) // 2)
    report = recover_trace(tmp_path / "once", "model", "v1", tmp_path / "out")
    assert report.rows == 78 and [lost.rows for lost in report.lost] == [2]
    path.write_bytes(data[: len(data) // 2])
    report = recover_trace(tmp_path / "once", "model", "v1", tmp_path / "out2")
    assert report.rows == 0 and [lost.rows for lost in report.lost] == [80]


def test_a_trace_that_is_recorded_is_refused(data_dir: Path, tmp_path: Path) -> None:
    config = TracerConfig(data_dir=str(data_dir))
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with ClassificationTracer(model, "model", "v1", {"hidden": "0"}, config=config) as tracer:
        tracer(torch.ones(1, 3), None, ["a"])
        with pytest.raises(TraceInUseError):
            recover_trace(data_dir, "model", "v1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trace_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    trace_dir = rich_trace(tmp_path / "data").write()
    document = json.loads((trace_dir / "version.json").read_text())
    (trace_dir / "version.json").write_text(json.dumps(document | {"format_version": 99}))
    with pytest.raises(CorruptDataError, match="format version 99"):
        recover_trace(tmp_path / "data", "model", "v1", tmp_path / "out")


def test_an_output_that_is_used_and_an_unknown_trace_are_refused(tmp_path: Path) -> None:
    trace_dir = rich_trace(tmp_path / "data").write()
    with pytest.raises(InvalidInputError, match="not empty"):
        recover_trace(tmp_path / "data", "model", "v1", tmp_path / "data")
    with pytest.raises(InvalidInputError, match="within the trace"):
        recover_trace(tmp_path / "data", "model", "v1", trace_dir / "new")
    with pytest.raises(NotFoundError):
        recover_trace(tmp_path / "data", "model", "v2", tmp_path / "out")


def test_the_command_lists_what_is_missing_and_ends_with_one(tmp_path: Path) -> None:
    trace_dir = three_segments(tmp_path / "data")
    command = [sys.executable, "-m", "ml_debugger.cli", "recover", "model", "v1"]
    command += ["--data-dir", str(tmp_path / "data"), "--output"]
    done = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "everything was saved: 9 calls" in done.stdout
    shutil.rmtree(segment_of(trace_dir).with_name("a00000-s00001"))
    done = subprocess.run([*command, str(tmp_path / "part")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "calls among 3 to 5, 6 rows" in done.stdout
    done = subprocess.run(
        [*command, str(tmp_path / "json"), "--json"], capture_output=True, text=True, timeout=60
    )
    document = json.loads(done.stdout)
    assert done.returncode == 1 and document["ok"] is False and document["rows"] == 12
    assert document["lost"][0]["first_call"] == 3 and document["lost"][0]["rows"] == 6
    done = subprocess.run([*command, str(tmp_path / "json")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "not empty" in done.stderr


def test_the_command_names_its_directory_after_the_trace(tmp_path: Path) -> None:
    three_segments(tmp_path / "data")
    command = [sys.executable, "-m", "ml_debugger.cli", "recover", "model"]
    options = {"capture_output": True, "text": True, "timeout": 60, "cwd": tmp_path}
    done = subprocess.run([*command, "nobody", "--data-dir", "data"], **options)
    assert done.returncode == 1 and os.listdir(tmp_path) == ["data"]
    done = subprocess.run([*command, "v1", "--data-dir", "data"], **options)
    assert done.returncode == 0, done.stderr
    assert open_trace("model", "v1", tmp_path / "model_v1_recovered").num_rows("extracted_feature") == 18
