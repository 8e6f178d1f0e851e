"""What a collector keeps: finished files in a folder or an object store, unfinished ones in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from ml_debugger.errors import CorruptDataError, InvalidInputError, UploadError
from ml_debugger.store import layout
from ml_debugger.uploading.endpoint import Endpoint, parse_endpoint, shown_endpoint
from ml_debugger.uploading.retry import RetryPolicy
from ml_debugger.uploading.transports import Item, open_transport
from ml_debugger.uploading.transports.folder import FolderTransport
from ml_debugger.uploading.transports.objects import ObjectTransport

_SLUG = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,39}-[0-9a-f]{12}|-[0-9a-f]{12}"
_TRACE = rf"(?:{_SLUG})/(?:{_SLUG})"
_RANK = r"rank-\d{5}"
_TRACE_PATH = re.compile(rf"{_TRACE}\Z")
_DOCUMENT_PATH = re.compile(rf"{_TRACE}/(?:version\.json|{_RANK}/attempts\.json)\Z")
_SLICE_PATH = re.compile(rf"{_TRACE}/{_RANK}/epoch-(?:\d{{1,19}}|none)/([^/]+)\Z")
_STALE_S = 7 * 24 * 3600.0
_USAGE_INTERVAL_S = 10.0
_HASH_STEP_BYTES = 1 << 20
_UPLOAD_ID = re.compile(r"[0-9a-f]{32}\Z")


class ChecksumError(Exception):
    """What arrived is not what was announced."""


def is_trace_path(path: str) -> bool:
    """Whether ``path`` is that of a trace."""
    return _TRACE_PATH.match(path) is not None


def is_document_path(path: str) -> bool:
    """Whether ``path`` is that of a small file of a trace."""
    return _DOCUMENT_PATH.match(path) is not None


def slice_of(path: str) -> layout.SliceName | None:
    """What the name of a slice says; None if ``path`` is none of a slice."""
    match = _SLICE_PATH.match(path)
    return None if match is None else layout.parse_slice_name(match[1])


@dataclass(frozen=True)
class Upload:
    """A slice on its way in.

    Attributes:
        number: Its name at the collector.
        path: Where it goes.
        length_bytes: How long it will be.
        sha256: What it must be.
        key_name: Whose it is.
        is_done: Whether it has arrived, whole and verified.
        counted_as: Which of the files that the quotas of keys count it is, from 1; 0: none.
    """

    number: str
    path: str
    length_bytes: int
    sha256: str
    key_name: str
    is_done: bool = False
    counted_as: int = 0


def parse_storage(place: str | os.PathLike[str]) -> Endpoint:
    """Judge where a collector is to keep its files.

    Raises:
        InvalidInputError: It is neither a folder nor an object store.
    """
    try:
        endpoint = parse_endpoint(os.fspath(place), has_key=False)
    except UploadError as error:
        raise _not_storage(place) from error
    if endpoint.kind not in ("folder", "objects"):
        raise _not_storage(place)
    return endpoint


def _not_storage(place: str | os.PathLike[str]) -> InvalidInputError:
    return InvalidInputError(
        f"storage must be a folder or an object store, got {shown_endpoint(os.fspath(place))!r}",
        "name a folder, or s3://, gs:// or az:// with a bucket and a path",
    )


class Part:
    """What has arrived of an upload, open at its end. What is appended is hashed on the way.

    So a slice that came in one go, or in several to one process, is not read again to be verified.
    """

    def __init__(self, path: Path, running: Running) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._begin = os.fstat(self._descriptor).st_size
        self._running = running

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *details: object) -> None:
        os.close(self._descriptor)

    def append(self, data: bytes | memoryview) -> None:
        """Write all of ``data`` behind what is there.

        Raises:
            OSError: The disk does not take it; a part of it may be there.
        """
        at = os.fstat(self._descriptor).st_size
        with memoryview(data) as view:
            written = 0
            while written < len(view):
                written += os.write(self._descriptor, view[written:])
        if self._running.length_bytes == at:
            self._running.update(data)

    def undo(self) -> None:
        """Take away what was appended since it was opened."""
        os.ftruncate(self._descriptor, self._begin)
        if self._running.length_bytes > self._begin:
            self._running.reset()


class Running:
    """The SHA-256 of the first bytes of an upload."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Of none."""
        self._digest = hashlib.sha256()
        self.length_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take in the bytes that follow."""
        self._digest.update(data)
        self.length_bytes += len(data)

    def of_all(self, file: IO[bytes]) -> str:
        """Hex digest of a file that begins with what was taken in; only the rest is read."""
        file.seek(self.length_bytes)
        while block := file.read(_HASH_STEP_BYTES):
            self.update(block)
        return self._digest.hexdigest()


class Storage:
    """The files of a collector.

    Args:
        place: A folder, or the address of an object store.
        uploads_dir: Folder of what is unfinished; None: ``.uploads`` in the folder, or for an object store in
            ``./mld_collector``.

    Raises:
        InvalidInputError: It is neither.
        StorageError: A folder cannot be made.
    """

    def __init__(self, place: str | os.PathLike[str], uploads_dir: Path | None = None) -> None:
        endpoint = parse_storage(place)
        self.shown = endpoint.address
        transport = open_transport(endpoint, None, RetryPolicy())
        assert isinstance(transport, (FolderTransport, ObjectTransport))
        self.transport: FolderTransport | ObjectTransport = transport
        is_folder = isinstance(self.transport, FolderTransport)
        base = Path(endpoint.address) if is_folder else Path("mld_collector").resolve()
        self.uploads_dir = uploads_dir or base / ".uploads"
        layout.make_directory(self.uploads_dir)
        self._usage_path = self.uploads_dir / "usage.json"
        self._counting = threading.Lock()
        self._usage, self._counted = self._read_usage()
        self._noted, self._noted_at = self._counted, time.monotonic()
        self._uploads: dict[str, Upload] = {}
        self._running: dict[str, Running] = {}
        self._finishing: set[str] = set()  # what of these is not in its part is on its way to its place
        self._beginning = threading.Lock()
        for path in self.uploads_dir.glob("*.upload"):
            with contextlib.suppress(CorruptDataError, TypeError):
                document = layout.read_json(path) or {}
                upload = Upload(**document)
                if not upload.is_done and not self._part(upload).exists():
                    # Killed between giving a slice its place and writing that down, or nothing has arrived.
                    upload = replace(upload, is_done=self.transport.has(upload.path))
                self._uploads[upload.number] = upload
                if upload.counted_as > self._noted:
                    self._count(upload)
        for left in self.uploads_dir.glob("export-*"):  # a download that a dead process was preparing
            shutil.rmtree(left, ignore_errors=True)
        self.sweep()

    # Uploads

    def begin(
        self, path: str, length_bytes: int, sha256: str, key_name: str, busy: Collection[str] = ()
    ) -> Upload:
        """Make room for a slice, or go on with an upload of it that nobody works on; those in ``busy`` are.

        So a client that has lost the answer to a creation, or its ledger, leaves nothing behind and sends
        nothing twice.
        """
        wanted = (path, length_bytes, sha256, key_name)
        with (
            self._beginning
        ):  # a creation whose connection broke may still be at work when the next one comes
            for found in list(self._uploads.values()):
                identity = (found.path, found.length_bytes, found.sha256, found.key_name)
                if identity == wanted and not found.is_done and found.number not in busy and self._has(found):
                    return found
            upload = Upload(secrets.token_hex(16), path, length_bytes, sha256, key_name)
            self._part(upload).touch(0o600)
            self._keep(upload)
            return upload

    def find(self, number: str, key_name: str) -> Upload | None:
        """An upload of a key by its name."""
        upload = self._uploads.get(number) if _UPLOAD_ID.match(number) else None
        return upload if upload is not None and upload.key_name == key_name and self._has(upload) else None

    def offset(self, upload: Upload) -> int:
        """How much has arrived: the file tells, so it is true after any crash."""
        return upload.length_bytes if upload.is_done else self._part(upload).stat().st_size

    def open_part(self, upload: Upload) -> Part:
        """What has arrived, open for appending by one user at a time."""
        return Part(self._part(upload), self._running.setdefault(upload.number, Running()))

    def finish(self, upload: Upload) -> None:
        """Verify an upload that has all its bytes, and give it its place.

        Raises:
            ChecksumError: Its SHA-256 is another one; it is forgotten.
            UploadError: An object store does not take it.
        """
        self._finishing.add(upload.number)
        try:
            self._finish(upload)
        finally:
            self._finishing.discard(upload.number)

    def _finish(self, upload: Upload) -> None:
        part = self._part(upload)
        is_new = not self.transport.has(upload.path)
        with open(part, "rb") as file:
            if self._running.pop(upload.number, Running()).of_all(file) != upload.sha256:
                self.forget(upload)
                raise ChecksumError(f"{upload.path} arrived with another SHA-256")
            if isinstance(self.transport, FolderTransport):
                self.transport.adopt(file, part, upload.path)
            else:
                self.transport.send(_item(upload, file))
                part.unlink()
        # Kept for a while: a client whose answer was lost asks where it stands. It counts from now on, even
        # if the disk has no room to note that.
        upload = replace(upload, is_done=True)
        self._uploads[upload.number] = upload
        if is_new:
            upload = self._uploads[upload.number] = self._count(upload)
        self._keep(upload)
        if time.monotonic() - self._noted_at > _USAGE_INTERVAL_S:
            self._note_usage()

    def forget(self, upload: Upload) -> None:
        """Drop what has arrived of an upload."""
        if upload.counted_as > self._noted:
            self._note_usage()
        self._uploads.pop(upload.number, None)
        self._running.pop(upload.number, None)
        for path in (self._part(upload), self._record(upload)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def used_bytes(self, key_name: str, but: str = "") -> int:
        """What a key has left here, and what it is about to leave, ``but`` for the file of that path."""
        coming = sum(
            upload.length_bytes
            for upload in list(self._uploads.values())
            if upload.key_name == key_name and not upload.is_done and upload.path != but
        )
        return self._usage.get(key_name, 0) + coming

    def free_bytes(self) -> int:
        """Room on the disk that takes uploads; makes their folder anew where somebody has cleared it."""
        layout.make_directory(self.uploads_dir)
        status = os.statvfs(self.uploads_dir)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Write down what need not be found again."""
        self._note_usage()

    def sweep(self) -> None:
        """Forget uploads that nothing has happened to for a week."""
        self._note_usage()
        limit = time.time() - _STALE_S
        for upload in list(self._uploads.values()):
            path = self._record(upload) if upload.is_done else self._part(upload)
            try:
                is_stale = path.stat().st_mtime < limit
            except FileNotFoundError:
                is_stale = True
            if is_stale:
                self.forget(upload)
        for path in self.uploads_dir.glob(
            "*.part"
        ):  # of a process that was killed before it wrote down whose
            with contextlib.suppress(FileNotFoundError):
                if path.stem not in self._uploads and path.stat().st_mtime < limit:
                    path.unlink()

    def _count(self, upload: Upload) -> Upload:
        """Count a file for its key, as the next one unless it has its number already."""
        with self._counting:
            number = upload.counted_as or self._counted + 1
            self._usage[upload.key_name] = self._usage.get(upload.key_name, 0) + upload.length_bytes
            self._counted = max(self._counted, number)
        return replace(upload, counted_as=number)

    def _note_usage(self) -> None:
        """Write down, durably, what keys have left here.

        Not for each slice, which would cost two more fsyncs: a collector that was killed finds those that
        came since in the records of their uploads, which tell how they were counted.
        """
        with self._counting:
            if self._noted != self._counted:
                document = {"format_version": 1, "bytes": self._usage, "counted": self._counted}
                layout.write_json(self._usage_path, document)
            self._noted, self._noted_at = self._counted, time.monotonic()

    def _keep(self, upload: Upload) -> None:
        # Not durable: after a power cut its client begins anew, and what has its place is found there.
        layout.write_json(self._record(upload), asdict(upload), durable=False)
        self._uploads[upload.number] = upload

    def _has(self, upload: Upload) -> bool:
        """False if what had arrived of an upload was deleted under us: it is forgotten then."""
        if upload.is_done or self._part(upload).exists() or upload.number in self._finishing:
            return True
        found = self._uploads.get(upload.number)
        if found is not None and found.is_done:  # since we looked
            return True
        self.forget(upload)
        return False

    def _part(self, upload: Upload) -> Path:
        return self.uploads_dir / f"{upload.number}.part"

    def _record(self, upload: Upload) -> Path:
        return self.uploads_dir / f"{upload.number}.upload"

    def _read_usage(self) -> tuple[dict[str, int], int]:
        try:
            document: dict[str, Any] = layout.read_json(self._usage_path) or {}
            usage = {str(name): int(length) for name, length in document.get("bytes", {}).items()}
            return usage, int(document.get("counted", 0))
        except (CorruptDataError, ValueError, TypeError, AttributeError, json.JSONDecodeError):
            return {}, 0


def _item(upload: Upload, file: IO[bytes]) -> Item:
    return Item(
        upload.path, file, upload.length_bytes, upload.sha256, None, lambda url: None, lambda length: None
    )
