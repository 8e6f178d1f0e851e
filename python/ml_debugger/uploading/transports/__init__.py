"""The ways to an endpoint, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Protocol

from ml_debugger.uploading.endpoint import Endpoint
from ml_debugger.uploading.retry import RetryPolicy

__all__ = ["Item", "Transport", "open_transport"]


@dataclass(frozen=True)
class Item:
    """One file to send.

    Attributes:
        path: Where it goes, below the endpoint, with ``/``.
        file: Open for reading, seekable.
        length_bytes: Its length.
        sha256: Hex digest of it.
        url: Where an earlier try has begun to send it, if one has.
        on_url: Called with the place before any byte of it is sent there.
        on_bytes: Called with the number of bytes after some have travelled.
    """

    path: str
    file: IO[bytes]
    length_bytes: int
    sha256: str
    url: str | None
    on_url: Callable[[str], None]
    on_bytes: Callable[[int], None]


class Transport(Protocol):
    """Sends files to one endpoint. Methods may block; they raise UploadError or AuthenticationError."""

    keeps_documents: bool
    """Whether `read` and `swap` work: if not, a document is an item like any other."""

    def held(self, trace: str, urls: Mapping[str, str]) -> dict[str, int]:
        """Length by path of what the endpoint holds below ``trace``; ``urls``: where items were sent to."""

    def read(self, path: str) -> bytes | None:
        """A document (a small file that may change), or None if there is none."""

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """Replace a document, durably, if it still is ``old``; False if it is not."""

    def send(self, item: Item) -> None:
        """Send an item; when this returns, the endpoint holds it, whole and verified."""

    def discard(self, url: str) -> None:
        """Tell the endpoint that an item that was begun will not be finished; never raises."""

    def close(self) -> None:
        """Let go of connections."""


def open_transport(endpoint: Endpoint, key: str | None, policy: RetryPolicy) -> Transport:
    """The transport for an endpoint.

    Raises:
        UploadError: What it needs is not installed, or the key cannot travel in a header.
    """
    if endpoint.kind == "folder":
        from ml_debugger.uploading.transports.folder import FolderTransport

        return FolderTransport(endpoint)
    if endpoint.kind == "objects":
        from ml_debugger.uploading.transports.objects import ObjectTransport

        return ObjectTransport(endpoint, policy)
    if endpoint.kind == "tus":
        from ml_debugger.uploading.transports.tus import TusTransport

        return TusTransport(endpoint.address, key, policy)
    from ml_debugger.uploading.transports.collector import CollectorTransport

    return CollectorTransport(endpoint.address, key, policy)
