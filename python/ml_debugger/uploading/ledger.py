"""The upload ledger: what one endpoint has been sent of one rank.

It lies beside the rank's rows, ``rank-00000/uploads/<endpoint>/``: one small JSON file a slice, written
(temporary file, fsync, rename) before the slice is sent and again when the endpoint has it. So a process
that dies at any moment is followed by one that knows which calls were in which slice, cuts the same bytes,
and goes on where the other stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ml_debugger.errors import CorruptDataError, StorageError, UploadError
from ml_debugger.store import layout
from ml_debugger.trace.dtypes import Array

_LOCK_FILE = "lock"
_LOCK_POLL_S = 0.05
_TOUCH_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Entry:
    """One slice.

    Attributes:
        epoch: Its epoch; -1: rows without one.
        attempt: Attempt that recorded it, as numbered here.
        sequence: Segment that holds its headers.
        name: Its file name at the endpoint.
        length_bytes: Its length.
        runs: Keys of its headers: (first, last, step).
        sent: Whether the endpoint has confirmed it.
        url: Where a tus server takes it.
    """

    epoch: int
    attempt: int
    sequence: int
    name: str
    length_bytes: int
    runs: tuple[tuple[int, int, int], ...]
    sent: bool = False
    url: str | None = None

    @property
    def keys(self) -> Array:
        """Keys of its headers, rising."""
        parts = [np.arange(first, last + 1, step, dtype=np.uint64) for first, last, step in self.runs]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def confirmed(self) -> Entry:
        """The same, sent."""
        return replace(self, sent=True)

    def at(self, url: str | None) -> Entry:
        """The same, going to ``url``."""
        return replace(self, url=url)


def runs_of(keys: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Rising keys as arithmetic runs, so that calls of alternating epochs take little room too."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    while start < len(keys):
        stop = start + 1
        step = keys[stop] - keys[start] if stop < len(keys) else 1
        while stop < len(keys) and keys[stop] - keys[stop - 1] == step:
            stop += 1
        runs.append((keys[start], keys[stop - 1], step))
        start = stop
    return tuple(runs)


class Ledger:
    """What ``endpoint`` has of a rank.

    Args:
        rank_dir: Directory of the rank.
        identity: Short name of the endpoint.
    """

    def __init__(self, rank_dir: Path, identity: str) -> None:
        self.directory = rank_dir / "uploads" / identity
        self._rank_dir = rank_dir
        self._touched_at = 0.0

    @contextlib.contextmanager
    def locked(self, *, timeout_s: float, on_progress: Callable[[int], None]) -> Iterator[bool]:
        """Be the only uploader of the rank to this endpoint.

        Gives False if another one is at it and ``timeout_s`` is 0.

        Args:
            timeout_s: How long to wait for another one that makes no progress.
            on_progress: Called, with 0, when it makes some.

        Raises:
            UploadError: Another one holds the lock and made no progress for ``timeout_s``.
            StorageError: The directory cannot be written.
        """
        layout.make_directory(self.directory)
        path = self.directory / _LOCK_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", "check its permissions") from error
        try:
            has_lock = self._lock(descriptor, timeout_s, on_progress)
            yield has_lock
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int, timeout_s: float, on_progress: Callable[[int], None]) -> bool:
        seen, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                pass
            if timeout_s == 0:
                return False
            touched = os.fstat(descriptor).st_mtime_ns
            if touched != seen:
                seen, since = touched, time.monotonic()
                on_progress(0)
            elif time.monotonic() - since > timeout_s:
                raise UploadError(
                    f"another process uploads this trace and made no progress for {timeout_s:g} s",
                    f"end it; it holds {self.directory / _LOCK_FILE}",
                )
            time.sleep(_LOCK_POLL_S)

    def touch(self) -> None:
        """Tell those who wait for the lock that there is progress."""
        now = time.monotonic()
        if now - self._touched_at >= _TOUCH_INTERVAL_S:
            self._touched_at = now
            with contextlib.suppress(OSError):
                os.utime(self.directory / _LOCK_FILE)

    def entries(self) -> list[Entry]:
        """Every slice, by epoch and name; those of epochs that are gone here are forgotten."""
        present = {partition.path.name for partition in layout.partitions(self._rank_dir)}
        found = []
        for partition in layout.partitions(self.directory):
            if partition.path.name not in present:
                # Keys are never given out twice: an epoch that is recorded anew has others.
                shutil.rmtree(partition.path, ignore_errors=True)
                continue
            for path in sorted(partition.path.glob("a*.json")):
                with contextlib.suppress(CorruptDataError):  # then it is sent once more
                    found.append(_decode(partition.epoch, path))
        return found

    def put(self, entry: Entry) -> None:
        """Record a slice, or what has become of it.

        Without an fsync, which would meet those of the training: what a power cut takes from a ledger costs
        the next upload a question to the endpoint, or one more trip of a slice.
        """
        layout.make_directory(self._path(entry).parent)
        layout.write_json(
            self._path(entry),
            {
                "format_version": layout.FORMAT_VERSION,
                "attempt": entry.attempt,
                "sequence": entry.sequence,
                "name": entry.name,
                "bytes": entry.length_bytes,
                "calls": [list(run) for run in entry.runs],
                "sent": entry.sent,
                "url": entry.url,
            },
            durable=False,
        )

    def remove(self, entry: Entry) -> None:
        """Forget a slice."""
        with contextlib.suppress(FileNotFoundError):
            self._path(entry).unlink()

    def documents(self) -> dict[str, str]:
        """SHA-256 by path of the small files that were sent to an endpoint that cannot be asked for them."""
        try:
            document = layout.read_json(self.directory / "documents.json")
        except CorruptDataError:
            document = None
        return {} if document is None else dict(document.get("sha256", {}))

    def put_documents(self, sha256: dict[str, str]) -> None:
        """Record what `documents` gives."""
        layout.write_json(
            self.directory / "documents.json", {"format_version": layout.FORMAT_VERSION, "sha256": sha256}
        )

    def _path(self, entry: Entry) -> Path:
        return layout.partition_directory(self.directory, entry.epoch) / f"{entry.name}.json"


def _decode(epoch: int, path: Path) -> Entry:
    document: dict[str, Any] | None = layout.read_json(path)
    try:
        assert document is not None
        name = str(document["name"])
        if layout.parse_slice_name(name) is None or path.name != f"{name}.json":
            raise ValueError(name)
        return Entry(
            epoch,
            int(document["attempt"]),
            int(document["sequence"]),
            name,
            int(document["bytes"]),
            tuple((int(first), int(last), max(1, int(step))) for first, last, step in document["calls"]),
            bool(document["sent"]),
            document["url"] if isinstance(document["url"], str) else None,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(f"{path} is no entry of an upload ledger", "remove it") from error
