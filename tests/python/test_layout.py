"""Paths and small files of a trace."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from ml_debugger.errors import (
    CorruptDataError,
    InvalidInputError,
    InvalidTypeError,
    NotFoundError,
    StorageError,
)
from ml_debugger.job import Job
from ml_debugger.store import layout

INFO = layout.VersionInfo("net", "v1", "ab" * 32, {"features": None}, [{"name": "x", "type": "int"}], [])


def segment(partition: Path, name: str, *, sealed: bool, durability: str, boot_id: str) -> None:
    path = partition / name
    path.mkdir(parents=True)
    description = {"format_version": 1, "durability": durability, "boot_id": boot_id}
    (path / "segment.json").write_text(json.dumps(description))
    if sealed:
        (path / "sealed.json").write_text(
            json.dumps({"format_version": 1, "rows": 3, "ground_truth_rows": 2})
        )


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", ".", "..", "a\0b", "\ud800", "ü" * 500, "CON", "a b\n"]
)
def test_any_name_becomes_one_safe_directory(name: str) -> None:
    made = layout.slug(name)
    assert made == Path(made).name
    assert made.isascii()
    assert not made.startswith(".")
    assert len(made) <= 53


def test_names_that_look_alike_stay_apart() -> None:
    assert len({layout.slug(name) for name in ("a/b", "a_b", "a b", "A_b")}) == 4


def test_the_slug_is_fixed_by_the_record_format() -> None:
    assert layout.slug("..net v1") == "__net_v1-6f7f4960b606"


def test_version_file_round_trips_and_the_first_writer_wins(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    assert layout.write_version(directory, INFO) == INFO
    other = layout.VersionInfo("net", "v1", "cd" * 32, {}, [], [])
    assert layout.write_version(directory, other) == INFO
    assert layout.read_version(directory) == INFO
    assert layout.write_version(directory, other, replace=True) == other
    assert layout.read_version(directory) == other
    assert os.listdir(directory) == ["version.json"]


def test_directories_and_files_are_private(tmp_path: Path) -> None:
    layout.write_version(tmp_path / "a" / "b", INFO)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "b" / "version.json").stat().st_mode) == 0o600


def test_reading_what_is_not_there_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        layout.read_version(tmp_path / "x")
    assert layout.rank_directories(tmp_path / "x") == []
    assert layout.partitions(tmp_path / "x") == []
    assert layout.segments(tmp_path / "x") == []
    assert layout.attempts(tmp_path / "x") == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format_version": 99}', '{"format_version": 1}', '{"format_version": true}']
)
def test_damaged_or_newer_version_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "version.json").write_text(text)
    with pytest.raises(CorruptDataError, match=r"version\.json"):
        layout.read_version(tmp_path)


def test_attempts_count_up_even_when_their_file_is_lost(tmp_path: Path) -> None:
    assert [layout.register_attempt(tmp_path) for _ in range(3)] == [0, 1, 2]
    assert layout.attempts(tmp_path) == [0, 1, 2]
    (tmp_path / "attempts.json").unlink()
    segment(tmp_path / "epoch-3", "a00007-s00000", sealed=True, durability="power", boot_id="x")
    assert layout.register_attempt(tmp_path) == 8


def start(trace_dir: Path, world: int, first_pid: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the ranks of a start of ``world`` processes get for two tracers each, rank by rank."""
    job = Job("127.0.0.1:29500#0", world)
    numbers: list[list[int]] = [[] for _ in range(world)]
    for _ in range(2):
        for rank in range(world):
            monkeypatch.setattr("os.getpid", lambda pid=first_pid + rank: pid)
            rank_dir = layout.rank_directory(trace_dir, rank)
            rank_dir.mkdir(parents=True, exist_ok=True)
            numbers[rank].append(layout.register_attempt(rank_dir, job))
    return numbers


def test_ranks_of_a_larger_start_with_the_same_port_share_new_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(tmp_path, 2, 100, monkeypatch) == [[0, 1]] * 2
    assert start(tmp_path, 3, 200, monkeypatch) == [[2, 3]] * 3
    assert start(tmp_path, 1, 300, monkeypatch) == [[4, 5]]
    assert start(tmp_path, 4, 400, monkeypatch) == [[6, 7]] * 4


def test_more_attempts_than_a_row_id_can_hold_are_refused(tmp_path: Path) -> None:
    document = {"format_version": 1, "attempts": [{"attempt": layout.MAX_ATTEMPTS - 1}]}
    layout.write_json(tmp_path / "attempts.json", document)
    with pytest.raises(StorageError, match="version_name"):
        layout.register_attempt(tmp_path)


def test_listing_is_in_order_and_ignores_what_is_being_deleted(tmp_path: Path) -> None:
    for name in ("epoch-10", "epoch-2", "epoch-none", "trash-epoch-1-0", "epoch-x"):
        (tmp_path / "rank-00001" / name).mkdir(parents=True)
    (tmp_path / "rank-00000").mkdir()
    assert [rank for rank, _ in layout.rank_directories(tmp_path)] == [0, 1]
    assert [epoch for epoch, _ in layout.partitions(tmp_path / "rank-00001")] == [-1, 2, 10]
    for epoch, path in layout.partitions(tmp_path / "rank-00001"):
        assert layout.partition_directory(tmp_path / "rank-00001", epoch) == path


def test_only_an_unsealed_fast_segment_of_another_boot_is_unusable(tmp_path: Path) -> None:
    boot = layout.boot_id()
    segment(tmp_path, "a00000-s00000", sealed=True, durability="process", boot_id="other")
    segment(tmp_path, "a00000-s00001", sealed=False, durability="process", boot_id=boot)
    segment(tmp_path, "a00000-s00002", sealed=False, durability="process", boot_id="other")
    segment(tmp_path, "a00001-s00000", sealed=False, durability="power", boot_id="other")
    (tmp_path / "a00001-s00001").mkdir()
    found = layout.segments(tmp_path)
    assert [(entry.attempt, entry.sequence) for entry in found] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [(entry.sealed, entry.usable) for entry in found] == [
        (True, True),
        (False, True),
        (False, False),
        (False, True),
    ]


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="data_dir"):
        layout.make_directory(tmp_path / "file" / "sub")


def test_data_dir_is_the_argument_else_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert layout.resolve_data_dir() == tmp_path / "mld_data"
    monkeypatch.setenv("MLD_DATA_DIR", "/elsewhere")
    assert layout.resolve_data_dir() == Path("/elsewhere")
    assert layout.resolve_data_dir("here") == tmp_path / "here"
    with pytest.raises(InvalidTypeError):
        layout.resolve_data_dir(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        layout.resolve_data_dir("")


@pytest.mark.parametrize("name", [None, 3, b"x"])
def test_names_are_text(name: object) -> None:
    with pytest.raises(InvalidTypeError):
        layout.check_name(name, "model_name")
    with pytest.raises(InvalidInputError):
        layout.check_name("", "model_name")
