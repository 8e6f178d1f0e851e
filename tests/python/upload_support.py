"""What the tests of uploads share: small traces, a collector in this process, a tus server that misbehaves
on order, and a proxy that cuts connections."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from format_writer import Column, FormatWriter
from ml_debugger import open_trace
from ml_debugger.store import layout
from ml_debugger.uploading.endpoint import parse_endpoint
from ml_debugger.uploading.retry import RetryPolicy
from ml_debugger.uploading.transports import Item
from ml_debugger.uploading.transports.tus import TusTransport

QUICK = RetryPolicy(stall_timeout_s=20.0, base_s=0.001, cap_s=0.002)
KEY = "canary-7f3a91-key"
SMALL = b"0123456789" * 10


def write_trace(
    data_dir: Path,
    *,
    model: str = "net",
    epochs: tuple[int | None, ...] = (0, 1, None),
    calls: int = 3,
    rows: int = 4,
    width: int = 5,
    rank: int = 0,
    seed: int = 0,
    sealed: bool = True,
) -> Path:
    """A trace with bf16 features, labels, text, rows of differing shape and a gap; returns its directory."""
    generator = np.random.default_rng(seed)
    writer = FormatWriter(data_dir, model, fields=[{"name": "camera", "type": "str"}])
    number = 0
    for epoch in epochs:
        for _ in range(calls):
            ids = [f"{epoch}-{number}-{row}" for row in range(rows)]
            features = {
                "features": Column(
                    generator.integers(0, 1 << 16, (rows, width), np.uint16), dtype="bfloat16"
                ),
                "camera": Column(["nørd", "", "x" * 300, "b"][:rows] + ["c"] * max(0, rows - 4), "str"),
                "ragged": Column([np.arange(row + 1, dtype=np.float32) for row in range(rows)]),
            }
            truths = {"label": Column(generator.integers(0, 9, rows))} if number % 2 == 0 else None
            writer.call(number, ids, features, truths, epoch=epoch, rank=rank, inline=("camera",), pieces=2)
            number += 1
        writer.gap(number, number, 2, epoch=epoch, rank=rank)
        number += 1
    return writer.write(sealed=sealed)


def assert_same_trace(here: Path, there: Path, model: str = "net", version: str = "v1") -> None:
    """Both directories give the same rows, bit for bit, in recorded dtypes and in one order."""
    one, other = open_trace(model, version, here), open_trace(model, version, there)
    assert one.epochs == other.epochs and one.attempts == other.attempts
    assert one.fingerprint == other.fingerprint
    for table in ("extracted_feature", "ground_truth"):
        left, right = one.tensors(table), other.tensors(table)
        assert list(left) == list(right)
        for name, values in left.items():
            theirs = right[name]
            if isinstance(values, list):
                assert [_bits(value) for value in values] == [_bits(value) for value in theirs], name
            else:
                assert values.dtype == theirs.dtype and _bits(values) == _bits(theirs), name
        assert one.num_rows(table, dedupe=True) == other.num_rows(table, dedupe=True)


def _bits(value: Any) -> Any:
    if hasattr(value, "untyped_storage"):
        import torch

        return tuple(value.shape), value.contiguous().view(
            torch.uint8
        ).numpy().tobytes() if value.numel() else b""
    return value


def item(data: bytes, *, model: str = "net", number: int = 0) -> Item:
    """A file that a collector takes for a slice; ``sent`` of it counts bytes, ``urls`` where they went."""
    digest = hashlib.sha256(data).hexdigest()
    name = layout.SliceName(0, number, 1, 0, "0" * 12, digest)
    path = f"{layout.slug(model)}/{layout.slug('v1')}/rank-00000/epoch-0/{name}"
    counted = CountedItem(
        path, io.BytesIO(data), len(data), digest, None, lambda url: None, lambda length: None
    )
    return counted.counting()


class CountedItem(Item):
    """An item that remembers what was told about it."""

    def counting(self) -> CountedItem:
        sent: list[int] = []
        urls: list[str] = []
        made = CountedItem(
            self.path, self.file, self.length_bytes, self.sha256, self.url, urls.append, sent.append
        )
        object.__setattr__(made, "sent", sent)
        object.__setattr__(made, "urls", urls)
        return made


@contextlib.contextmanager
def collector(storage: Path, keys: tuple[str, ...] = (KEY,), port: int = 0) -> Iterator[str]:
    """A collector in a thread of this process; gives its URL."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from ml_debugger.collector import KeyRing
    from ml_debugger.collector.server import make_server

    server, url, listener = make_server("127.0.0.1", port, storage, KeyRing(keys))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


class CuttingProxy:
    """Passes bytes on, and cuts connection number n after ``cuts[n]`` bytes of the client, then none."""

    def __init__(
        self, target: tuple[str, int], cuts: list[int] | None = None, *, of_answers: bool = False
    ) -> None:
        self._target = target
        self.cuts = cuts or []
        self.of_answers = of_answers
        self.connections = 0
        self.cut_connections = 0
        self.passed = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *details: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            number, self.connections = self.connections, self.connections + 1
            cut = self.cuts[number] if number < len(self.cuts) else None
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            pair = (client, server)
            threading.Thread(
                target=self._pass, args=(*pair, pair, None if self.of_answers else cut), daemon=True
            ).start()
            threading.Thread(
                target=self._pass, args=(server, client, pair, cut if self.of_answers else None), daemon=True
            ).start()

    def _pass(
        self, source: socket.socket, target: socket.socket, pair: tuple[Any, Any], cut: int | None
    ) -> None:
        left = cut
        try:
            while left is None or left > 0:
                data = source.recv(1 << 16 if left is None else min(left, 1 << 16))
                if not data:
                    break
                target.sendall(data)
                self.passed += len(data)
                if left is not None:
                    left -= len(data)
        except OSError:
            pass
        if left == 0:
            self.cut_connections += 1
        for end in pair:
            with contextlib.suppress(OSError):
                if left == 0 and not self.of_answers:
                    # As a broken link does: a reset, not a polite end.
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                end.close()


Answer = tuple[int, dict[str, str], bytes]
Script = Callable[[str, str, dict[str, str]], "Answer | None"]


class TusServer:
    """A plain tus server, which answers as ``script`` says where that says something."""

    def __init__(
        self, script: Script | None = None, *, extensions: str = "creation,termination,checksum"
    ) -> None:
        self.script = script or (lambda method, path, headers: None)
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.data: dict[str, bytearray] = {}
        self.lengths: dict[str, int] = {}
        self.metadata: list[dict[str, str]] = []
        self.extensions = extensions
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length)
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.requests.append((self.command, self.path, headers))
                found = outer.script(self.command, self.path, headers)
                status, answer, payload = found or outer.answer(self.command, self.path, headers, body)
                self.send_response(status)
                for name, value in {"Tus-Resumable": "1.0.0", **answer}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(payload)

            do_GET = do_POST = do_HEAD = do_PATCH = do_DELETE = do_OPTIONS = do_PUT = _serve

            def log_message(self, *details: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/files/"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> TusServer:
        return self

    def __exit__(self, *details: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str) -> int:
        return sum(request[0] == method for request in self.requests)

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if method == "OPTIONS":
            return 204, {"Tus-Extension": self.extensions, "Tus-Checksum-Algorithm": "sha1,md5"}, b""
        if method == "POST":
            place = f"/files/{len(self.lengths)}"
            self.data[place], self.lengths[place] = bytearray(), int(headers["upload-length"])
            pairs = (pair.split(" ") for pair in headers["upload-metadata"].split(","))
            self.metadata.append({name: base64.b64decode(value).decode() for name, value in pairs})
            return 201, {"Location": place}, b""
        if path not in self.data:
            return 404, {}, b""
        data = self.data[path]
        if method == "DELETE":
            del self.data[path]
            return 204, {}, b""
        if method == "PATCH":
            if int(headers["upload-offset"]) != len(data):
                return 409, {}, b""
            if "upload-checksum" in headers:
                algorithm, expected = headers["upload-checksum"].split(" ")
                if base64.b64encode(hashlib.new(algorithm, body).digest()).decode() != expected:
                    return 460, {}, b""
            data += body
        return (
            200 if method == "HEAD" else 204,
            {
                "Upload-Offset": str(len(data)),
                "Upload-Length": str(self.lengths[path]),
            },
            b"",
        )


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


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


def send(server: TusServer, data: bytes = SMALL, key: str | None = KEY, policy: RetryPolicy = QUICK) -> Any:
    transport = TusTransport(server.url, key, policy)
    upload = item(data)
    try:
        transport.send(upload)
    finally:
        transport.close()
    return upload
