"""Uploads over a network that fails in every way: cuts, every status, lying servers, redirects, TLS."""

from __future__ import annotations

import errno
import os
import random
import shutil
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ml_debugger import open_trace
from ml_debugger.errors import AuthenticationError, UploadError
from ml_debugger.uploading import upload_trace
from ml_debugger.uploading.endpoint import parse_endpoint
from ml_debugger.uploading.retry import MAX_TRIES, Retries, RetryPolicy, TransientError, retry_after_s
from ml_debugger.uploading.transports.collector import CollectorTransport
from ml_debugger.uploading.transports.tus import TusTransport
from upload_support import (
    KEY,
    QUICK,
    CuttingProxy,
    TusServer,
    assert_same_trace,
    collector,
    item,
    write_trace,
)

pytest.importorskip("httpx")

SMALL = b"0123456789" * 10


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def send_through(proxy: CuttingProxy, upload: Any, path: str = "") -> None:
    transport = CollectorTransport(f"http://127.0.0.1:{proxy.port}/{path}", KEY, QUICK)
    try:
        transport.send(upload)
    finally:
        transport.close()


def cut_everywhere(storage: Path, step: int, *, of_answers: bool) -> None:
    with collector(storage) as url:
        with CuttingProxy(("127.0.0.1", port_of(url))) as proxy:
            send_through(proxy, item(SMALL, number=0))
        longest = proxy.passed
        assert 1000 < longest < 5000
        cut = 0
        for at in range(0, longest, step):
            upload = item(SMALL, number=at + 1)
            with CuttingProxy(("127.0.0.1", port_of(url)), [at], of_answers=of_answers) as proxy:
                send_through(proxy, upload)
                cut += proxy.cut_connections
            assert (storage / upload.path).read_bytes() == SMALL, f"cut after {at} bytes"
            assert sum(upload.sent) <= 2 * len(SMALL)
        assert cut > 0, "no connection was cut: the test proves nothing"
        assert not list(storage.rglob("*.part")), "nothing half is left"


@pytest.mark.parametrize("of_answers", [False, True])
def test_a_cut_of_the_connection_anywhere_in_a_small_upload_loses_nothing(
    of_answers: bool, tmp_path: Path
) -> None:
    cut_everywhere(tmp_path / "storage", 23, of_answers=of_answers)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("of_answers", [False, True])
def test_a_cut_at_every_byte_of_a_small_upload_loses_nothing(of_answers: bool, tmp_path: Path) -> None:
    cut_everywhere(tmp_path / "storage", 1, of_answers=of_answers)


def cut_large(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    data = generator.randbytes(24 << 20)
    cuts = [generator.randrange(9 << 20) for _ in range(4)]
    print(f"seed {seed}, cuts {cuts}")
    with collector(tmp_path / "storage") as url, CuttingProxy(("127.0.0.1", port_of(url)), cuts) as proxy:
        upload = item(data)
        send_through(proxy, upload)
        assert (tmp_path / "storage" / upload.path).read_bytes() == data
        # What was in buffers when the link broke is sent again, and nothing else.
        assert sum(upload.sent) - len(data) <= len(cuts) * (8 << 20)
        assert len(upload.urls) == 1, "an upload that has begun is gone on with"


@pytest.mark.parametrize("seed", range(2))
def test_cuts_at_random_bytes_of_a_large_upload_send_only_the_cut_parts_again(
    seed: int, tmp_path: Path
) -> None:
    cut_large(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2, 60))
def test_many_cuts_at_random_bytes_of_a_large_upload(seed: int, tmp_path: Path) -> None:
    cut_large(tmp_path, seed)


def test_an_upload_that_is_cut_for_good_goes_on_where_it_stopped(data_dir: Path, tmp_path: Path) -> None:
    """The whole way: the second upload, over a sound link, sends only what has not arrived."""
    write_trace(data_dir, epochs=(0,), width=100_000)
    storage = tmp_path / "storage"
    with collector(storage) as url:
        with CuttingProxy(("127.0.0.1", port_of(url)), [300_000] * 3 + [0] * 50) as proxy:
            with pytest.raises(UploadError, match="gave up after 5 tries"):
                upload_quickly(data_dir, f"http://127.0.0.1:{proxy.port}")
            (part,) = (storage / ".uploads").glob("*.part")
            arrived = part.stat().st_size
            assert arrived > 300_000
            # The same address, so that it is the same endpoint for the ledger.
            proxy.cuts.clear()
            report = upload_quickly(data_dir, f"http://127.0.0.1:{proxy.port}")
        (path,) = storage.rglob("a*.zip")
        assert report.bytes_sent == path.stat().st_size - arrived
    assert_same_trace(data_dir, storage)


def upload_quickly(data_dir: Path, endpoint: str, key: str | None = KEY, **arguments: Any) -> Any:
    """`upload_trace` with short pauses."""
    from ml_debugger.store import layout
    from ml_debugger.uploading.transports import open_transport
    from ml_debugger.uploading.upload import TraceUpload

    target = parse_endpoint(endpoint, has_key=key is not None)
    trace_dir = layout.trace_directory(data_dir, "net", "v1")
    uploads = TraceUpload(trace_dir, target, open_transport(target, key, QUICK), QUICK, lambda length: None)
    try:
        return uploads.run(arguments.get("n_epoch"), force=arguments.get("force", False))
    finally:
        uploads.close()


# Statuses


def send(server: TusServer, data: bytes = SMALL, key: str | None = KEY, policy: RetryPolicy = QUICK) -> Any:
    transport = TusTransport(server.url, key, policy)
    upload = item(data)
    try:
        transport.send(upload)
    finally:
        transport.close()
    return upload


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "PATCH"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_said_once_and_not_tried_again(status: int, method: str) -> None:
    with TusServer(lambda m, path, headers: (status, {}, b"go away") if m == method else None) as server:
        with pytest.raises(AuthenticationError, match=f"answered {status} to {method}") as caught:
            send(server)
        assert server.count(method) == 1
        assert KEY not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("status", [400, 402, 405, 406, 411, 412, 413, 415, 418, 422, 431, 451])
def test_other_4xx_fail_at_once(status: int, method: str) -> None:
    with TusServer(lambda m, path, headers: (status, {}, b"no") if m == method else None) as server:
        with pytest.raises(UploadError, match=f"answered {status} to {method}"):
            send(server)
        assert server.count(method) == 1


@pytest.mark.parametrize("status", [408, 409, 423, 425, 429, 460, 500, 502, 503, 504, 507, 599])
def test_what_may_pass_is_tried_five_times_without_progress(status: int) -> None:
    with TusServer(lambda m, path, headers: (status, {}, b"") if m == "PATCH" else None) as server:
        with pytest.raises(UploadError, match=f"{status}.*gave up after {MAX_TRIES} tries"):
            send(server)
        assert server.count("PATCH") == MAX_TRIES
        assert server.count("POST") == 1


@pytest.mark.parametrize("status", [408, 409, 423, 429, 460, 500, 502, 503, 504, 507])
@pytest.mark.parametrize("method", ["POST", "PATCH", "HEAD"])
def test_what_has_passed_is_forgotten(status: int, method: str) -> None:
    failures = {"POST": 3, "PATCH": 3, "HEAD": 1}
    first_patch = {"PATCH": 1}

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH" and first_patch["PATCH"]:
            first_patch["PATCH"] -= 1
            return 503, {}, b""
        if m == method and failures[m]:
            failures[m] -= 1
            return status, {}, b""
        return None

    with TusServer(script) as server:
        send(server)
        assert bytes(server.data["/files/0"]) == SMALL


def test_progress_begins_the_count_of_tries_anew() -> None:
    data = random.Random(0).randbytes(40 << 20)
    turns = iter(range(1000))

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        return (503, {}, b"") if m == "PATCH" and next(turns) % 4 != 3 else None

    with TusServer(script) as server:
        send(server, data)
        assert bytes(server.data["/files/0"]) == data


def test_a_retry_after_is_waited_for_up_to_a_minute() -> None:
    slept: list[float] = []
    for asked, expected in ((7.0, 7.0), (60.0, 60.0)):
        retries = Retries(RetryPolicy(base_s=0.001), sleep=slept.append)
        retries.failed(TransientError("503", retry_after_s=asked))
        assert slept.pop() == pytest.approx(expected)
    assert retry_after_s("3600", None) == 60.0
    assert retry_after_s("12", None) == 12.0
    # Clocks that are years apart: what counts is the server's own.
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert retry_after_s("Wed, 21 Oct 2015 07:28:30 GMT", date) == 30.0
    assert retry_after_s(date, "Wed, 21 Oct 2020 07:28:30 GMT") == 0.0
    for nonsense in ("soon", "-5", "1e9", "٣", "", date):
        assert retry_after_s(nonsense, None) in (None, 0.0)


def test_a_retry_after_reaches_the_pause() -> None:
    answers = [(503, {"Retry-After": "1"}, b"")]
    with TusServer(lambda m, path, headers: answers.pop() if m == "POST" and answers else None) as server:
        begin = time.monotonic()
        send(server)
        assert 1.0 <= time.monotonic() - begin < 5


def test_no_progress_within_the_deadline_ends_the_tries() -> None:
    now = [0.0]
    retries = Retries(
        RetryPolicy(stall_timeout_s=50.0), sleep=lambda s: now.append(now.pop() + s), clock=lambda: now[0]
    )
    retries.failed(TransientError("busy", retry_after_s=40.0))
    with pytest.raises(UploadError, match="stall_timeout_s=50"):
        retries.failed(TransientError("busy", retry_after_s=40.0))


# Servers that lie


@pytest.mark.parametrize("told", ["0", "7", "101", "999999", "-1", "x", "", "١٠"])
def test_a_lying_offset_after_a_part_is_not_believed(told: str) -> None:
    lies = [1]

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH" and lies:
            lies.pop()
            return 204, {"Upload-Offset": told.encode("utf-8").decode("latin-1")}, b""
        return None

    with TusServer(script) as server:
        send(server)
        assert any(bytes(data) == SMALL for data in server.data.values())


@pytest.mark.parametrize("told", ["101", "999999", "x", ""])
def test_an_offset_that_cannot_be_begins_anew_and_ends_in_bounded_time(told: str) -> None:
    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH":
            return 503, {}, b""
        return (200, {"Upload-Offset": told, "Upload-Length": "100"}, b"") if m == "HEAD" else None

    with TusServer(script) as server:
        with pytest.raises(UploadError, match="gave up"):
            send(server)
        assert 1 < server.count("POST") <= MAX_TRIES
        assert server.count("DELETE") >= server.count("POST") - 1, "what is stale is terminated"


def test_an_upload_that_the_server_lost_is_begun_anew() -> None:
    lost = [1]

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH" and lost:
            lost.pop()
            return 404, {}, b""
        return None

    with TusServer(script) as server:
        send(server)
        assert server.count("POST") == 2 and bytes(server.data["/files/1"]) == SMALL


def test_checksums_go_along_where_the_server_knows_them() -> None:
    with TusServer() as server:
        send(server)
        assert all("upload-checksum" in h for m, _, h in server.requests if m == "PATCH")
    with TusServer(extensions="creation") as server:
        send(server)
        assert not any("upload-checksum" in h for _, _, h in server.requests)


def test_metadata_names_the_file() -> None:
    with TusServer() as server:
        upload = send(server)
        assert server.metadata == [
            {
                "filename": upload.path.rpartition("/")[2],
                "filetype": "application/zip",
                "path": upload.path,
                "sha256": upload.sha256,
            }
        ]


# Other origins


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_a_redirect_is_not_followed_and_the_key_goes_nowhere(status: int, method: str) -> None:
    with TusServer() as other:
        redirect = (status, {"Location": other.url}, b"")
        with TusServer(lambda m, path, headers: redirect if m == method else None) as server:
            with pytest.raises(UploadError, match="redirect"):
                send(server)
            assert server.count(method) == 1
        assert not other.requests


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:1/x", "https://127.0.0.1/files/1", "//evil.example/x", "http://[bad"]
)
def test_a_location_at_another_origin_is_refused(location: str) -> None:
    with TusServer(
        lambda m, path, headers: (201, {"Location": location}, b"") if m == "POST" else None
    ) as server:
        with pytest.raises(UploadError, match=r"origin|URL") as caught:
            send(server)
        assert KEY not in str(caught.value)
        assert server.count("PATCH") == 0


def test_a_ledger_that_was_tampered_with_leads_the_key_nowhere() -> None:
    with TusServer() as other, TusServer() as server:
        transport = TusTransport(server.url, KEY, QUICK)
        upload = item(SMALL)
        object.__setattr__(upload, "url", f"{other.url}0")
        with pytest.raises(UploadError, match="origin"):
            transport.send(upload)
        transport.close()
        assert not other.requests


def test_proxies_of_the_environment_do_not_see_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    with TusServer() as proxy, TusServer() as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        send(server)
        assert not proxy.requests


@pytest.mark.parametrize(
    "endpoint", ["http://192.0.2.1/", "http://example.com:8000/x", "tus+http://example.com/"]
)
def test_a_key_travels_over_plain_http_to_loopback_only(endpoint: str) -> None:
    with pytest.raises(UploadError, match="not encrypted"):
        parse_endpoint(endpoint, has_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1:99", "localhost", "[::1]:80"])
def test_loopback_needs_no_encryption(host: str) -> None:
    assert parse_endpoint(f"http://{host}", has_key=True).address == f"http://{host}/"
    assert parse_endpoint("http://example.com", has_key=False).kind == "collector"


@pytest.mark.parametrize("key", ["a\nb", "a\r\nX: y", "ключ", "a b", "\0"])
def test_a_key_that_no_header_carries_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(UploadError, match="key") as caught:
        TusTransport("http://127.0.0.1/", key, QUICK)
    assert key not in str(caught.value)


def test_what_a_server_says_is_shown_without_the_key_and_without_control_characters() -> None:
    said = f"no: \x1b[31m{KEY} ".encode() + b"x" * 5000
    with TusServer(lambda m, path, headers: (400, {}, said) if m == "POST" else None) as server:
        with pytest.raises(UploadError) as caught:
            send(server)
        assert KEY not in str(caught.value) and "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_nobody_there_is_an_upload_error_in_bounded_time() -> None:
    begin = time.monotonic()
    transport = TusTransport("http://127.0.0.1:1/", KEY, QUICK)
    with pytest.raises(UploadError, match="cannot talk to"):
        transport.send(item(SMALL))
    transport.close()
    assert time.monotonic() - begin < 5


def test_a_server_that_is_silent_is_given_up() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        policy = RetryPolicy(stall_timeout_s=0.3, base_s=0.001)
        transport = TusTransport(f"http://127.0.0.1:{silent.getsockname()[1]}/", KEY, policy)
        begin = time.monotonic()
        with pytest.raises(UploadError):
            transport.send(item(SMALL))
        transport.close()
        assert time.monotonic() - begin < 4


# TLS


class TlsServer(TusServer):
    """The same over TLS."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)


@pytest.mark.parametrize("kind", ["good", "unknown authority", "wrong host", "expired"])
def test_certificates_are_verified(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trustme = pytest.importorskip("trustme")
    from datetime import datetime, timedelta, timezone

    authority, stranger = trustme.CA(), trustme.CA()
    maker = stranger if kind == "unknown authority" else authority
    host = "example.org" if kind == "wrong host" else "127.0.0.1"
    past = datetime.now(timezone.utc) - timedelta(days=1)
    certificate = maker.issue_cert(host, not_after=past) if kind == "expired" else maker.issue_cert(host)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with TlsServer(context) as server:
        server.url = server.url.replace("http:", "https:")
        if kind == "good":
            send(server)
            assert bytes(server.data["/files/0"]) == SMALL
            return
        begin = time.monotonic()
        with pytest.raises(UploadError, match="certificate") as caught:
            send(server)
        assert "SSL_CERT_FILE" in caught.value.hint
        assert time.monotonic() - begin < 5
        assert not server.requests, "nothing was said to a server that is not the one"


# Whole traces


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
