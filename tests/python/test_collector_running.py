"""The collector as a program: how it begins and ends."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_debugger.uploading import upload_trace
from upload_support import KEY, collector, item, write_trace

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import collector_support  # noqa: E402
from collector_support import DATA, TUS, begin  # noqa: E402

storage = collector_support.storage


SERVE = """
import signal, sys
from ml_debugger.collector import serve, server
server._GRACE_S = float(sys.argv[2])
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
serve(port=0, storage=sys.argv[1], on_ready=lambda url: print(url, flush=True))
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print("returned")
"""


@contextlib.contextmanager
def served(storage: Path, grace_s: float = 5) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve` as a program of somebody calls it, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(storage), str(grace_s)],
        env={**os.environ, "MLD_API_KEYS": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_names_its_address_and_returns_after_a_signal(number: int, storage: Path) -> None:
    with served(storage) as (process, url):
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(url, auth=("", KEY)).status_code == 200
        assert KEY.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("returned\n", "")
        assert process.returncode == 0


@pytest.mark.parametrize("how", ["upload", "document", "twice"])
def test_a_request_that_hangs_does_not_hold_up_the_end_and_leaves_no_traceback(
    how: str, storage: Path
) -> None:
    with served(storage, 60 if how == "twice" else 0.5) as (process, url):
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}", **TUS}) as client:
            upload = item(DATA)
            place = begin(client, upload)
        method, path = ("PUT", "/data/net-000000000000/v1-000000000000/version.json")
        if how != "document":
            method, path = "PATCH", place
        hanging = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
        hanging.putrequest(method, path)
        for name, value in {**TUS, "Authorization": f"Bearer {KEY}", "Upload-Offset": "0",
                            "Content-Type": "application/offset+octet-stream",
                            "Content-Length": str(len(DATA))}.items():  # fmt: skip
            hanging.putheader(name, value)
        hanging.endheaders(DATA[:60])
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        if how == "twice":
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("returned\n", "")
        assert time.monotonic() - began < 10
        hanging.close()
    if how == "upload":
        (part,) = (storage / ".uploads").glob("*.part")
        assert part.read_bytes() == DATA[:60], "what has arrived stays"


def test_an_export_that_is_being_made_does_not_hold_up_the_end(
    data_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.collector import overview, server

    write_trace(data_dir)
    upload_trace("net", "v1", data_dir=data_dir, endpoint=str(storage))
    monkeypatch.setattr(server, "_GRACE_S", 0.2)
    begun = threading.Event()

    def endless(*arguments: Any, progress: Any) -> Any:
        begun.set()
        while True:
            progress(1, 2)
            time.sleep(0.01)

    monkeypatch.setattr(overview, "export_trace", endless)
    with collector(storage, keys=()) as url:
        link = re.search('href="([^"]+)"', httpx.get(url).text)[1]  # type: ignore[index]

        def download() -> None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/{link}", timeout=30)

        asker = threading.Thread(target=download)
        asker.start()
        assert begun.wait(10)
        ending = time.monotonic()
    assert time.monotonic() - ending < 8
    asker.join(10)
    assert not asker.is_alive() and not list((storage / ".uploads").glob("export-*"))
