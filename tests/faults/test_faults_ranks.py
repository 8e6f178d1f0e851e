"""Several ranks of a job: what one does when another is late, stopped, dead, missing, or of another job."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fork_server import ForkServer
from ml_debugger import _core, load_export, open_trace
from ml_debugger.job import Job
from ml_debugger.store import layout
from ml_debugger.store.job_ranks import owner_text, settle_other_ranks
from rank_processes import Ranks

FEATURES = "extracted_feature"


@pytest.fixture
def ranks(server: ForkServer, tmp_path: Path) -> Iterator[Ranks]:
    """A job whose ranks this test starts; none outlives it."""
    job = Ranks(server, tmp_path / "job")
    yield job
    job.end()


def manifest(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        found: dict[str, Any] = json.loads(archive.read("manifest.json"))
        return found


# Nothing is committed by itself in this time.
RECORD_AND_WAIT = """
tracer = open_tracer(commit_interval_s=3600.0)
time.sleep(0.3)  # what opening it has woken is asleep again
for number in range(5):
    call(tracer, number)
reach("handed")
wait_for("end")
"""
EXPORT = """
tracer = open_tracer(stall_timeout_s={stall_timeout_s})
call(tracer, 0)
timed(tracer.export, folder / "out.zip")
"""


def test_export_waits_for_what_another_rank_has_handed_over(ranks: Ranks) -> None:
    other = ranks.start(1, RECORD_AND_WAIT)
    ranks.reached("handed", 1, other)
    found = ranks.run(0, EXPORT.format(stall_timeout_s=30.0))
    assert found["warnings"] == []
    exported = manifest(ranks.folder / "out.zip")
    assert exported["ranks"] == [
        {"rank": 0, "rows": 4, "last_call": 0, "writing": True},
        {"rank": 1, "rows": 20, "last_call": 4, "writing": True},
    ]
    assert exported["rows_written"] == 24
    ranks.tell("end")
    assert other.wait(60) == 0, other.output()


def test_export_is_not_collective_and_returns_none_on_other_ranks(ranks: Ranks) -> None:
    stopped = ranks.start(0, "tracer = open_tracer()\ncall(tracer, 0)\nreach('here')\nwait_for('never')")
    ranks.reached("here", 0, stopped)
    os.kill(stopped.pid, signal.SIGSTOP)
    source = "tracer = open_tracer()\ncall(tracer, 0)\ntimed(tracer.export, folder / 'out.zip')"
    found = ranks.run(1, source)
    assert found["returned"] is None
    assert found["seconds"] < 10
    assert not (ranks.folder / "out.zip").exists()


def test_a_stopped_rank_holds_export_up_for_stall_timeout_and_is_named(ranks: Ranks) -> None:
    other = ranks.start(1, RECORD_AND_WAIT)
    ranks.reached("handed", 1, other)
    wait_for_status(ranks, 1, submitted=20)
    os.kill(other.pid, signal.SIGSTOP)
    found = ranks.run(0, EXPORT.format(stall_timeout_s=0.7))
    assert 0.7 <= found["seconds"] < 20
    late = f"rank 1 (process {other.pid}) did not commit 20 rows in time"
    assert any(late in warning for warning in found["warnings"]), found["warnings"]
    assert manifest(ranks.folder / "out.zip")["rows_written"] == 4
    assert not list(ranks.data_dir.glob("*/*/rank-*/flush.request"))
    os.kill(other.pid, signal.SIGCONT)
    ranks.tell("end")
    assert other.wait(60) == 0
    assert open_trace("net", "v1", data_dir=ranks.data_dir).num_rows(FEATURES) == 24


def test_a_late_rank_that_has_told_nothing_yet_is_named_with_its_process(tmp_path: Path) -> None:
    """Stopped before its first status; its rank directory and its lock are all that is there."""
    job = Job("job#0", 2)
    rank_dir = layout.rank_directory(tmp_path, 1)
    store = _core.Store(str(rank_dir), rank=1, durability="process", owner=owner_text(job))
    try:
        (late,) = settle_other_ranks(tmp_path, 0, job, 0.1)
    finally:
        store.close()
    assert str(late) == f"rank 1 (process {os.getpid()}) did not answer in time"


def test_a_rank_that_cannot_be_asked_is_named_though_its_status_tells_of_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk there is no room for the request; the status that is there is older than it."""
    job = Job("job#0", 2)
    rank_dir = layout.rank_directory(tmp_path, 1)
    store = _core.Store(str(rank_dir), rank=1, durability="process", owner=owner_text(job))
    recorder = store.recorder(
        0,
        overflow="block",
        on_error="raise",
        ring_bytes=1 << 20,
        commit_bytes=1 << 20,
        commit_interval_s=0.01,
        stall_timeout_s=5.0,
    )
    recorder.flush(5.0)
    refused = []

    def touch(path: Path, **_: object) -> None:
        refused.append(path.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        monkeypatch.setattr(Path, "touch", touch)
        (late,) = settle_other_ranks(tmp_path, 0, job, 0.1)
        monkeypatch.undo()
        assert settle_other_ranks(tmp_path, 0, job, 10.0) == []
    finally:
        recorder.close(5.0)
        store.close()
    assert set(refused) == {"flush.request"} and len(refused) > 1  # asked again with every look
    assert str(late) == f"rank 1 (process {os.getpid()}) did not answer in time"


def test_rows_that_died_with_a_rank_are_told_by_export(ranks: Ranks) -> None:
    other = ranks.start(1, RECORD_AND_WAIT)
    ranks.reached("handed", 1, other)
    wait_for_status(ranks, 1, submitted=20)
    other.kill()
    assert other.wait() == -9
    found = ranks.run(0, EXPORT.format(stall_timeout_s=60.0))
    assert found["seconds"] < 30
    dead = "rank 1 has ended, and 20 rows with it"
    assert any(dead in warning for warning in found["warnings"]), found["warnings"]
    assert manifest(ranks.folder / "out.zip")["ranks"][0]["rows"] == 4


def test_ranks_of_the_job_that_recorded_elsewhere_are_named_by_export(ranks: Ranks) -> None:
    found = ranks.run(0, EXPORT.format(stall_timeout_s=60.0), world_size=4)
    assert found["seconds"] < 30
    (warning,) = found["warnings"]
    assert "ranks 1, 2, 3, of the 4 ranks of this job" in warning
    assert "ml-debugger merge" in warning


def test_a_rank_without_rows_of_the_epoch_is_named_by_its_export(ranks: Ranks) -> None:
    assert ranks.run(1, "tracer = open_tracer()\ncall(tracer, 0, epoch=0)") == {}
    source = """
tracer = open_tracer()
call(tracer, 0, epoch=0)
call(tracer, 1, epoch=1)
assert timed(tracer.export, folder / "out.zip", n_epoch=0)
assert result["warnings"] == [], result
timed(tracer.export, folder / "out.zip", n_epoch=1)
"""
    (warning,) = ranks.run(0, source)["warnings"]
    assert "no rows of rank 1," in warning


def test_export_after_close_still_waits_for_others(ranks: Ranks) -> None:
    other = ranks.start(1, RECORD_AND_WAIT)
    ranks.reached("handed", 1, other)
    source = (
        "tracer = open_tracer()\ncall(tracer, 0)\ntracer.close()\ntimed(tracer.export, folder / 'out.zip')"
    )
    assert ranks.run(0, source)["warnings"] == []
    assert manifest(ranks.folder / "out.zip")["rows_written"] == 24


def test_saving_and_dropping_are_not_collective(ranks: Ranks) -> None:
    other = ranks.start(
        1, "tracer = open_tracer()\ncall(tracer, 0)\ntracer.flush()\nreach('here')\nwait_for('end')"
    )
    ranks.reached("here", 1, other)
    os.kill(other.pid, signal.SIGSTOP)
    source = """
tracer = open_tracer()
for epoch in range(3):
    call(tracer, epoch, epoch=epoch)
started = time.monotonic()
tracer.wait_for_save()
result["epoch"] = tracer.drop_epoch_data(0)
tracer.drop_version_data()
call(tracer, 9, epoch=5)
tracer.close()
result["seconds"] = time.monotonic() - started
"""
    found = ranks.run(0, source)
    assert found["seconds"] < 20
    assert found["epoch"] == {FEATURES: 4, "ground_truth": 4}
    trace = open_trace("net", "v1", data_dir=ranks.data_dir)
    ids = trace.arrays(FEATURES, columns=["input_id"])["input_id"].tolist()
    assert sorted(ids) == sorted([*(f"r0c9i{i}" for i in range(4)), *(f"r1c0i{i}" for i in range(4))])


def test_force_table_recreate_empties_the_rows_of_the_calling_rank(ranks: Ranks) -> None:
    for rank in (0, 1):
        ranks.run(rank, "tracer = open_tracer()\ncall(tracer, 0)")
    ranks.run(0, "tracer = open_tracer(recreate=True)\ncall(tracer, 7)")
    ids = open_trace("net", "v1", data_dir=ranks.data_dir).arrays(FEATURES)["input_id"].tolist()
    assert Counter(text[:4] for text in ids) == {"r0c7": 4, "r1c0": 4}


JOBS = [
    ({"MASTER_PORT": "29501"}, "'localhost:29501#0'"),
    ({"TORCHELASTIC_RUN_ID": "other"}, "'other#0'"),
    ({"TORCHELASTIC_RESTART_COUNT": "1"}, "'localhost:29500#1'"),
    ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "no job"),
]


@pytest.mark.parametrize(("environment", "name"), JOBS)
def test_another_job_is_refused_while_a_job_records(
    ranks: Ranks, environment: dict[str, str], name: str
) -> None:
    other = ranks.start(1, "tracer = open_tracer()\ncall(tracer, 0)\nreach('here')\nwait_for('end')")
    ranks.reached("here", 1, other)
    source = """
try:
    open_tracer()
except errors.TraceInUseError as error:
    result["refused"] = str(error)
"""
    refused = ranks.run(0, source, **environment)["refused"]
    assert f"rank 1 (process {other.pid}) belongs to the job 'localhost:29500#0'" in refused
    assert name in refused
    assert open_trace("net", "v1", data_dir=ranks.data_dir).attempts == [0]
    ranks.run(0, "tracer = open_tracer()\ncall(tracer, 0)")  # of the same job
    ranks.tell("end")
    assert other.wait(60) == 0
    ranks.run(0, "tracer = open_tracer()\ncall(tracer, 0)", **environment)  # the other job is over
    assert open_trace("net", "v1", data_dir=ranks.data_dir).attempts == [0, 1]


def test_the_same_rank_of_the_same_job_is_refused(ranks: Ranks) -> None:
    other = ranks.start(0, "tracer = open_tracer()\nreach('here')\nwait_for('end')")
    ranks.reached("here", 0, other)
    source = """
try:
    open_tracer()
except errors.TraceInUseError as error:
    result["refused"] = str(error)
"""
    assert "writer.lock" in ranks.run(0, source)["refused"]


def test_a_restart_has_one_attempt_number_on_all_ranks_also_where_one_had_not_begun(ranks: Ranks) -> None:
    record = "tracer = open_tracer()\ncall(tracer, 0)"
    ranks.run(0, record)
    for rank in (1, 0):  # rank 1 had died before it made a tracer
        ranks.run(rank, record, TORCHELASTIC_RESTART_COUNT="1")
    trace = open_trace("net", "v1", data_dir=ranks.data_dir)
    assert trace.attempts == [0, 1]
    row_ids = trace.arrays(FEATURES, columns=["row_id"])["row_id"]
    found = Counter((int(row) >> 49, int(row) >> 36 & 0x1FFF) for row in row_ids)
    assert found == {(0, 0): 4, (0, 1): 4, (1, 1): 4}


def test_an_attempt_of_an_epoch_is_dropped_and_dedupe_takes_the_newest(ranks: Ranks) -> None:
    """Samples move between ranks at the restart; the newer row wins all the same."""
    record = """
tracer = open_tracer()
x = torch.full((2, 4), {value})
tracer(x, None, {ids}, "train", 3)
if {drops}:
    result["dropped"] = tracer.drop_epoch_data(3, attempt=0)
"""
    ranks.run(1, record.format(value=1.0, ids=["a", "b"], drops=False))
    for rank, ids in ((0, ["b", "c"]), (1, ["a", "d"])):
        ranks.run(rank, record.format(value=2.0, ids=ids, drops=False), TORCHELASTIC_RESTART_COUNT="1")
    trace = open_trace("net", "v1", data_dir=ranks.data_dir)
    assert trace.num_rows(FEATURES, n_epoch=3) == 6
    newest = trace.arrays(FEATURES, n_epoch=3, dedupe=True)
    assert sorted(newest["input_id"].tolist()) == ["a", "b", "c", "d"]
    assert (newest["stem"] == 2.0).all()
    last = ranks.run(1, record.format(value=3.0, ids=["e"] * 2, drops=True), TORCHELASTIC_RESTART_COUNT="2")
    assert last["dropped"] == {FEATURES: 2}
    assert trace.num_rows(FEATURES, n_epoch=3) == 6


def test_data_rank_says_which_ranks_record(ranks: Ranks) -> None:
    """Four processes, tensor parallel in pairs: ranks 0 and 2 record, under the numbers 0 and 1."""
    source = """
tracer = open_tracer(data_rank=rank // 2 if rank % 2 == 0 else -1)
output = call(tracer, 0)
assert output.shape == (4, 3)
result["stats"] = tracer.stats().rows_submitted
timed(tracer.export, folder / f"out-{rank}.zip")
"""
    found = [ranks.run(rank, source, world_size=4) for rank in (3, 2, 1, 0)][::-1]
    assert [one["stats"] for one in found] == [4, 0, 4, 0]
    assert [one["returned"] is not None for one in found] == [True, False, False, False]
    assert found[0]["warnings"] == []
    assert sorted(path.name for path in ranks.data_dir.glob("*/*/rank-*")) == ["rank-00000", "rank-00001"]
    assert load_export(ranks.folder / "out-0.zip").num_rows(FEATURES) == 8


def test_ranks_that_upload_at_once_do_not_collide(ranks: Ranks) -> None:
    source = """
from ml_debugger.training import ClassificationTracer
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
config = TracerConfig(durability="process")
there = str(folder / "there")
tracer = ClassificationTracer(model, "net", "v1", {"stem": "0"}, api_endpoint=there, config=config)
for number in range(3):
    call(tracer, number)
reach("recorded")
wait_for("recorded-0", "recorded-1")
tracer.wait_for_save()
tracer.close()
"""
    processes = [ranks.start(rank, source) for rank in (0, 1)]
    for rank, process in enumerate(processes):
        ranks.result(process, rank)
    trace = open_trace("net", "v1", data_dir=ranks.folder / "there")
    assert sorted(trace.arrays(FEATURES)["input_id"].tolist()) == sorted(
        f"r{rank}c{number}i{i}" for rank in (0, 1) for number in range(3) for i in range(4)
    )


def wait_for_status(ranks: Ranks, rank: int, submitted: int) -> None:
    """Until the status file of a rank tells of its rows, which takes it some tenths of a second."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for path in ranks.data_dir.glob(f"*/*/rank-{rank:05d}/status.json"):
            if f'"rows_submitted": {submitted},' in path.read_text():
                return
        time.sleep(0.02)
    raise AssertionError("the status file never told of the rows")
