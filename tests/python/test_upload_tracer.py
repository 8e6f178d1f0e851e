"""`tracer.upload`, `wait_for_save` and `auto_sync`: the uploading process of a tracer, and its end."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import AuthenticationError, InvalidInputError, RingOverflowError, UploadError
from ml_debugger.training import ClassificationTracer
from upload_support import KEY, TusServer, assert_same_trace, collector

DEADLINE_S = 30.0
ROWS = 4


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "endpoint"


@pytest.fixture
def make(data_dir: Path) -> Any:
    made: list[ClassificationTracer] = []

    def build(endpoint: object = None, **arguments: Any) -> ClassificationTracer:
        config = TracerConfig(commit_interval_s=0.02, stall_timeout_s=20.0, **arguments.pop("config", {}))
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        tracer = ClassificationTracer(
            model,
            "net",
            "v1",
            api_endpoint=None if endpoint is None else str(endpoint),
            config=config,
            **arguments,
        )
        made.append(tracer)
        return tracer

    yield build
    for tracer in made:
        tracer.close()


def record(tracer: ClassificationTracer, epoch: int | None, calls: int = 3) -> None:
    for call in range(calls):
        ids = [f"{epoch}-{call}-{row}" for row in range(ROWS)]
        tracer(torch.randn(ROWS, 3), torch.zeros(ROWS, dtype=torch.int64), ids, n_epoch=epoch)


def rows_of(there: Path) -> int:
    try:
        return open_trace("net", "v1", there).num_rows("extracted_feature")
    except KeyError:
        return 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def uploaders() -> set[str]:
    """Processes of ours that upload."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ml_debugger.uploading.worker" in path.read_bytes():
                status = (path.parent / "status").read_text()
                if f"PPid:\t{os.getpid()}\n" in status and "State:\tZ" not in status:
                    found.add(path.parent.name)
        except OSError:
            continue
    return found


def the_uploader() -> str:
    """Its process; the kernel shows the name of a new program a moment after its start."""
    wait_until(lambda: bool(uploaders()))
    (pid,) = uploaders()
    return pid


def test_upload_flushes_sends_what_is_missing_and_works_after_close(
    make: Any, data_dir: Path, there: Path
) -> None:
    tracer = make(there, config={})
    for epoch in (0, 1, None):
        record(tracer, epoch)
    report = tracer.upload()
    assert (report.segments_sent, report.segments_skipped) == (
        3,
        0,
    ) and report.bytes_sent > 0 < report.seconds
    assert_same_trace(data_dir, there)
    record(tracer, 1)
    tracer.close()
    assert tracer.upload(n_epoch=0).segments_sent == 0
    assert tracer.upload(n_epoch=77).bytes_sent == 0
    report = tracer.upload()
    assert (report.segments_sent, report.segments_skipped) == (1, 3)
    assert tracer.upload(force=True).segments_sent == 4
    assert_same_trace(data_dir, there)
    assert not uploaders()


@pytest.mark.parametrize(
    "epoch, error", [(-2, ValueError), (True, TypeError), ("1", TypeError), (1.0, TypeError)]
)
def test_upload_takes_epochs_as_export_does(
    epoch: Any, error: type[Exception], make: Any, there: Path
) -> None:
    tracer = make(there)
    for method in (tracer.upload, tracer.wait_for_save):
        with pytest.raises(error):
            method(epoch)
    assert not there.exists()


def test_upload_without_anything_recorded_sends_nothing(make: Any, there: Path) -> None:
    assert make(there).upload().segments_sent == 0
    assert make(there, config={"mode": "disabled"}).upload().segments_sent == 0
    assert not there.exists()


def test_endpoint_and_key_fall_back_on_the_environment_each_on_its_own(
    make: Any, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector(tmp_path / "storage") as url:
        monkeypatch.setenv("MLD_API_ENDPOINT", url)
        tracer = make(api_key=KEY)
        record(tracer, 0)
        assert tracer.upload().segments_sent == 1
        tracer.close()
        monkeypatch.setenv("MLD_API_KEY", KEY)
        monkeypatch.setenv("MLD_API_ENDPOINT", "/nowhere")
        tracer = make(url)
        record(tracer, 1)
        assert tracer.upload().segments_sent == 1
    assert_same_trace(data_dir, tmp_path / "storage")


def test_wait_for_save_confirms_with_the_endpoint_and_reports_losses_after_that(
    make: Any, data_dir: Path, there: Path
) -> None:
    tracer = make(there, config={"overflow": "discard"})
    record(tracer, 0)
    assert tracer.wait_for_save(0) is None
    assert_same_trace(data_dir, there)
    big = torch.zeros(1, 3).expand(3_000_000, 3)
    ids = [""] * 3_000_000
    tracer(big, None, ids, n_epoch=0)
    record(tracer, 1)
    with pytest.raises(RingOverflowError):
        tracer.wait_for_save()
    assert_same_trace(data_dir, there)
    assert tracer.wait_for_save() is None


@pytest.mark.parametrize("is_closed", [False, True])
def test_without_a_standard_error_it_waits_and_uploads(
    is_closed: bool, make: Any, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service may have none: 'NoneType' object has no attribute 'isatty'."""
    tracer = make(there)
    record(tracer, 0)
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream if is_closed else None)
    tracer.wait_for_save()
    assert rows_of(there) == 3 * ROWS


def test_a_refused_key_is_said_and_appears_nowhere(
    make: Any,
    tmp_path: Path,
    data_dir: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    with collector(tmp_path / "storage", keys=("another",)) as url:
        tracer = make(url, api_key=KEY, auto_sync=True)
        record(tracer, 0)
        with pytest.raises(AuthenticationError, match="401") as caught:
            tracer.upload()
        wait_until(lambda: (tracer._uploads._auto.report(), "401" in caplog.text)[1])
        time.sleep(1.2)
        tracer.close()
    assert caplog.text.count("uploading in the background failed") == 1, "said once, not tried again"
    shown = (
        str(caught.value)
        + repr(caught.value)
        + caplog.text
        + repr(vars(tracer))
        + repr(tracer._uploads.__dict__)
    )
    assert KEY not in shown + "".join(capfd.readouterr())
    for path in data_dir.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_the_key_is_in_no_process_list(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLD_API_KEY", KEY)
    with collector(tmp_path / "storage") as url:
        tracer = make(url, auto_sync=True)
        pid = the_uploader()
        for name in ("cmdline", "environ"):
            assert KEY.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        record(tracer, 0)
        wait_until(lambda: rows_of(tmp_path / "storage") == 3 * ROWS)
        tracer.close()


def test_auto_sync_sends_without_any_further_call_and_ends_with_the_tracer(
    make: Any, data_dir: Path, there: Path
) -> None:
    tracer = make(there, auto_sync=True)
    record(tracer, 0)
    wait_until(lambda: rows_of(there) == 3 * ROWS)
    record(tracer, 1)
    assert tracer.upload().segments_sent <= 1
    record(tracer, None)
    begin = time.monotonic()
    tracer.close()
    assert time.monotonic() - begin < 10
    assert_same_trace(data_dir, there)
    assert not uploaders()


def test_auto_sync_needs_an_endpoint_that_is_handled(make: Any, data_dir: Path) -> None:
    with pytest.raises(InvalidInputError, match="MLD_API_ENDPOINT"):
        make(auto_sync=True)
    with pytest.raises(UploadError, match="endpoint"):
        make("ftp://x/", auto_sync=True)
    assert not data_dir.exists() and not uploaders()


def test_close_gives_the_uploader_its_time_and_no_more(
    make: Any, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wait(method: str, path: str, headers: dict[str, str]) -> Any:
        time.sleep(30)

    with TusServer(wait) as server:
        tracer = make(f"tus+{server.url}", auto_sync=True, config={"close_timeout_s": 1.0})
        record(tracer, 0)
        tracer.flush()
        begin = time.monotonic()
        tracer.close()
        assert time.monotonic() - begin < 5
    assert not uploaders()


def test_a_killed_uploader_is_reported_and_costs_nothing(
    make: Any, data_dir: Path, there: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = make(there, auto_sync=True)
    pid = the_uploader()
    record(tracer, 0)
    os.kill(int(pid), signal.SIGKILL)
    record(tracer, 1)
    report = tracer.upload()
    assert report.segments_sent + report.segments_skipped >= 2
    tracer.close()
    assert "uploader ended with status -9" in caplog.text
    assert_same_trace(data_dir, there)


def test_an_uploader_that_dies_while_it_is_waited_for_is_an_upload_error(
    make: Any, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.uploading import process

    real = process.subprocess.Popen

    def dying(command: list[str], **arguments: Any) -> Any:
        return real(
            [sys.executable, "-c", "import sys; sys.stdin.readline(); raise SystemExit('it broke')"],
            **arguments,
        )

    tracer = make(there)
    record(tracer, 0)
    monkeypatch.setattr(process.subprocess, "Popen", dying)
    with pytest.raises(UploadError, match="status 1: it broke"):
        tracer.upload()
    monkeypatch.undo()
    assert tracer.upload().segments_sent == 1


def test_a_drop_is_not_held_up_by_the_uploader(make: Any, data_dir: Path, there: Path) -> None:
    tracer = make(there, auto_sync=True)
    pid = the_uploader()
    for epoch in range(6):
        record(tracer, epoch)
        if epoch % 2:
            tracer.flush()
            assert tracer.drop_epoch_data(epoch)["extracted_feature"] == 3 * ROWS
    deadline = time.monotonic() + 1.0
    while held := [
        os.readlink(path)
        for path in Path(f"/proc/{pid}/fd").glob("*")
        if path.is_symlink() and "(deleted)" in os.readlink(path) and ".mdb" in os.readlink(path)
    ]:
        assert time.monotonic() < deadline, held
    tracer.close()
    assert set(open_trace("net", "v1", there).epochs) >= {0, 2, 4}
    assert open_trace("net", "v1").epochs == [0, 2, 4]


SCRIPT = """
import os, signal, sys, torch
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
tracer = ClassificationTracer(model, "net", "v1", auto_sync=True, api_endpoint=sys.argv[1],
                              config=TracerConfig(commit_interval_s=0.02, close_timeout_s=20.0))
for call in range(5):
    tracer(torch.randn(4, 3), None, [f"{call}-{row}" for row in range(4)], n_epoch=0)
tracer.flush()
end = sys.argv[2]
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "error":
    raise RuntimeError("the training failed")
if end == "exit":
    sys.exit(3)
if end == "interrupt":
    os.killpg(os.getpgrp(), signal.SIGINT)  # as a terminal does: to every process of the group
"""


@pytest.mark.parametrize(
    "end",
    [
        "interrupt",
        "kill",
        *(pytest.param(end, marks=pytest.mark.soak) for end in ("return", "exit", "error")),
    ],
)
def test_however_the_process_ends_what_was_committed_arrives(end: str, data_dir: Path, there: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(there), end]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, timeout=60, start_new_session=True, **quiet)
    if end == "kill":  # the uploader has outlived it, for a moment
        wait_until(lambda: rows_of(there) == 20)
    assert rows_of(there) == 20


def test_a_forked_child_leaves_its_parents_uploader_alone(make: Any, there: Path) -> None:
    tracer = make(there, auto_sync=True)
    before = {the_uploader()}
    child = os.fork()
    if child == 0:
        try:
            tracer.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert uploaders() == before
    record(tracer, 0)
    wait_until(lambda: rows_of(there) == 3 * ROWS)


def test_the_uploader_needs_no_torch_and_gives_way_to_the_training(make: Any, there: Path) -> None:
    tracer = make(there, auto_sync=True)
    record(tracer, 0)
    pid = the_uploader()
    wait_until(lambda: rows_of(there) == 3 * ROWS)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch" not in maps
    niceness = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[16])
    assert niceness == min(19, os.nice(0) + 10)
    tracer.close()


def test_a_module_in_the_working_directory_is_not_the_uploaders(
    make: Any, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not meant')")
    monkeypatch.chdir(tmp_path)
    tracer = make(there)
    record(tracer, 0)
    if sys.version_info >= (3, 11):
        assert tracer.upload().segments_sent == 1


@pytest.mark.timeout(120)
def test_killed_at_random_times_the_uploads_end_with_every_row_once(
    make: Any, data_dir: Path, there: Path
) -> None:
    """kill -9 of the uploading process at random times, again and again; then one that may finish."""
    import random

    tracer = make(there)
    for epoch in range(8):
        record(tracer, epoch, calls=2)
    tracer.flush()
    command = [sys.executable, "-m", "ml_debugger.uploading.worker"]
    job = {
        "trace_dir": str(tracer._session.directory), "endpoint": str(there), "key": None, "rank": 0,
        "is_auto": True, "stall_timeout_s": 20.0, "close_timeout_s": 20.0,
    }  # fmt: skip
    generator = random.Random(3)
    for _ in range(8):
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(job).encode() + b'\n{"command": "finish", "timeout_s": 20}\n')
        worker.stdin.flush()
        time.sleep(0.25 + generator.random() * 0.3)
        worker.kill()
        worker.wait()
        worker.stdin.close()
    tracer.upload()
    assert_same_trace(data_dir, there)
    assert len(list(there.rglob("a*.zip"))) == 8
    assert not list((there / ".incoming").glob("*.tmp"))
