"""Segments that are written on a local disk and moved to the data directory when they are sealed.

A rank's home names the places where it stages (`staging.json`), so that readers on the same machine see live
segments too. A move is a rename, or between filesystems a copy, a sync and a rename: under its name in the
home a segment is whole. What a crash leaves in staging is sealed and moved when the rank's next tracer opens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_debugger.errors import CorruptDataError, MlDebuggerError
from ml_debugger.store import layout

logger = logging.getLogger("ml_debugger")

_TRASH = "trash-"  # what begins so is ignored by readers, and deleted by the next tracer
_TEMPORARY = f"{_TRASH}move-"
_LOOK_EVERY_S = 1.0
_COPY_BYTES = 8 << 20


class _InterruptedMoveError(Exception):
    """There is no time to finish a copy."""


def staging_directory(staging_dir: Path | None, rank_dir: Path) -> Path | None:
    """Where a rank stages, a place for each home; None without ``TracerConfig.staging_dir``."""
    if staging_dir is None:
        return None
    return Path(os.path.abspath(staging_dir)) / layout.slug(os.path.abspath(rank_dir))


def adopt(rank_dir: Path, own_place: Path | None = None) -> None:
    """Seal what tracers of this machine have left in staging, move it home, and forget their places.

    What lies in ``own_place`` is only sealed: its mover brings it home in the background, since that may
    take long, or fail and succeed later; until then it is read where it is.

    REQUIRES: the caller holds the rank's writer lock.

    Raises:
        StorageError: It cannot be moved.
    """
    entries = layout.staging_entries(rank_dir)
    if not entries:
        return
    host = socket.gethostname()
    here = {entry["directory"] for entry in entries if entry.get("host") == host}
    elsewhere = []
    for entry in entries:
        place = Path(entry["directory"])
        # What lies here without an entry of this machine was left under another name of it.
        is_here = entry.get("host") == host or (entry["directory"] not in here and bool(_staged(place)))
        if not is_here:
            elsewhere.append(entry)
            logger.warning(
                "segments of %s may still lie in %s of machine %s: they move when the rank runs there again",
                rank_dir,
                place,
                entry.get("host"),
            )
        elif not place.is_dir():
            logger.warning("%s is gone, and with it what was staged there of %s", place, rank_dir)
        else:
            with layout.storage_errors(f"move what lies in {place}", "check that data_dir has space"):
                _clean(place)
                _seal_all(rank_dir, place)
                if place != own_place:
                    _move_all(rank_dir, place, threading.Lock(), lambda: None)
                    _remove_empty(place)
    layout.write_staging(rank_dir, elsewhere)


class Mover:
    """Moves the sealed segments of one rank, in a thread of its own; shared by the tracers of a process.

    Attributes:
        lock: Held while a segment changes its place; whoever drops rows holds it, too.
    """

    _movers: dict[Path, Mover] = {}  # noqa: RUF012 -- one a rank and process
    _guard = threading.Lock()

    def __init__(self, rank_dir: Path, place: Path) -> None:
        self.lock = threading.RLock()
        self._rank_dir = rank_dir
        self._place = place
        self._users = 0
        self._pid = os.getpid()
        self._deadline: float | None = None
        self._stopped = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="ml-debugger-mover", daemon=True)

    @classmethod
    def acquire(cls, rank_dir: Path, place: Path) -> Mover:
        """The mover of a rank, which first takes over what an earlier process has left.

        REQUIRES: the caller holds the rank's writer lock.
        """
        with cls._guard:
            mover = cls._movers.get(rank_dir)
            if mover is None or mover._pid != os.getpid():
                _take_place(rank_dir, place)
                mover = cls._movers[rank_dir] = Mover(rank_dir, place)
                mover._thread.start()
            mover._users += 1
            return mover

    def release(self, timeout_s: float) -> None:
        """Let go; the last user's moves what is left, for at most so long, and never raises for that."""
        with self._guard:
            self._users -= 1
            if self._users:
                return
            self._movers.pop(self._rank_dir, None)
        self._deadline = time.monotonic() + timeout_s
        self._stopped.set()
        self._thread.join(timeout_s + _LOOK_EVERY_S)

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY_S):
            self._move()
        self._move()
        self._finish()

    def _move(self) -> None:
        try:
            _move_all(self._rank_dir, self._place, self.lock, self._check_time)
            self._complained = False
        except _InterruptedMoveError:
            pass
        except (OSError, MlDebuggerError) as error:
            if not self._complained:
                logger.warning("moving staged segments to %s: %s; trying on", self._rank_dir, error)
            self._complained = True

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _InterruptedMoveError

    def _finish(self) -> None:
        with self._guard, contextlib.suppress(OSError, MlDebuggerError):
            if self._rank_dir in self._movers:  # a later tracer of this process has taken over
                return
            _remove_empty(self._place)
            if not self._place.exists():
                own = _entry(self._place)
                left = [entry for entry in layout.staging_entries(self._rank_dir) if entry != own]
                layout.write_staging(self._rank_dir, left)
                return
        logger.warning(
            "%s still holds segments of %s: the next tracer of this rank on this machine moves them",
            self._place,
            self._rank_dir,
        )


def _forget_movers() -> None:
    Mover._guard = threading.Lock()
    Mover._movers = {}


os.register_at_fork(after_in_child=_forget_movers)


def _entry(place: Path) -> dict[str, Any]:
    """What `staging.json` says of a place of this machine."""
    return {"directory": str(place), "host": socket.gethostname()}


def _take_place(rank_dir: Path, place: Path) -> None:
    """Make a place that of a rank, after what is there was taken over."""
    own = _entry(place)
    known = [entry["directory"] for entry in layout.staging_entries(rank_dir)]
    if str(place) not in known and _staged(place):
        # Its home was deleted, and a new one may number its segments alike.
        aside = place.with_name(f"{place.name}-{os.urandom(4).hex()}")
        with layout.storage_errors(f"rename {place}", "check that staging_dir is writable"):
            os.rename(place, aside)
        logger.warning(
            "%s holds segments that %s knows nothing of: now they are in %s", place, rank_dir, aside
        )
    adopt(rank_dir, place)
    layout.make_directory(place)
    layout.write_staging(rank_dir, [*layout.staging_entries(rank_dir), own])


def _staged(place: Path) -> list[Path]:
    """Directories of segments in a staging place, in order."""
    return [
        path
        for partition in layout.partitions(place)
        for _, _, path in layout.segment_directories(partition.path)
    ]


def _seal_all(rank_dir: Path, place: Path) -> None:
    """Seal what a process that is gone has left; what a power cut may have torn stays as it is."""
    for path in _staged(place):
        try:
            description = layout.read_json(path / layout.SEGMENT_FILE)
        except CorruptDataError:
            continue
        if description is None:  # died before its first row
            shutil.rmtree(path)
        elif not (path / layout.SEALED_FILE).exists() and not layout.is_torn(description):
            descriptor = os.open(path / layout.DATA_FILE, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            layout.write_json(path / layout.SEALED_FILE, {"format_version": layout.FORMAT_VERSION})
    for path in _staged(place):  # nobody writes here: torn ones go home too, where `recover` finds them
        home = rank_dir / path.parent.name
        layout.make_directory(home)
        if not (path / layout.SEALED_FILE).exists():
            _move(path, home / path.name, threading.Lock(), lambda: None)


def _move_all(
    rank_dir: Path, place: Path, lock: contextlib.AbstractContextManager[object], check: Callable[[], None]
) -> None:
    """Bring home what is sealed; one that cannot be moved keeps no other one back."""
    failure: OSError | None = None
    for path in _staged(place):
        if (path / layout.SEALED_FILE).exists():
            try:
                _move(path, rank_dir / path.parent.name / path.name, lock, check)
            except FileNotFoundError:  # dropped while we looked
                continue
            except OSError as error:
                failure = failure or error
    if failure is not None:
        raise failure


def _move(
    source: Path,
    target: Path,
    lock: contextlib.AbstractContextManager[object],
    check: Callable[[], None],
) -> None:
    """Bring one segment home, unless it is dropped meanwhile."""
    check()
    if target.exists():  # whole, and synced: a copy whose original was not deleted any more
        with lock:
            _forget_moved(source, target)
        return
    if os.stat(source.parent).st_dev == os.stat(target.parent.parent).st_dev:
        with lock, contextlib.suppress(FileNotFoundError):  # dropped
            os.rename(source, target)
            layout.sync_directory(target.parent)
        return
    temporary = target.parent.parent / f"{_TEMPORARY}{os.urandom(8).hex()}"
    try:
        temporary.mkdir(mode=0o700)
        for name in (layout.DATA_FILE, layout.SEGMENT_FILE, layout.SEALED_FILE):
            with contextlib.suppress(FileNotFoundError):
                _copy(source / name, temporary / name, check)
        layout.sync_directory(temporary)
        with lock:
            if not (source.exists() and target.parent.exists()):
                return
            os.rename(temporary, target)
            layout.sync_directory(target.parent)
            gone = source.parent.parent / temporary.name
            os.rename(source, gone)
        shutil.rmtree(gone, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _forget_moved(source: Path, target: Path) -> None:
    """Delete the original of a segment that is home already."""
    sizes = [(path / layout.DATA_FILE).stat().st_size for path in (source, target)]
    if sizes[0] != sizes[1]:
        raise FileExistsError(f"{target} is another segment than {source}")
    gone = source.parent.parent / f"{_TEMPORARY}{os.urandom(8).hex()}"
    os.rename(source, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _copy(source: Path, target: Path, check: Callable[[], None]) -> None:
    """Copy a file and its times, durably; `check` may end it."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with source.open("rb", buffering=0) as old, os.fdopen(descriptor, "wb", buffering=0) as new:
        while os.sendfile(new.fileno(), old.fileno(), None, _COPY_BYTES):
            check()
        os.fsync(new.fileno())
        status = os.fstat(old.fileno())
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _clean(place: Path) -> None:
    """Delete what a process that is gone was deleting."""
    for left in place.glob(f"{_TRASH}*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove_empty(place: Path) -> None:
    """Delete a staging place that holds no segment any more."""
    if _staged(place):
        return
    shutil.rmtree(place)
