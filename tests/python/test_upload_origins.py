"""Where a key may go: redirects, other origins, proxies, plain http, certificates; servers that never end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from ml_debugger.errors import UploadError
from ml_debugger.uploading.endpoint import parse_endpoint
from ml_debugger.uploading.retry import RetryPolicy, TransientError
from ml_debugger.uploading.transports.collector import CollectorTransport
from ml_debugger.uploading.transports.http import MAX_ANSWER_BYTES, HttpClient
from ml_debugger.uploading.transports.tus import TusTransport
from upload_support import (
    KEY,
    QUICK,
    SMALL,
    TusServer,
    item,
    send,
)

pytest.importorskip("httpx")


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's side of TLS on 127.0.0.1, whose authority uploads trust."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return context


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
    with socket.create_server(("127.0.0.1", 0)) as silent:
        policy = RetryPolicy(stall_timeout_s=0.3, base_s=0.001)
        transport = TusTransport(f"http://127.0.0.1:{silent.getsockname()[1]}/", KEY, policy)
        begin = time.monotonic()
        with pytest.raises(UploadError):
            transport.send(item(SMALL))
        transport.close()
        assert time.monotonic() - begin < 4


@pytest.mark.parametrize(
    "first, then",
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["headers", "body", "body without a length", "interim answers"],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_answer_that_comes_byte_by_byte_is_given_up(
    scheme: str, first: bytes, then: bytes, tls: ssl.SSLContext
) -> None:
    """Each byte came in time for the timeout of its read, and the answer never ended."""
    is_over = threading.Event()

    def drip(listener: socket.socket) -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(first)
                while not is_over.wait(0.02):
                    connection.sendall(then)

    listener = socket.create_server(("127.0.0.1", 0))
    address = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/"
    if scheme == "https":
        listener = tls.wrap_socket(listener, server_side=True)
    with listener:
        thread = threading.Thread(target=drip, args=(listener,), daemon=True)
        thread.start()
        client = HttpClient(address, KEY, RetryPolicy(stall_timeout_s=0.3))
        ended = threading.Timer(5, is_over.set)  # the answer ends then at the latest
        ended.start()
        with pytest.raises(TransientError, match="did not end its answer"):
            client.request("GET", "")
        ended.cancel()
        is_over.set()
        client.close()
        thread.join(5)


def test_a_document_without_an_end_is_not_believed() -> None:
    with TusServer(lambda method, path, headers: (200, {}, b"x" * (MAX_ANSWER_BYTES + 1))) as server:
        transport = CollectorTransport(server.url, KEY, QUICK)
        with pytest.raises(UploadError, match="has no end"):
            transport.read("net/v1/version.json")
        transport.close()


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
