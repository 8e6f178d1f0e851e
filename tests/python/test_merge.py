"""``ml-debugger merge``: directories of nodes become one trace, whole or not at all, as often as asked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ml_debugger import TracerConfig, open_trace
from ml_debugger.cli.app import cli
from ml_debugger.errors import (
    ArchitectureMismatchError,
    CorruptDataError,
    InvalidInputError,
    NotFoundError,
    StorageError,
    TraceInUseError,
)
from ml_debugger.store import merging
from ml_debugger.store.merging import merge_data_dirs
from ml_debugger.trace.verify import verify_trace
from ml_debugger.training import ClassificationTracer

FEATURES = "extracted_feature"
Record = Callable[..., Path]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Records some calls of a rank into a node's directory, as part of a job."""

    def run(
        node: str,
        rank: int,
        *,
        run: str = "job",
        width: int = 3,
        fields: Any = None,
        world: int = 2,
        calls: int = 2,
    ) -> Path:
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("TORCHELASTIC_RUN_ID", run)):
            monkeypatch.setenv(name, str(value))
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, width))
        config = TracerConfig(data_dir=tmp_path / node, durability="process")
        layers = {"stem": "0"}
        with ClassificationTracer(
            model, "net", "v1", layers, additional_fields=fields, config=config
        ) as tracer:
            for number in range(calls):
                x = torch.full((3, 4), 100.0 * rank + number)
                ids = [f"r{rank}c{number}i{i}" for i in range(3)]
                tracer(x, [0, 1, 2], ids, "train", number)
        return tmp_path / node

    return run


def ids_of(data_dir: Path) -> list[str]:
    found: list[str] = open_trace("net", "v1", data_dir=data_dir).arrays(FEATURES)["input_id"].tolist()
    return sorted(found)


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.name not in ("writer.lock",)
    }


def test_ranks_of_two_nodes_read_as_one_trace(record: Record, tmp_path: Path) -> None:
    sources = [record("a", 0), record("b", 1)]
    before = [tree(source) for source in sources]
    report = merge_data_dirs(sources, tmp_path / "all")
    assert (report.traces, report.ranks, report.segments_linked, report.segments_copied) == (1, 2, 4, 0)
    assert ids_of(tmp_path / "all") == sorted([*ids_of(sources[0]), *ids_of(sources[1])])
    trace = open_trace("net", "v1", data_dir=tmp_path / "all")
    assert trace.attempts == [0]
    assert np.array_equal(np.unique(trace.arrays(FEATURES, n_epoch=1)["stem"]), [1.0, 101.0])
    (directory,) = (tmp_path / "all").glob("*/*")
    assert verify_trace(directory).problems == []
    assert [tree(source) for source in sources] == before


def test_verify_and_info_name_the_ranks_that_left_nothing_here(record: Record, tmp_path: Path) -> None:
    (directory,) = record("a", 0, world=3).glob("*/*")
    report = verify_trace(directory)
    assert report.missing_ranks == [1, 2]
    assert report.ok
    verify = CliRunner().invoke(cli, ["verify", "net", "v1", "--data-dir", str(tmp_path / "a")])
    assert verify.exit_code == 0
    assert "missing: ranks 1, 2 of the newest job" in verify.output
    info = CliRunner().invoke(cli, ["info", "net", "v1", "--json", "--data-dir", str(tmp_path / "a")])
    assert json.loads(info.output)["missing_ranks"] == [1, 2]


def test_a_rank_that_recorded_in_an_older_job_only_is_named_too(record: Record, tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        record("a", rank, run="older", world=3)
    (directory,) = record("a", 1, run="newer", world=3).glob("*/*")
    assert verify_trace(directory).missing_ranks == [0, 2]


def test_a_second_merge_changes_nothing_and_a_later_one_adds_what_is_new(
    record: Record, tmp_path: Path
) -> None:
    sources = [record("a", 0), record("b", 1)]
    merge_data_dirs(sources, tmp_path / "all")
    before = {path: found[0] for path, found in tree(tmp_path / "all").items() if path.endswith(".mdb")}
    report = merge_data_dirs(sources, tmp_path / "all")
    assert (report.segments_linked, report.segments_present) == (0, 4)
    assert {
        path: found[0] for path, found in tree(tmp_path / "all").items() if path.endswith(".mdb")
    } == before
    record("a", 0, calls=3)
    assert merge_data_dirs(sources, tmp_path / "all").segments_linked == 3
    assert open_trace("net", "v1", data_dir=tmp_path / "all").attempts == [0, 1]
    assert ids_of(tmp_path / "all") == sorted([*ids_of(sources[0]), *ids_of(sources[1])])


@pytest.mark.parametrize("fails_at", range(1, 12))
def test_an_interrupted_merge_is_no_trace_and_goes_on(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    sources = [record("a", 0), record("b", 1)]
    steps = 0

    def step(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for name in ("link", "rename", "replace"):
            patch.setattr(os, name, step(getattr(os, name)))
        with pytest.raises(StorageError, match="No space left"):
            merge_data_dirs(sources, tmp_path / "all")
    with pytest.raises(NotFoundError):
        open_trace("net", "v1", data_dir=tmp_path / "all")
    merge_data_dirs(sources, tmp_path / "all")
    assert len(ids_of(tmp_path / "all")) == 12
    assert not list(tmp_path.glob("all/*/*/*/trash-*"))
    (directory,) = (tmp_path / "all").glob("*/*")
    assert verify_trace(directory).problems == []


def test_where_links_are_not_to_be_had_segments_are_copied(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    sources = [record("a", 0), record("b", 1)]
    with monkeypatch.context() as patch:
        patch.setattr(merging.os, "link", refuse)
        report = merge_data_dirs(sources, tmp_path / "all")
    assert (report.segments_linked, report.segments_copied) == (0, 4)
    for source in sources:
        shutil.rmtree(source)
    assert len(ids_of(tmp_path / "all")) == 12


def test_traces_of_different_jobs_architectures_or_fields_are_refused_before_anything_is_made(
    record: Record, tmp_path: Path
) -> None:
    first = record("a", 0)
    others = {
        record("b", 1, run="other"): (InvalidInputError, r"different jobs: job and other"),
        record("c", 1, width=5): (ArchitectureMismatchError, "fingerprints"),
        record("d", 1, fields=[{"name": "f", "type": "int", "default": 0}]): (InvalidInputError, "fields"),
        record("e", 0): (InvalidInputError, "attempt 0, of different processes"),
    }
    for other, (kind, message) in others.items():
        with pytest.raises(kind, match=message):
            merge_data_dirs([first, other], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_merge_into_what_another_job_recorded_is_refused(record: Record, tmp_path: Path) -> None:
    merge_data_dirs([record("a", 0)], tmp_path / "all")
    with pytest.raises(InvalidInputError, match="different jobs"):
        merge_data_dirs([record("b", 1, run="other")], tmp_path / "all")
    assert len(ids_of(tmp_path / "all")) == 6


def test_places_that_cannot_be_merged_are_refused(record: Record, tmp_path: Path) -> None:
    source = record("a", 0)
    (tmp_path / "empty").mkdir()
    for sources, output, kind in (
        ([tmp_path / "nowhere"], tmp_path / "all", NotFoundError),
        ([tmp_path / "empty"], tmp_path / "all", NotFoundError),
        ([source, source], tmp_path / "all", InvalidInputError),
        ([source], source, InvalidInputError),
        ([source], source / "in", InvalidInputError),
        ([source], tmp_path, InvalidInputError),
    ):
        with pytest.raises(kind):
            merge_data_dirs(sources, output)
    assert not (tmp_path / "all").exists()


def test_a_directory_that_is_being_recorded_into_is_refused(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = record("a", 0)
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
    config = TracerConfig(data_dir=source)
    with (
        ClassificationTracer(model, "net", "v1", {"stem": "0"}, config=config),
        pytest.raises(TraceInUseError, match="recording"),
    ):
        merge_data_dirs([source], tmp_path / "all")


def test_segments_of_a_killed_process_are_sealed_in_the_output_and_torn_ones_are_set_aside(
    record: Record, tmp_path: Path
) -> None:
    sources = [record("a", 0), record("b", 1)]
    for source in sources:
        for sealed in source.glob("*/*/*/*/*/sealed.json"):
            sealed.unlink()
    for path in sources[1].glob("*/*/*/epoch-1/*/segment.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "another"}))
    report = merge_data_dirs(sources, tmp_path / "all")
    (set_aside,) = report.set_aside
    assert "epoch-1" in set_aside
    assert len(list((tmp_path / "all").glob("*/*/*/*/*/sealed.json"))) == 3
    with pytest.warns(UserWarning, match="lost power"):
        assert len(ids_of(tmp_path / "all")) == 9


def test_a_segment_of_the_output_that_is_another_one_is_told(record: Record, tmp_path: Path) -> None:
    source = record("a", 0)
    merge_data_dirs([source], tmp_path / "all")
    path = next((tmp_path / "all").glob("*/*/*/epoch-0/*/data.mdb"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-4096])
    with pytest.raises(CorruptDataError, match="merge into a new directory"):
        merge_data_dirs([source], tmp_path / "all")


def test_small_files_that_a_killed_merge_was_writing_are_deleted(record: Record, tmp_path: Path) -> None:
    source = record("a", 0)
    merge_data_dirs([source], tmp_path / "all")
    (rank_dir,) = (tmp_path / "all").glob("*/*/rank-*")
    before = sorted(path.name for path in rank_dir.iterdir())
    (rank_dir / ".attempts.json.7.8.tmp").write_text("{")
    merge_data_dirs([source], tmp_path / "all")
    assert sorted(path.name for path in rank_dir.iterdir()) == before


def test_the_command_merges_and_tells_what_it_did(record: Record, tmp_path: Path) -> None:
    sources = [str(record("a", 0)), str(record("b", 1))]
    run = CliRunner().invoke(cli, ["merge", *sources, "--output", str(tmp_path / "all"), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["segments_linked"] == 4
    assert CliRunner().invoke(cli, ["merge", *sources]).exit_code == 2
    assert CliRunner().invoke(cli, ["merge", "--output", str(tmp_path / "x")]).exit_code == 2
    missing = CliRunner().invoke(cli, ["merge", str(tmp_path / "no"), "--output", str(tmp_path / "x")])
    assert missing.exit_code == 1
    assert "there is no directory" in missing.output
