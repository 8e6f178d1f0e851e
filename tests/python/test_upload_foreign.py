"""Uploads to servers that are not ours: a tus server and an S3 server from packages, where installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_debugger.errors import UploadError
from ml_debugger.store import layout
from ml_debugger.uploading import upload_trace
from upload_support import assert_same_trace, write_trace

DEADLINE_S = 30.0


@pytest.fixture
def tus_server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """tuspyserver on a FastAPI application; its address and its folder."""
    tuspyserver = pytest.importorskip("tuspyserver")
    fastapi = pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    folder = tmp_path / "tus"
    folder.mkdir()
    app = fastapi.FastAPI()
    app.include_router(tuspyserver.create_tus_router(prefix="files", files_dir=str(folder)))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"tus+http://127.0.0.1:{listener.getsockname()[1]}/files/", folder
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_foreign_tus_server_gets_every_slice_once(
    tus_server: tuple[str, Path], data_dir: Path, tmp_path: Path
) -> None:
    endpoint, folder = tus_server
    trace = write_trace(data_dir, width=50_000)

    def upload(**arguments: Any) -> Any:
        return upload_trace("net", "v1", data_dir=data_dir, endpoint=endpoint, **arguments)

    assert upload().segments_sent == 3
    again = upload()
    assert (again.segments_sent, again.segments_skipped, again.bytes_sent) == (0, 3, 0)
    # From the files alone the trace can be put together: by their names and manifests.
    for entry in (trace / "rank-00000" / "uploads").rglob("a*.json"):
        document = layout.read_json(entry)
        assert document is not None and document["sent"]
        (place,) = folder.glob(f"*{document['url'].rstrip('/').rpartition('/')[2]}")
        target = tmp_path / "there" / trace.relative_to(data_dir) / "rank-00000" / entry.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(place, target / document["name"])
    for name in ("version.json", "rank-00000/attempts.json"):
        shutil.copy(trace / name, tmp_path / "there" / trace.relative_to(data_dir) / name)
    assert_same_trace(data_dir, tmp_path / "there")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of moto's S3 server; its address."""
    obstore = pytest.importorskip("obstore")
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("moto_server is not installed: pip install 'moto[server,s3]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    settings = {
        "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "a",
        "AWS_REGION": "us-east-1", "AWS_SECRET_ACCESS_KEY": "b",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    httpx = pytest.importorskip("httpx")
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            httpx.put(f"{url}/traces", trust_env=False)
            break
        except httpx.HTTPError:
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.1)
    yield "s3://traces/some/where"
    server.kill()
    server.wait()
    assert obstore is not None


def test_an_s3_bucket_holds_the_trace(bucket: str, data_dir: Path, tmp_path: Path) -> None:
    from obstore.store import from_url

    write_trace(data_dir, width=800_000)

    def upload(**arguments: Any) -> Any:
        return upload_trace("net", "v1", data_dir=data_dir, endpoint=bucket, **arguments)

    assert upload().segments_sent == 3
    assert upload().segments_sent == 0
    store = from_url(bucket, client_options={"allow_http": True})
    listed = [entry["path"] for batch in store.list() for entry in batch]
    store.delete(next(path for path in listed if path.endswith(".zip")))
    assert upload().segments_sent == 1
    assert upload(force=True).segments_sent == 3
    for path in listed:
        target = tmp_path / "there" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.get(path).bytes())
    assert_same_trace(data_dir, tmp_path / "there")


def test_a_store_that_is_not_there_is_an_upload_error_in_bounded_time(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    write_trace(data_dir)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for name in ("AWS_ALLOW_HTTP", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "true")
    begin = time.monotonic()
    with pytest.raises(UploadError, match="s3://traces"):
        upload_trace("net", "v1", data_dir=data_dir, endpoint="s3://traces/x", stall_timeout_s=2.0)
    assert time.monotonic() - begin < 20


def test_without_obstore_the_error_names_the_extra(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "obstore", None)
    write_trace(data_dir)
    with pytest.raises(UploadError, match=r"ml-debugger\[cloud\]"):
        upload_trace("net", "v1", data_dir=data_dir, endpoint="gs://bucket/x")


def test_a_browser_shows_what_was_collected(data_dir: Path, tmp_path: Path) -> None:
    """The page in a real browser, without a window."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    from upload_support import collector

    write_trace(data_dir, model="<i>net</i>")
    with collector(tmp_path / "storage", keys=()) as url:
        upload_trace("<i>net</i>", "v1", data_dir=data_dir, endpoint=url)
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom", url,
        ]  # fmt: skip
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": str(tmp_path)}
        ).stdout
    assert "&lt;i&gt;net&lt;/i&gt;" in shown and "none, 0, 1" in shown and ">export</a>" in shown
