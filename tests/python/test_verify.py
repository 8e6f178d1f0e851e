"""`verify_trace`: sound traces are sound, and every kind of damage is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger import TracerConfig
from ml_debugger.errors import NotFoundError
from ml_debugger.store import layout
from ml_debugger.trace import verify
from ml_debugger.trace.verify import verify_trace
from ml_debugger.training import ClassificationTracer
from test_export_zip import rich_trace


@pytest.fixture
def trace_dir(tmp_path: Path) -> Path:
    return rich_trace(tmp_path / "data").write()


def segment_of(trace_dir: Path) -> Path:
    return trace_dir / "rank-00000" / "epoch-0" / "a00000-s00000"


def changed(segment: Path, database: bytes, change: Callable[[bytes, bytes], bytes | None]) -> None:
    """Rewrite the first value of a database; None deletes it."""
    with lmdb.open(str(segment), max_dbs=2) as environment:
        opened = environment.open_db(database, create=False) if database else None
        with environment.begin(write=True) as transaction:
            with transaction.cursor(opened) as cursor:
                assert cursor.first()
                key, value = bytes(cursor.key()), bytes(cursor.value())
            new = change(key, value)
            if new is None:
                transaction.delete(key, db=opened)
            else:
                transaction.put(key, new, db=opened)


def problems(trace_dir: Path) -> str:
    report = verify_trace(trace_dir)
    assert report.ok == (not report.problems)
    return "\n".join(f"{problem.path}: {problem.problem}" for problem in report.problems)


def test_a_sound_trace_is_sound(trace_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_trace(trace_dir, lambda done, total: seen.append((done, total)))
    assert report.ok and report.problems == [] and report.structure_checked
    assert (report.calls, report.rows, report.ground_truth_rows, report.discarded_rows) == (12, 24, 18, 8)
    assert report.attempts == [0, 1] and report.chunks > 100 and report.bytes_checked > 1000
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_a_trace_is_sound_while_it_is_recorded_and_after(data_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    config = TracerConfig(data_dir=str(data_dir))
    directory = layout.trace_directory(data_dir, "m", "v")
    with ClassificationTracer(model, "m", "v", {"hidden": "0"}, config=config) as tracer:
        for epoch in range(3):
            tracer(torch.ones(40, 3), None, list(range(40)), "train", epoch)
        tracer.flush()
        assert problems(directory) == ""
        tracer.drop_epoch_data(1)
    report = verify_trace(directory)
    assert report.ok and report.rows == 80 and report.segments == 2


def test_an_unknown_trace_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        verify_trace(tmp_path / "none")


def test_a_flipped_byte_of_a_chunk_is_found_and_the_rest_is_checked(trace_dir: Path) -> None:
    whole = verify_trace(trace_dir)
    changed(segment_of(trace_dir), b"chunks", lambda key, value: bytes([value[0] ^ 1]) + value[1:])
    report = verify_trace(trace_dir)
    (problem,) = report.problems
    assert "does not match its checksum" in problem.problem and "call 0" in problem.problem
    assert report.rows == whole.rows and report.chunks == whole.chunks


def test_a_missing_chunk_is_found(trace_dir: Path) -> None:
    changed(segment_of(trace_dir), b"chunks", lambda key, value: None)
    assert "missing or cut" in problems(trace_dir)


def test_a_flipped_byte_of_a_header_is_found(trace_dir: Path) -> None:
    changed(segment_of(trace_dir), b"headers", lambda key, value: value[:-9] + b"!" + value[-8:])
    assert "checksum" in problems(trace_dir)


def test_a_missing_header_contradicts_the_counters(trace_dir: Path) -> None:
    changed(segment_of(trace_dir), b"headers", lambda key, value: None)
    found = problems(trace_dir)
    assert "calls, its counters say" in found and "rows, sealed.json say" in found


def test_a_cut_file_is_found_without_reading_behind_its_end(trace_dir: Path) -> None:
    path = segment_of(trace_dir) / "data.mdb"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 8192 * 4096])
    assert "it was cut" in problems(trace_dir)
    path.write_bytes(b"short")
    assert "two pages" in problems(trace_dir)
    path.write_bytes(b"x" * 20000)
    assert "no LMDB file" in problems(trace_dir)
    path.unlink()
    assert "cannot be read" in problems(trace_dir)


def test_a_damaged_page_is_found_where_lmdb_is_installed(trace_dir: Path) -> None:
    path = segment_of(trace_dir) / "data.mdb"
    data = bytearray(path.read_bytes())
    # The lower bound of free space of every page behind the two metas.
    for page in range(2 * 4096, len(data), 4096):
        if data[page + 10] in (1, 2):
            data[page + 12 : page + 14] = b"\xff\xff"
    path.write_bytes(data)
    assert str(path) in problems(trace_dir)


def test_without_lmdb_the_report_says_that_pages_were_not_checked(
    trace_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_offline_verifier", lambda: None)
    report = verify_trace(trace_dir)
    assert report.ok and not report.structure_checked and report.rows == 24


def test_a_missing_segment_is_found(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for sequence in range(3):
        writer.call(sequence, ["a"], {"features": Column(np.ones(1, "<f4"))}, sequence=sequence)
    trace_dir = writer.write()
    assert problems(trace_dir) == ""
    segment_of(trace_dir).with_name("a00000-s00001").rename(tmp_path / "away")
    assert "segment 1 of attempt 0 is missing" in problems(trace_dir)


def test_bytes_in_a_segment_that_is_gone_are_found(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], {"features": Column(np.ones(1, "<f4"))})
    writer.call(1, ["b"], {"features": Column(np.ones(1, "<f4"))}, chunk_sequence=1)
    trace_dir = writer.write()
    assert problems(trace_dir) == ""
    segment_of(trace_dir).with_name("a00000-s00001").rename(tmp_path / "away")
    assert "call 1" in problems(trace_dir)


def test_a_segment_in_the_wrong_place_is_found(trace_dir: Path) -> None:
    segment = segment_of(trace_dir)
    segment.rename(segment.with_name("a00003-s00000"))
    found = problems(trace_dir)
    assert "attempt is 0, expected 3" in found and "not in attempts.json" in found


def test_row_numbers_given_twice_are_found(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a", "b"], {"features": Column(np.ones(2, "<f4"))})
    writer.call(1, ["c"], {"features": Column(np.ones(1, "<f4"))}, first_row=1, epoch=1)
    assert "row numbers of another call" in problems(writer.write())


def test_a_call_that_was_committed_twice_is_no_damage(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    first = writer.call(0, ["a"], {"features": Column(np.ones(1, "<f4"))})
    writer.call(0, ["a"], {"features": Column(np.ones(1, "<f4"))}, first_row=first, sequence=1)
    assert problems(writer.write()) == ""


def test_a_segment_from_before_a_power_cut_is_reported(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], {"features": Column(np.ones(1, "<f4"))})
    trace_dir = writer.write(sealed=False, durability="process", boot_id="another boot")
    assert "lost power" in problems(trace_dir)


@pytest.mark.parametrize("name", ["version.json", "rank-00000/attempts.json"])
def test_damaged_small_files_are_found(trace_dir: Path, name: str) -> None:
    (trace_dir / name).write_text("{")
    assert "is not JSON" in problems(trace_dir)


def test_the_command_lists_damage_and_ends_with_one(trace_dir: Path) -> None:
    changed(segment_of(trace_dir), b"chunks", lambda key, value: bytes([value[0] ^ 1]) + value[1:])
    command = [sys.executable, "-m", "ml_debugger.cli", "verify", "model", "v1"]
    command += ["--data-dir", str(trace_dir.parent.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "damage: " in done.stdout and "checksum" in done.stdout
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    document = json.loads(done.stdout)
    assert done.returncode == 1 and document["ok"] is False and len(document["problems"]) == 1
    assert set(document["problems"][0]) == {"path", "problem"}
