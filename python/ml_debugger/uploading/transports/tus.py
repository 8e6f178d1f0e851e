"""The tus resumable upload protocol, version 1.0.0 (https://tus.io/protocols/resumable-upload), client side.

The server's offset is the truth about what has arrived; ours only tells what to offer next.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TypeVar

from ml_debugger.errors import AuthenticationError, UploadError
from ml_debugger.uploading.retry import Retries, RetryPolicy, TransientError
from ml_debugger.uploading.transports import Item
from ml_debugger.uploading.transports.http import Answer, HttpClient

TUS_VERSION = "1.0.0"
_PART_BYTES = 8 << 20
# Progress is told after each piece: on a slow link a large one looks like a standstill, on a fast one small
# ones cost more than their bytes.
_PIECE_BYTES = 256 << 10
_MOST_PIECE_BYTES = 1 << 20
_PIECE_S = 0.05
_GONE = (404, 410)
# By preference; tus servers name what they know.
_CHECKSUMS = ("sha256", "sha1", "md5")
FILETYPE = "application/zip"

_Result = TypeVar("_Result")


class TusTransport:
    """Uploads to a tus server; see `Transport`.

    Args:
        address: Where uploads are created, ending in ``/``.
        key: Sent as ``Authorization: Bearer``, if there is one.
        policy: How often to try.
    """

    keeps_documents = False
    part_bytes = _PART_BYTES  # of one request: what a server may lose when a link breaks

    def __init__(self, address: str, key: str | None, policy: RetryPolicy) -> None:
        self._policy = policy
        self.http = HttpClient(address, key, policy)
        self._extensions: frozenset[str] | None = None
        self._checksum: str | None = None

    def held(self, trace: str, urls: Mapping[str, str]) -> dict[str, int]:
        """Length by path of the uploads that are complete: each is asked for, there is no list."""
        found = {}
        for path, url in urls.items():
            answer = self.retried(functools.partial(self._head, url))
            if answer.status not in _GONE:
                offset, length = (_number(answer, name) for name in ("upload-offset", "upload-length"))
                if offset is not None and offset == length:
                    found[path] = offset
        return found

    def read(self, path: str) -> bytes | None:
        """A tus server gives nothing back."""
        return None

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """A tus server replaces nothing."""
        return False

    def send(self, item: Item) -> None:
        """Send what the server does not have of an item, as often as it takes."""
        retries = Retries(self._policy)
        url, best = item.url, 0
        while True:
            try:
                self._discover()
                offset = None
                if url is not None:
                    offset = self._offset(url, item.length_bytes)
                if url is None or offset is None:
                    if url is not None:
                        self.discard(url)
                    url, offset = self._create(item)
                    item.on_url(url)
                while offset < item.length_bytes:
                    if offset > best:
                        best = offset
                        retries.progress()
                    offset = self._patch(url, item, offset, retries.moved)
                return
            except _LostError as error:
                url = None
                retries.failed(error)
            except TransientError as error:
                retries.failed(error)

    def discard(self, url: str) -> None:
        """Terminate an upload, if the server knows how."""
        try:
            if self._extensions is None or "termination" in self._extensions:
                headers = {"Tus-Resumable": TUS_VERSION}
                self.http.request("DELETE", url, headers=headers, accept=(200, 204, *_GONE))
        except (TransientError, UploadError):
            return  # the server's own clean-up must do

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def create_headers(self, item: Item) -> dict[str, str]:
        """Headers of a creation."""
        metadata = {
            # Some servers refuse uploads that lack the first two.
            "filename": item.path.rpartition("/")[2],
            "filetype": FILETYPE,
            "path": item.path,
            "sha256": item.sha256,
        }
        encoded = ",".join(f"{name} {_base64(value.encode())}" for name, value in metadata.items())
        return {
            "Tus-Resumable": TUS_VERSION,
            "Upload-Length": str(item.length_bytes),
            "Upload-Metadata": encoded,
        }

    def retried(self, operation: Callable[[], _Result]) -> _Result:
        """Do something as often as it takes."""
        retries = Retries(self._policy)
        while True:
            try:
                return operation()
            except TransientError as error:
                retries.failed(error)

    def _discover(self) -> None:
        """Ask once what the server can do; one that does not say can do the least."""
        if self._extensions is not None:
            return
        try:
            answer = self.http.request("OPTIONS", "")
        except AuthenticationError:
            raise
        except UploadError:
            answer = Answer(405, {}, b"")
        self._extensions = _listed(answer.headers.get("tus-extension"))
        algorithms = _listed(answer.headers.get("tus-checksum-algorithm"))
        if "checksum" in self._extensions:
            self._checksum = next((name for name in _CHECKSUMS if name in algorithms), None)

    def _create(self, item: Item) -> tuple[str, int]:
        answer = self.http.request("POST", "", headers=self.create_headers(item), accept=(201,))
        location = answer.headers.get("location")
        if not location:
            raise UploadError(
                "the endpoint created an upload without a Location", "check that it is a tus server"
            )
        # Our collector goes on with an upload whose place was lost, and says from where.
        offset = _number(answer, "upload-offset") or 0
        return self.http.resolve(location), offset if offset <= item.length_bytes else 0

    def _head(self, url: str) -> Answer:
        return self.http.request(
            "HEAD", url, headers={"Tus-Resumable": TUS_VERSION}, accept=(200, 204, *_GONE)
        )

    def _offset(self, url: str, length_bytes: int) -> int | None:
        """What has arrived; None if the upload is gone, or is not ours."""
        answer = self._head(url)
        offset = _number(answer, "upload-offset")
        if answer.status in _GONE or offset is None or offset > length_bytes:
            return None
        if _number(answer, "upload-length") not in (None, length_bytes):
            return None
        return offset

    def _patch(self, url: str, item: Item, offset: int, on_moved: Callable[[], None]) -> int:
        """Send the next part; returns the offset behind it as the server says."""
        end = min(offset + self.part_bytes, item.length_bytes)
        headers = {
            "Tus-Resumable": TUS_VERSION,
            "Content-Type": "application/offset+octet-stream",
            "Upload-Offset": str(offset),
            "Content-Length": str(end - offset),
        }
        if self._checksum is not None:
            headers["Upload-Checksum"] = f"{self._checksum} {_digest(self._checksum, item.file, offset, end)}"
        content = _pieces(item, offset, end, on_moved)
        answer = self.http.request("PATCH", url, headers=headers, content=content, accept=(200, 204, *_GONE))
        if answer.status in _GONE:
            raise _LostError("the endpoint has lost an upload that was under way")
        told = _number(answer, "upload-offset")
        if told != end:
            # It may have taken a part; only HEAD tells.
            raise TransientError(f"the endpoint took {offset} to {end} and then spoke of offset {told}")
        return end


class _LostError(TransientError):
    """The upload is gone: begin anew."""


def _pieces(item: Item, offset: int, end: int, on_moved: Callable[[], None]) -> Iterator[bytes]:
    """What lies between, in pieces that grow while the link takes them in no time."""
    size = _PIECE_BYTES
    while offset < end:
        item.file.seek(offset)
        piece = item.file.read(min(size, end - offset))
        if not piece:
            raise UploadError(f"{item.path} became shorter while it was sent", "upload again")
        begin = time.monotonic()
        yield piece
        is_fast = time.monotonic() - begin < _PIECE_S
        size = min(2 * size, _MOST_PIECE_BYTES) if is_fast else _PIECE_BYTES
        offset += len(piece)
        item.on_bytes(len(piece))
        on_moved()


def _digest(algorithm: str, file: IO[bytes], offset: int, end: int) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    file.seek(offset)
    while offset < end and (piece := file.read(min(_PIECE_BYTES, end - offset))):
        digest.update(piece)
        offset += len(piece)
    return _base64(digest.digest())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _number(answer: Answer, name: str) -> int | None:
    value = answer.headers.get(name, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None


def _listed(value: str | None) -> frozenset[str]:
    return frozenset(part.strip().lower() for part in (value or "").split(",") if part.strip())
