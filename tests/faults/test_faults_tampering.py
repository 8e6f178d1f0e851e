"""Limits and tampering: the store is cut, deleted, moved, locked away under a recorder and readers."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disks import ext4
from trials import Score, Trial

RECORDING = [["open"], ["train", None, 2], ["close"]]
CONFIG = {"stall_timeout_s": 2.0, "close_timeout_s": 2.0}


def start_recording(trial: Trial, **job: Any) -> Any:
    process = trial.start(RECORDING, pause_s=0.003, tolerant=True, flush_every=5, **job)
    wait_for_commits(trial, process, 1)
    return process


def committed(trial: Trial) -> int:
    return int(trial.promises[-1].open().tracers["committed"].sum())


def wait_for_commits(trial: Trial, process: Any, more: int) -> None:
    target = committed(trial) + more
    deadline = time.monotonic() + 40
    while committed(trial) < target:
        assert time.monotonic() < deadline and process.stop_state() not in "Z?", process.output()
        time.sleep(0.01)


def end_training(trial: Trial, process: Any) -> str:
    """Let it close; a crash or a hang fails the test. Returns its log."""
    os.kill(process.pid, signal.SIGUSR1)
    status = trial.wait(process)
    log = process.output()
    assert status == 0, f"the recorder ended with {status}\n{log}"
    cells = trial.promises[-1].open().tracers
    assert not cells["law_broken"].any()
    return str(log)


def next_run_is_sound(trial: Trial) -> None:
    """Another version of the same data directory, or this one where nothing was taken away."""
    process = trial.start([["open"], ["train", 3, 1], ["close"]])
    assert trial.wait(process) == 0, process.output()


def live_segments(trial: Trial) -> list[Path]:
    data = [path.parent for path in trial.data_dir.rglob("data.mdb")]
    return [path for path in data if not (path / "sealed.json").exists()]


def cut_files(trial: Trial, bytes_left: int) -> None:
    for segment in live_segments(trial):
        os.truncate(segment / "data.mdb", bytes_left)


def delete_store(trial: Trial) -> None:
    shutil.rmtree(trial.data_dir, ignore_errors=True)  # it may make a file in the middle of this


def delete_segments(trial: Trial) -> None:
    for segment in live_segments(trial):
        shutil.rmtree(segment)


def move_store(trial: Trial) -> None:
    trial.data_dir.rename(trial.data_dir.with_name("moved"))


def lock_away(trial: Trial) -> None:
    for folder, _, names in os.walk(trial.data_dir):
        for name in names:
            os.chmod(Path(folder) / name, 0)
        os.chmod(folder, 0)


def delete_lock_files(trial: Trial) -> None:
    for path in [*trial.data_dir.rglob("lock.mdb"), *trial.data_dir.rglob("writer.lock")]:
        path.unlink()


TAMPERING: dict[str, Callable[[Trial], None]] = {
    "deleted": delete_store,
    "segments deleted": delete_segments,
    "moved": move_store,
    "modes taken away": lock_away,
    "lock files deleted": delete_lock_files,
}


@pytest.mark.parametrize("what", sorted(TAMPERING))
def test_a_recorder_survives_what_is_done_to_its_store(
    what: str, make_trial: Callable[..., Any], score: Callable[[str], Score]
) -> None:
    tally = score(f"store {what} under a recorder: no crash, no hang")
    trial = make_trial(tally, config=CONFIG)
    tally.rounds += 1
    process = start_recording(trial)
    TAMPERING[what](trial)
    tally.fired += 1
    time.sleep(0.3)
    end_training(trial, process)
    if trial.data_dir.exists() and what == "modes taken away":
        for folder, _, names in os.walk(trial.data_dir):
            os.chmod(folder, 0o700)
            for name in names:
                os.chmod(Path(folder) / name, 0o600)
        trial.judge()
    if what in ("lock files deleted", "modes taken away"):
        trial.verify()
    else:
        next_run_is_sound(trial)


@pytest.mark.parametrize("pages", [0, 1, 5])
def test_a_recorder_whose_segments_are_cut_off_between_two_commits_goes_on(
    pages: int, make_trial: Callable[..., Any], score: Callable[[str], Score]
) -> None:
    """Between two commits: in the middle of one, LMDB reads its own pages, and nobody can look first."""
    tally = score("segments cut off under a recorder, between two commits: no SIGBUS, goes on")
    trial = make_trial(tally, config=CONFIG)
    tally.rounds += 1
    steps = [["open"], ["train", 4, 1], ["flush"], ["stop"], ["train", 4, 2], ["flush"], ["close"]]
    process = trial.start(steps, tolerant=True)
    process.wait_until_stopped()
    cut_files(trial, pages * 4096)
    tally.fired += 1
    os.kill(process.pid, signal.SIGCONT)
    assert trial.wait(process) == 0, f"the recorder died\n{process.output()}"
    assert committed(trial) == trial.promises[-1].open().calls["rows"][:, :8].sum()
    next_run_is_sound(trial)


COUNT = """
from ml_debugger import open_trace
traces = [open_trace("net", version, data_dir=ARGS[0]) for version in ("v0", "v1")]
print(sum(trace.num_rows("extracted_feature") for trace in traces), flush=True)
"""


def test_rows_go_on_into_a_new_segment_when_theirs_was_deleted_under_them(
    make_trial: Callable[..., Any], score: Callable[[str], Score]
) -> None:
    tally = score("segments deleted under a recorder: later rows are kept")
    trial = make_trial(tally, config=CONFIG)
    tally.rounds += 1
    steps = [["open"], ["train", 4, 1], ["flush"], ["stop"], ["train", 4, 1], ["close"]]
    process = trial.start(steps, tolerant=True)  # close tells that it cannot seal what is gone
    process.wait_until_stopped()
    delete_segments(trial)
    tally.fired += 1
    os.kill(process.pid, signal.SIGCONT)
    assert trial.wait(process) == 0, process.output()
    log = trial.folder / "count.log"
    reader = trial.server.start(
        {"kind": "script", "source": COUNT, "args": [str(trial.data_dir)], "log": str(log)}
    )
    assert trial.wait(reader) == 0, reader.output()
    later = trial.promises[-1].open().calls["rows"][:, 4:8].sum()
    assert int(reader.output()) == later > 0


READ = """
from ml_debugger import open_trace
from ml_debugger.errors import MlDebuggerError
outcomes = set()
for version in ("v0", "v1"):
    try:
        open_trace("net", version, data_dir=ARGS[0]).arrays("extracted_feature")
        outcomes.add("read")
    except MlDebuggerError as error:
        outcomes.add(type(error).__name__)
print(*sorted(outcomes), flush=True)
"""


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "live"])
@pytest.mark.parametrize("pages", [0, 1, 5])
def test_a_reader_of_a_store_that_is_cut_off_gets_corrupt_data(
    pages: int, sealed: bool, make_trial: Callable[..., Any], score: Callable[[str], Score]
) -> None:
    tally = score("segments cut off before a reader: CorruptDataError, no SIGBUS")
    trial = make_trial(tally)
    tally.rounds += 1
    steps = [["open"], ["train", 6, 2], ["flush"], ["close" if sealed else "stop"]]
    process = trial.start(steps)
    if sealed:
        assert trial.wait(process) == 0
    else:
        process.wait_until_stopped()
    for path in trial.data_dir.rglob("data.mdb"):
        os.truncate(path, pages * 4096)
    tally.fired += 1
    job = {"kind": "script", "source": READ, "args": [str(trial.data_dir)]}
    reader = trial.server.start({**job, "log": str(trial.folder / "reader.log")})
    assert trial.wait(reader) == 0, f"the reader died\n{reader.output()}"
    assert reader.output().split() == ["CorruptDataError"]


def test_a_filesystem_that_turns_read_only_is_an_error_and_what_was_committed_stays(
    make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    tally = score("filesystem remounted read-only under a recorder")
    with ext4(tmp_path / "disk", 32) as disk:
        trial = make_trial(tally, config=CONFIG, data_dir=disk.mount / "data")
        tally.rounds += 1
        process = start_recording(trial)
        disk.turn_read_only()
        tally.fired += disk.is_cut()
        time.sleep(0.3)
        log = end_training(trial, process)
        assert "StorageError" in log
        disk.detach()
        disk.attach()
        trial.verify()


LIMITS = {
    "RLIMIT_NOFILE": ("RLIMIT_NOFILE", "len(os.listdir('/proc/self/fd')) + 3"),
    "RLIMIT_FSIZE": ("RLIMIT_FSIZE", "1 << 16"),
    "RLIMIT_AS": ("RLIMIT_AS", "vm_bytes() + (300 << 20)"),
}


@pytest.mark.parametrize("limit", sorted(LIMITS))
def test_a_recorder_under_a_resource_limit_records_or_raises(
    limit: str, make_trial: Callable[..., Any], score: Callable[[str], Score]
) -> None:
    tally = score(f"{limit} reached by a recorder")
    trial = make_trial(tally, config={**CONFIG, "ring_bytes": 1 << 20})
    tally.rounds += 1
    name, value = LIMITS[limit]
    steps = [["open"], ["train", 4, 1], ["flush"], ["limit", name, value], ["train", 6, 6], ["close"]]
    process = trial.start(steps, tolerant=True)
    status = trial.wait(process)
    log = process.output()
    assert status == 0, f"the recorder ended with {status}\n{log}"
    tally.fired += "limited" in log
    assert "StorageError" in log or limit == "RLIMIT_AS", log
    trial.verify()
