"""Uploads to servers that are not ours: a tus server and an S3 server from packages, where installed."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Browser, browser
from ml_debugger import load_export
from ml_debugger.errors import UploadError
from ml_debugger.store import layout
from ml_debugger.uploading import upload_trace
from ml_debugger.uploading.transports.tus import TusTransport
from upload_support import KEY, QUICK, CuttingProxy, assert_same_trace, collector, item, write_trace

DEADLINE_S = 30.0


NODE_PROGRAM = """
const {Server} = require('@tus/server'), {FileStore} = require('@tus/file-store')
const tus = new Server({path: '/files', datastore: new FileStore({directory: process.argv[1]})})
const http = require('http').createServer((request, response) => {
  const hasChecksum = 'upload-checksum' in request.headers
  response.on('close', () => console.log(request.method, response.statusCode, hasChecksum))
  tus.handle(request, response)
})
http.listen(0, '127.0.0.1', () => console.log(http.address().port))
"""


@pytest.fixture(params=["tuspyserver", "@tus/server"])
def tus_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A tus server from PyPI, and one from npm; its address and its folder."""
    folder = tmp_path / "tus"
    folder.mkdir()
    if request.param == "tuspyserver":
        with tuspyserver_in(folder) as port:
            yield f"tus+http://127.0.0.1:{port}/files/", folder
    else:
        with NodeServer(folder) as server:
            yield f"tus+http://127.0.0.1:{server.port}/files/", folder


class NodeServer:
    """@tus/server, the protocol's reference implementation, which knows no checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        node = shutil.which("node")
        if (
            node is None
            or subprocess.run([node, "-e", "require('@tus/server')"], capture_output=True).returncode
        ):
            pytest.skip(
                "@tus/server is not installed: npm install -g @tus/server@1 @tus/file-store@1, "
                "and NODE_PATH=$(npm root -g)"
            )
        command = [node, "-e", NODE_PROGRAM, str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> NodeServer:
        return self

    def __exit__(self, *details: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def requests(self) -> list[tuple[str, int, bool]]:
        """End it; (method, status, whether it had a checksum) of each request that it answered."""
        self._process.terminate()
        lines = (line.split() for line in self._process.communicate()[0].splitlines())
        return [(method, int(status), checksum == "true") for method, status, checksum in lines]


@contextlib.contextmanager
def tuspyserver_in(folder: Path) -> Iterator[int]:
    """tuspyserver on a FastAPI application; gives its port."""
    tuspyserver = pytest.importorskip(
        "tuspyserver", reason="tuspyserver is not installed: pip install tuspyserver"
    )
    fastapi = pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    app = fastapi.FastAPI()
    app.include_router(tuspyserver.create_tus_router(prefix="files", files_dir=str(folder)))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
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


def send_and_be_cut(transport: TusTransport, upload: Any, proxy: CuttingProxy) -> str:
    """Send until every connection was cut; where the upload is."""
    places: list[str] = []
    with pytest.raises(UploadError, match="gave up"):
        transport.send(dataclasses.replace(upload, on_url=places.append))
    proxy.cuts.clear()
    return places[-1]


@pytest.mark.parametrize("what", ["goes on", "is ended", "is gone"])
def test_an_upload_to_a_foreign_server_that_was_cut(what: str, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 << 20)
    sent: list[int] = []
    with (
        NodeServer(tmp_path) as server,
        CuttingProxy(("127.0.0.1", server.port), [2_500_000, *[2_000] * 20]) as proxy,
    ):
        transport = TusTransport(f"http://127.0.0.1:{proxy.port}/files/", None, QUICK)
        upload = dataclasses.replace(item(data), on_bytes=sent.append)
        url = send_and_be_cut(transport, upload, proxy)
        place = tmp_path / url.rpartition("/")[2]
        sent.clear()
        if what == "is ended":
            transport.discard(url)
            assert not place.exists()
        else:
            arrived = place.stat().st_size
            if what == "is gone":
                arrived = 0
                place.unlink()
            else:
                assert 0 < arrived < len(data), "a part of it, and it stays"
            later: list[str] = [url]
            transport.send(dataclasses.replace(upload, url=url, on_url=later.append))
            assert sum(sent) == len(data) - arrived, "on from where the server is"
            assert (tmp_path / later[-1].rpartition("/")[2]).read_bytes() == data
            assert (later[-1] == url) == (what == "goes on")
        transport.close()
        requests = server.requests()
    assert not any(has_checksum for _, _, has_checksum in requests), "it has not said that it knows any"


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


def test_a_person_signs_in_reads_the_page_and_downloads_a_trace(data_dir: Path, tmp_path: Path) -> None:
    """The page in a real browser, without a window."""
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package)
    hostile = "<i>net</i><img src=x onerror=alert(1)>\u202e"
    write_trace(data_dir, model=hostile)
    write_trace(data_dir, model="plain " + "x" * 200)
    downloads = tmp_path / "downloads"
    with collector(tmp_path / "storage") as url, browser(tmp_path) as tab:
        for model in (hostile, "plain " + "x" * 200):
            upload_trace(model, "v1", data_dir=data_dir, endpoint=url, api_key=KEY)
        tab.go(url)
        assert "API key" in tab.text() and "net" not in tab.text()
        tab.type("wrong", into="key")
        tab.wait_for("document.querySelector('.wrong')")
        tab.type(KEY, into="key")
        tab.wait_for("document.querySelector('table')")
        assert tab.evaluate("location.href") == f"{url}/", "nothing of the key stands in the address"
        shown = tab.text()
        assert "<i>net</i><img src=x onerror=alert(1)>\N{REPLACEMENT CHARACTER}" in shown
        assert "none, 0, 1" in shown and "2 traces, 72 rows" in shown and "UTC" in shown
        assert not tab.evaluate("document.querySelector('td i, td img, script')")
        for width in (1200, 780, 360):
            tab.send(
                "Emulation.setDeviceMetricsOverride",
                width=width, height=800, deviceScaleFactor=1, mobile=width < 400,
            )  # fmt: skip
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"at {width} pixels"
        ink = [ink_of(tab, scheme) for scheme in ("light", "dark")]
        assert ink[0] < 60 and ink[1] > 190, "text is dark on light, and light on dark"
        tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        tab.evaluate("document.querySelector('td a').click()")
        tab.wait_until(lambda: bool(list(downloads.glob("*.zip"))), "the download")
        (got,) = downloads.glob("*.zip")
        assert load_export(got).num_rows("extracted_feature") == 36
        tab.evaluate("document.querySelector('header button').click()")
        tab.wait_for("document.querySelector('form.sign-in')")
        tab.go(url)
        assert "Sign in" in tab.text()
        assert not [said for said in tab.complaints() if "401" not in said], tab.complaints()


def ink_of(tab: Browser, scheme: str) -> int:
    """How bright the text is, 0 to 255, for who prefers a light or a dark page."""
    tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    red, green, blue = tab.evaluate("getComputedStyle(document.querySelector('td')).color.match(/\\d+/g)")
    return (int(red) + int(green) + int(blue)) // 3
