"""A folder as endpoint: copy, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from ml_debugger.errors import StorageError, UploadError
from ml_debugger.store import layout
from ml_debugger.uploading.endpoint import Endpoint, folder_of
from ml_debugger.uploading.transports import Item

INCOMING = ".incoming"
_STEP_BYTES = 1 << 20


class FolderTransport:
    """Writes into a directory, which may be on any filesystem; see `Transport`."""

    keeps_documents = True

    def __init__(self, endpoint: Endpoint) -> None:
        self.root = folder_of(endpoint)

    def held(self, trace: str, urls: Mapping[str, str]) -> dict[str, int]:
        """Length by path of every file of a trace."""
        return {path: length for path, length, _ in self.listing(trace)}

    def listing(self, prefix: str = "") -> list[tuple[str, int, datetime]]:
        """(path, length, time of the last change) of every file below ``prefix``."""
        found = []
        with self._errors("list", prefix):
            for directory, folders, names in os.walk(self.root / prefix):
                folders[:] = [folder for folder in folders if not folder.startswith(".")]
                for path in (Path(directory) / name for name in names):
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        modified = datetime.fromtimestamp(status.st_mtime, timezone.utc)
                        found.append((path.relative_to(self.root).as_posix(), status.st_size, modified))
        return found

    def has(self, path: str) -> bool:
        """Whether a file is there."""
        return (self.root / path).is_file()

    def read(self, path: str) -> bytes | None:
        """A document's bytes."""
        try:
            with self._errors("read", path):
                return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """Replace a document if it still is ``old``."""
        with self._errors("write", path), self._lock():
            if self.read(path) != old:
                return False
            with self._incoming() as (file, temporary):
                file.write(new)
                self._place(file, temporary, path)
        return True

    def send(self, item: Item) -> None:
        """Copy a file; a cut copy is never seen under its name."""
        digest = hashlib.sha256()
        with self._errors("write", item.path), self._incoming() as (file, temporary):
            item.file.seek(0)
            while block := item.file.read(_STEP_BYTES):
                digest.update(block)
                file.write(block)
                item.on_bytes(len(block))
            if digest.hexdigest() != item.sha256:
                raise UploadError(f"{item.path} changed while it was sent", "upload again")
            self._place(file, temporary, item.path)

    def adopt(self, file: IO[bytes], source: Path, path: str) -> None:
        """Give a finished file of the same filesystem its place."""
        with self._errors("write", path):
            self._place(file, source, path)

    def discard(self, url: str) -> None:
        """Nothing is left of a copy that was cut: its file goes with the process, or with the next one."""

    def close(self) -> None:
        """Nothing is open."""

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[tuple[IO[bytes], Path]]:
        """A new file, gone afterwards unless it was given its place. What dead processes left goes too."""
        directory = self.root / INCOMING
        layout.make_directory(directory)
        _sweep(directory)
        path = directory / f"{secrets.token_hex(8)}.tmp"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
                yield file, path
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _place(self, file: IO[bytes], temporary: Path, path: str) -> None:
        target = self.root / path
        file.flush()
        os.fsync(file.fileno())
        layout.make_directory(target.parent)
        os.replace(temporary, target)
        layout.sync_directory(target.parent)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Documents are replaced by one process at a time."""
        directory = self.root / INCOMING
        layout.make_directory(directory)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _errors(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, UploadError):
            raise
        except StorageError as error:
            raise UploadError(f"cannot {action} {self.root / path}: {error.message}", error.hint) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise UploadError(
                f"cannot {action} {self.root / path}: {error.strerror or error}",
                "free space there" if full else "check that the folder exists and is writable",
            ) from error


def _sweep(directory: Path) -> None:
    """Remove copies whose process has died: nobody holds their lock."""
    for path in directory.glob("*.tmp"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
