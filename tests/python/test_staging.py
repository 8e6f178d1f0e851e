"""`staging_dir`: segments are written on a local disk, read there, and moved home when they are sealed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ml_debugger import TracerConfig, load_export, open_trace
from ml_debugger.errors import DiskBudgetError
from ml_debugger.store import layout, staging
from ml_debugger.store.dropping import drop_rows
from ml_debugger.store.survey import survey_trace
from ml_debugger.trace.verify import verify_trace
from ml_debugger.training import ClassificationTracer

FEATURES = "extracted_feature"
OTHER_FILESYSTEM = Path("/dev/shm")


@pytest.fixture(params=["rename", "copy"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A staging directory on the filesystem of the data directory, and one on another."""
    if request.param == "rename":
        yield tmp_path / "stage"
        return
    if not OTHER_FILESYSTEM.is_dir() or os.stat(OTHER_FILESYSTEM).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second filesystem")
    path = Path(tempfile.mkdtemp(dir=OTHER_FILESYSTEM))
    yield path
    shutil.rmtree(path)


Open = Callable[..., ClassificationTracer]


@pytest.fixture
def open_tracer(stage: Path, data_dir: Path) -> Iterator[Open]:
    opened: list[ClassificationTracer] = []

    def run(**options: Any) -> ClassificationTracer:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
        settings: dict[str, Any] = {"staging_dir": stage, "durability": "process", **options}
        tracer = ClassificationTracer(model, "net", "v1", {"stem": "0"}, config=TracerConfig(**settings))
        opened.append(tracer)
        return tracer

    yield run
    for tracer in opened:
        tracer.close()


def record(tracer: ClassificationTracer, epoch: int, calls: range = range(3)) -> None:
    for call in calls:
        x = torch.full((4, 4), 100.0 * epoch + call)
        tracer(x, [0, 1, 2, 0], [f"e{epoch}c{call}i{i}" for i in range(4)], "train", epoch)
    tracer.flush()


def segments_in(directory: Path) -> list[str]:
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in directory.glob("**/data.mdb"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_live_segments_are_staged_and_seen_by_readers_and_move_home_at_close(
    open_tracer: Open, stage: Path, data_dir: Path
) -> None:
    tracer = open_tracer()
    for epoch in range(2):
        record(tracer, epoch)
    names = ["epoch-0/a00000-s00000", "epoch-1/a00000-s00000"]
    assert segments_in(stage) == names
    assert segments_in(data_dir) == []
    assert open_trace("net", "v1").num_rows(FEATURES) == 24
    (trace_dir,) = data_dir.glob("*/*")
    assert survey_trace(trace_dir).totals.rows == 24
    assert verify_trace(trace_dir).problems == []
    assert verify_trace(trace_dir).rows == 24
    assert load_export(tracer.export(data_dir.parent)).num_rows(FEATURES) == 24
    tracer.close()
    assert segments_in(data_dir) == names
    assert list(stage.iterdir()) == []
    assert not list(data_dir.glob("*/*/*/staging.json"))
    assert not list(data_dir.glob("*/*/*/trash-*"))
    assert verify_trace(trace_dir).problems == []
    assert open_trace("net", "v1").num_rows("ground_truth") == 24


def test_another_process_reads_what_is_staged(open_tracer: Open, data_dir: Path) -> None:
    record(open_tracer(), 0)
    child = subprocess.run(
        [sys.executable, "-m", "ml_debugger.cli", "info", "net", "v1", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(child.stdout)["rows"] == 12


def test_an_epoch_that_rests_moves_while_the_tracer_records_on(
    open_tracer: Open, stage: Path, data_dir: Path
) -> None:
    """A reader in the middle of it goes on where the segment is now; the last call is still read back."""
    tracer = open_tracer(commit_interval_s=0.05)
    record(tracer, 0, range(300))
    batches = open_trace("net", "v1").iter_batches(FEATURES, batch_size=4, columns=["stem"])
    first = [next(batches)["stem"][0, 0]]
    wait_until(lambda: segments_in(data_dir) == ["epoch-0/a00000-s00000"] and not segments_in(stage))
    assert torch.equal(tracer.get_hooked_features("stem"), torch.full((4, 4), 299.0))
    assert [*first, *(batch["stem"][0, 0] for batch in batches)] == list(range(300))
    record(tracer, 0, range(300, 303))  # into a successor
    assert segments_in(stage) == ["epoch-0/a00000-s00001"]
    assert open_trace("net", "v1").num_rows(FEATURES) == 1212
    (trace_dir,) = data_dir.glob("*/*")
    assert verify_trace(trace_dir).problems == []


def test_drops_reach_what_is_staged_and_what_has_moved(
    open_tracer: Open, stage: Path, data_dir: Path
) -> None:
    first = open_tracer()
    record(first, 0)
    record(first, 1)
    first.close()
    second = open_tracer()
    record(second, 0)
    record(second, 1)
    assert second.drop_epoch_data(1, attempt=1) == {FEATURES: 12, "ground_truth": 12}
    assert open_trace("net", "v1").num_rows(FEATURES, n_epoch=1) == 12
    assert second.drop_epoch_data(0) == {FEATURES: 24, "ground_truth": 24}
    assert segments_in(stage) == []
    assert segments_in(data_dir) == ["epoch-1/a00000-s00000"]
    record(second, 5)
    second.drop_version_data()
    assert segments_in(stage) == segments_in(data_dir) == []
    record(second, 6)
    assert open_trace("net", "v1").epochs == [6]


def test_a_drop_of_an_attempt_whose_rows_are_home_leaves_the_staged_ones_visible(
    open_tracer: Open, data_dir: Path
) -> None:
    first = open_tracer()
    record(first, 0)
    first.close()
    second = open_tracer()
    record(second, 0)
    assert second.drop_epoch_data(0, attempt=0) == {FEATURES: 12, "ground_truth": 12}
    assert open_trace("net", "v1").num_rows(FEATURES) == 12


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer
model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
config = TracerConfig(staging_dir=sys.argv[2], durability="process")
tracer = ClassificationTracer(model, "net", "v1", {"stem": "0"}, config=config)
tracer(torch.ones(4, 4), [0, 1, 2, 0], ["a", "b", "c", "d"], "train", 0)
tracer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(stage: Path, data_dir: Path) -> None:
    """A process that died with rows in staging."""
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(stage)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    assert segments_in(stage) == ["epoch-0/a00000-s00000"]


def test_what_a_killed_process_left_is_read_where_it_is_and_moved_by_the_next_tracer(
    killed: None, open_tracer: Open, stage: Path, data_dir: Path
) -> None:
    assert open_trace("net", "v1").num_rows(FEATURES) == 4
    record(open_tracer(), 1)
    wait_until(lambda: segments_in(stage) == ["epoch-1/a00001-s00000"])
    assert segments_in(data_dir) == ["epoch-0/a00000-s00000"]
    assert open_trace("net", "v1").num_rows(FEATURES) == 16


def test_what_a_killed_process_left_is_moved_by_a_tracer_without_staging(
    killed: None, open_tracer: Open, stage: Path, data_dir: Path
) -> None:
    record(open_tracer(staging_dir=None), 1)
    assert segments_in(stage) == []
    assert segments_in(data_dir) == ["epoch-0/a00000-s00000", "epoch-1/a00001-s00000"]
    assert not list(data_dir.glob("*/*/*/staging.json"))


def test_what_a_killed_process_left_is_dropped_from_another_process(
    killed: None, stage: Path, data_dir: Path
) -> None:
    (trace_dir,) = data_dir.glob("*/*")
    assert drop_rows(trace_dir, 0) == {FEATURES: 4, "ground_truth": 4}
    assert segments_in(stage) == segments_in(data_dir) == []


def test_a_move_that_fails_is_tried_again_and_costs_nothing(
    open_tracer: Open,
    stage: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    tracer = open_tracer()
    record(tracer, 0)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_move", refuse)
        tracer.close()
    assert "the next tracer of this rank on this machine moves them" in caplog.text
    assert open_trace("net", "v1").num_rows(FEATURES) == 12
    record(open_tracer(), 1)
    wait_until(lambda: segments_in(data_dir) == ["epoch-0/a00000-s00000"])


@pytest.fixture
def failing_moves(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Segments with one of these names in their path cannot be moved: the disk there is full."""
    names: set[str] = set()

    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            paths = [os.readlink(f"/proc/self/fd/{arg}") if type(arg) is int else arg for arg in args[:2]]
            if any(name in str(path) for name in names for path in paths):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return run

    # A rename is what a move is on one filesystem, a copy by sendfile what it begins with between two.
    monkeypatch.setattr(staging.os, "rename", refuse(os.rename))
    monkeypatch.setattr(staging.os, "sendfile", refuse(os.sendfile))
    return names


def test_a_segment_that_cannot_be_moved_stays_readable_keeps_no_other_back_and_moves_later(
    open_tracer: Open, stage: Path, data_dir: Path, failing_moves: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    failing_moves.add("epoch-0")
    tracer, beside = open_tracer(), open_tracer()
    for epoch in range(3):
        record(tracer, epoch)
    tracer.close()  # its segments are sealed, and the other one's mover goes on
    wait_until(lambda: segments_in(data_dir) == ["epoch-1/a00000-s00000", "epoch-2/a00000-s00000"])
    wait_until(lambda: "trying on" in caplog.text)
    assert segments_in(stage) == ["epoch-0/a00000-s00000"]
    assert open_trace("net", "v1").num_rows(FEATURES) == 36
    (trace_dir,) = data_dir.glob("*/*")
    assert verify_trace(trace_dir).problems == []
    failing_moves.clear()
    wait_until(lambda: segments_in(stage) == [])
    assert len(segments_in(data_dir)) == 3
    assert caplog.text.count("trying on") == 1
    assert open_trace("net", "v1").num_rows(FEATURES) == 36
    beside.close()
    assert not list(data_dir.glob("*/*/*/trash-*"))


@pytest.fixture
def left(open_tracer: Open, stage: Path, data_dir: Path, tmp_path: Path) -> Path:
    """The home of a rank whose process died with 12 rows of epoch 0 in staging."""
    tracer = open_tracer()
    record(tracer, 0)
    (rank_dir,) = data_dir.glob("*/*/rank-*")
    (place,) = layout.staging_directories(rank_dir)
    entries = layout.staging_entries(rank_dir)
    shutil.copytree(place, tmp_path / "copy")
    tracer.close()
    shutil.rmtree(rank_dir / "epoch-0" / "a00000-s00000")
    shutil.move(tmp_path / "copy", place)
    layout.write_staging(rank_dir, entries)
    return rank_dir


def test_a_segment_that_cannot_be_moved_does_not_stop_the_next_tracer(
    left: Path, open_tracer: Open, stage: Path, data_dir: Path, failing_moves: set[str]
) -> None:
    failing_moves.add("epoch-0")
    tracer = open_tracer()
    record(tracer, 1)
    tracer.close()
    assert segments_in(stage) == ["epoch-0/a00000-s00000"]
    assert open_trace("net", "v1").num_rows(FEATURES) == 24
    failing_moves.clear()
    second = open_tracer()
    assert second.drop_epoch_data(0) == {FEATURES: 12, "ground_truth": 12}
    second.close()
    assert segments_in(stage) == []
    assert segments_in(data_dir) == ["epoch-1/a00001-s00000"]


def test_what_a_crash_left_in_staging_counts_for_the_budget(
    left: Path, open_tracer: Open, stage: Path
) -> None:
    (staged,) = stage.glob("**/data.mdb")
    tracer = open_tracer(max_bytes=os.stat(staged).st_blocks * 512)
    with pytest.raises(DiskBudgetError):
        record(tracer, 1)


def test_a_copy_whose_original_a_crash_left_is_not_copied_again(
    left: Path, open_tracer: Open, stage: Path, data_dir: Path
) -> None:
    """Killed after the copy had got its name, before its original was deleted."""
    (staged,) = stage.glob("**/epoch-0")
    shutil.copytree(staged, left / "epoch-0", dirs_exist_ok=True)
    assert open_trace("net", "v1").num_rows(FEATURES) == 12
    tracer = open_tracer()
    record(tracer, 1)
    tracer.close()
    assert segments_in(stage) == []
    assert segments_in(data_dir) == ["epoch-0/a00000-s00000", "epoch-1/a00001-s00000"]
    assert open_trace("net", "v1").num_rows(FEATURES) == 24


def test_what_another_machine_staged_under_the_same_path_is_not_forgotten(
    open_tracer: Open, stage: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_tracer()
    (rank_dir,) = data_dir.glob("*/*/rank-*")
    (own,) = layout.staging_entries(rank_dir)
    first.close()
    there = {**own, "host": "another"}
    layout.write_staging(rank_dir, [there])
    second = open_tracer()
    assert "machine another" in caplog.text
    assert layout.staging_entries(rank_dir) == [there, own]
    record(second, 0)
    second.close()
    assert layout.staging_entries(rank_dir) == [there]


def test_segments_whose_data_directory_was_deleted_do_not_come_back_in_a_new_one(
    left: Path, open_tracer: Open, stage: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(data_dir)
    tracer = open_tracer()
    record(tracer, 0)
    assert "knows nothing of" in caplog.text
    assert open_trace("net", "v1").num_rows(FEATURES) == 12
    tracer.close()
    assert segments_in(data_dir) == ["epoch-0/a00000-s00000"]
    assert segments_in(stage) == ["epoch-0/a00000-s00000"]  # set aside


def test_places_of_different_data_directories_do_not_meet(stage: Path, tmp_path: Path) -> None:
    assert staging.staging_directory(None, tmp_path) is None
    names = {staging.staging_directory(stage, tmp_path / name / "rank-00000") for name in ("a", "b")}
    assert len(names) == 2


def test_a_segment_that_moves_between_two_listings_is_not_overlooked(tmp_path: Path) -> None:
    home, place = tmp_path / "rank-00000", tmp_path / "stage"
    for directory, name in ((place, "a00000-s00001"), (home, "a00000-s00000"), (place, "a00000-s00000")):
        segment = directory / "epoch-3" / name
        segment.mkdir(parents=True)
        layout.write_json(segment / "segment.json", {"format_version": 1, "durability": "power"})
        (segment / "sealed.json").touch()
    layout.write_staging(home, [{"directory": str(place), "host": "x"}])
    found = layout.segments(home / "epoch-3")
    assert [entry.path.parent.parent for entry in found] == [home, place]


# The calls of the core by which it asks what a filesystem is; what lies under $NFS says that it is NFS.
STATFS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#define ANSWER(name, type)                                                                  \
  int name(const char* path, struct type* status) {                                         \
    int result = ((int (*)(const char*, struct type*))dlsym(RTLD_NEXT, #name))(path, status); \
    if (strncmp(path, getenv("NFS"), strlen(getenv("NFS"))) == 0) status->f_type = 0x6969;  \
    return result;                                                                          \
  }
ANSWER(statfs, statfs)
ANSWER(statfs64, statfs64)
"""
ON_NFS = """
import sys, torch
from pathlib import Path
from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import StorageError
from ml_debugger.training import ClassificationTracer
home, local = map(Path, sys.argv[1:])
def open_tracer(staging_dir):
    config = TracerConfig(data_dir=home, staging_dir=staging_dir, ring_bytes=1 << 20)
    return ClassificationTracer(torch.nn.Sequential(torch.nn.Linear(4, 3)), "net", "v1", config=config)
for staging_dir in (None, home / "inside"):
    try:
        open_tracer(staging_dir)
    except StorageError as error:
        assert "network filesystem (NFS)" in str(error) and "staging_dir" in str(error), error
    else:
        raise AssertionError(staging_dir)
with open_tracer(local) as tracer:
    tracer(torch.ones(2, 4), [0, 1], ["a", "b"])
assert list(home.glob("*/*/*/*/*/data.mdb"))
assert open_trace("net", "v1", data_dir=home).num_rows("extracted_feature") == 2
"""


def test_a_network_filesystem_is_refused_unless_a_local_directory_is_staged_in(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "statfs.c").write_text(STATFS)
    library, home = tmp_path / "statfs.so", tmp_path / "home"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "statfs.c", "-ldl"], check=True, timeout=60
    )
    done = subprocess.run(
        [sys.executable, "-c", ON_NFS, home, tmp_path / "local"],
        env={**os.environ, "LD_PRELOAD": str(library), "NFS": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
