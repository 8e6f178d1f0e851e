"""Whole traces on their way: kill -9 of both sides, full disks, drops, two senders."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ml_debugger import open_trace
from ml_debugger.errors import UploadError
from ml_debugger.uploading import upload_trace
from ml_debugger.uploading.transports.collector import CollectorTransport
from upload_support import (
    KEY,
    QUICK,
    TusServer,
    assert_same_trace,
    collector,
    port_of,
    upload_quickly,
    write_trace,
)

pytest.importorskip("httpx")


def test_a_trace_goes_to_a_foreign_tus_server_once(data_dir: Path) -> None:
    write_trace(data_dir)
    with TusServer() as server:
        endpoint = f"tus+{server.url}"
        assert upload_quickly(data_dir, endpoint).segments_sent == 3
        posted = server.count("POST")
        assert {path["filename"] for path in server.metadata} >= {"version.json", "attempts.json"}
        again = upload_quickly(data_dir, endpoint)
        assert (again.segments_sent, again.segments_skipped) == (0, 3) and server.count("POST") == posted
        del server.data["/files/2"]
        assert upload_quickly(data_dir, endpoint).segments_sent == 1, "what vanished there is sent again"


SERVE = """
import sys, pathlib
from ml_debugger.collector import KeyRing, serve
serve(port=int(sys.argv[1]), storage=sys.argv[2], keys=KeyRing([]),
      on_ready=lambda url: pathlib.Path(sys.argv[3]).write_text(url))
"""


class MortalServer:
    """A collector, as a process that is killed (-9) at random times and started again on its port."""

    def __init__(self, storage: Path, port_file: Path, seed: int, kills: int) -> None:
        pytest.importorskip("starlette")
        pytest.importorskip("uvicorn")
        self._storage, self._port_file = storage, port_file
        self._generator, self._kills = random.Random(seed), kills
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve_and_kill)
        self.port = 0
        self.killed = 0

    def __enter__(self) -> MortalServer:
        self._thread.start()
        while not self.port:
            time.sleep(0.01)
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join()

    def _serve_and_kill(self) -> None:
        while not self._stop.is_set():
            self._port_file.unlink(missing_ok=True)
            server = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(self.port), str(self._storage), str(self._port_file)]
            )
            while not self._port_file.exists() and server.poll() is None:
                time.sleep(0.01)
            if self._port_file.exists() and (url := self._port_file.read_text()):
                self.port = port_of(url)
                self._stop.wait(self._generator.random() * 0.5 if self.killed < self._kills else 60)
                self.killed += 1
            server.kill()
            server.wait()


@pytest.mark.timeout(120)
def test_a_server_that_is_killed_again_and_again_gets_everything(data_dir: Path, tmp_path: Path) -> None:
    """kill -9 of the server at random times; the client's tries bridge it, or the next upload does."""
    write_trace(data_dir, epochs=tuple(range(6)), width=100_000)
    storage = tmp_path / "storage"
    with MortalServer(storage, tmp_path / "port", seed=5, kills=6) as server:
        deadline = time.monotonic() + 90
        while True:
            assert time.monotonic() < deadline
            try:
                upload_quickly(data_dir, f"http://127.0.0.1:{server.port}", key=None)
                break
            except UploadError:
                time.sleep(0.05)
    assert_same_trace(data_dir, storage)
    assert len(list(storage.rglob("a*.zip"))) == 6


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 12))])
def test_uploader_and_server_both_killed_again_and_again_end_with_every_row_once(
    seed: int, data_dir: Path, tmp_path: Path
) -> None:
    write_trace(data_dir, epochs=tuple(range(6)), width=100_000)
    storage = tmp_path / "storage"
    generator = random.Random(seed)
    kills = 0
    with MortalServer(storage, tmp_path / "port", seed=seed + 100, kills=3) as server:
        arguments = ["--data-dir", str(data_dir), "--endpoint", f"http://127.0.0.1:{server.port}"]
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline
            uploader = subprocess.Popen(
                [sys.executable, "-m", "ml_debugger.cli", "upload", "net", "v1", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                if uploader.wait(0.4 + generator.random() * 0.6 if kills < 3 else 60) == 0:
                    break
            except subprocess.TimeoutExpired:
                uploader.kill()
                uploader.wait()
                kills += 1
    assert kills and server.killed
    assert_same_trace(data_dir, storage)
    assert len(list(storage.rglob("a*.zip"))) == 6
    assert not list((storage / ".uploads").glob("*.part")), "nothing half is left"


def test_two_machines_that_send_the_same_trace_at_once_leave_it_once(data_dir: Path, tmp_path: Path) -> None:
    """Copies of a trace, so that no lock and no ledger is shared: the collector alone keeps them apart."""
    write_trace(data_dir, epochs=tuple(range(5)), width=20_000)
    shutil.copytree(data_dir, tmp_path / "copy")
    storage = tmp_path / "storage"
    with collector(storage) as url:
        uploads = [
            threading.Thread(target=upload_quickly, args=(place, url))
            for place in (data_dir, tmp_path / "copy")
        ]
        for thread in uploads:
            thread.start()
        for thread in uploads:
            thread.join()
        assert upload_quickly(data_dir, url).segments_sent == 0
    assert_same_trace(data_dir, storage)
    assert len(list(storage.rglob("a*.zip"))) == 5
    assert not list((storage / ".uploads").glob("*.part"))


def test_a_collector_whose_disk_is_full_is_said_with_the_remedy_and_gets_the_rest_later(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette")
    from ml_debugger.collector.storage import Storage

    write_trace(data_dir)
    storage = tmp_path / "storage"
    with collector(storage) as url:
        finish, left = Storage.finish, [1]

        def full(self: Storage, upload: Any) -> None:
            if not left:
                raise OSError(errno.ENOSPC, "full")
            finish(self, upload)
            left.pop()

        monkeypatch.setattr(Storage, "finish", full)
        with pytest.raises(UploadError, match="507") as caught:
            upload_quickly(data_dir, url)
        assert "free space" in caught.value.hint
        monkeypatch.undo()
        report = upload_quickly(data_dir, url)
        assert (report.segments_sent, report.segments_skipped) == (2, 1)
        (first, *_) = sorted(path.stat().st_size for path in storage.rglob("a*.zip"))
        assert report.bytes_sent < first * 1.5, "what had arrived whole is verified, not sent again"
    assert_same_trace(data_dir, storage)


@pytest.mark.parametrize("when", ["cut", "sent"])
def test_epochs_that_are_dropped_while_they_travel_stop_nothing(
    when: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.uploading import rank_upload

    trace = write_trace(data_dir, epochs=tuple(range(5)))
    write_trace(tmp_path / "whole", epochs=tuple(range(5)))
    cut, dropped = rank_upload.cut_slice, []

    def drop(epoch: int) -> None:
        if epoch in (1, 3) and epoch not in dropped:
            dropped.append(epoch)
            shutil.rmtree(trace / "rank-00000" / f"epoch-{epoch}")

    def watched(draft: Any, *arguments: Any) -> Any:
        if when == "cut":
            drop(draft.ref.epoch)
        piece = cut(draft, *arguments)
        drop(draft.ref.epoch)
        return piece

    monkeypatch.setattr(rank_upload, "cut_slice", watched)
    with collector(tmp_path / "storage") as url:
        report = upload_quickly(data_dir, url)
    assert dropped == [1, 3]
    arrived = open_trace("net", "v1", tmp_path / "storage")
    if when == "cut":
        assert arrived.epochs == [0, 2, 4] and report.segments_sent == 3
        assert_same_trace(data_dir, tmp_path / "storage")
    else:
        assert report.segments_sent == 5
        assert_same_trace(tmp_path / "whole", tmp_path / "storage")


def test_the_key_is_in_no_file_no_repr_and_no_error(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = write_trace(data_dir)
    texts = []
    with collector(tmp_path / "storage") as url:
        upload_quickly(data_dir, url)
        for wrong in ("", "http://127.0.0.1:1", url + "/nowhere"):
            try:
                upload_trace(
                    "net",
                    "v1",
                    data_dir=data_dir,
                    endpoint=wrong or url,
                    api_key=KEY + "x",
                    stall_timeout_s=0.1,
                )
            except UploadError as error:
                texts += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
        transport = CollectorTransport(url + "/", KEY, QUICK)
        texts += [repr(transport), repr(transport.http), repr(vars(transport.http).get("base"))]
        transport.close()
    assert KEY not in " ".join(texts) + caplog.text
    for root in (trace, tmp_path / "storage"):
        for path in root.rglob("*"):
            if path.is_file():
                assert KEY.encode() not in path.read_bytes(), path
    assert os.environ.get("MLD_API_KEY") is None
