"""One attempt at recording a trace: version file, store and recorder. Knows nothing of models."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgpack

from ml_debugger import _core
from ml_debugger.config import TracerConfig
from ml_debugger.errors import (
    ArchitectureMismatchError,
    InvalidInputError,
    MlDebuggerError,
    NotFoundError,
    StorageError,
    TraceInUseError,
    TraceStallError,
)
from ml_debugger.job import current_job
from ml_debugger.store import job_ranks, layout, staging
from ml_debugger.tracer import lifecycle
from ml_debugger.tracer.bounded import BoundedWork

logger = logging.getLogger("ml_debugger")

_opening = threading.Lock()


def _renew_lock() -> None:
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)

_Opened: TypeAlias = "tuple[_core.Store, _core.Recorder, staging.Mover | None]"


class TraceSession:
    """The recording side of one tracer.

    Args:
        config: How to record.
        rank: Under which rank, >= 0.
        info: What is to be recorded.
        recreate: Start from empty tables, whatever was recorded before.

    Raises:
        ArchitectureMismatchError: The trace belongs to another architecture.
        InvalidInputError: It has other aliases or fields.
        TraceInUseError: Another process writes to it under this rank, or another job does.
        StorageError: The directory cannot be written.
        TraceStallError: The disk did not answer within ``stall_timeout_s``.
    """

    def __init__(self, config: TracerConfig, rank: int, info: layout.VersionInfo, *, recreate: bool) -> None:
        self.config = config
        self.info = info
        data_dir = Path(os.path.abspath(config.data_dir))
        self.directory = layout.trace_directory(data_dir, info.model_name, info.version_name)
        self.rank_directory = layout.rank_directory(self.directory, rank)
        self._rank = rank
        self.job = current_job(is_default_rank=config.has_default_rank)
        self._pid = os.getpid()
        self._closed = False
        # Re-entrant: a signal handler that closes may run inside of a close that waits.
        self._close_lock = threading.RLock()
        self._reported = (0, 0)
        # Called once, when all is closed.
        self.on_closed: Callable[[], None] | None = None
        opening = BoundedWork(f"opening {self._described}", lambda: self._open(recreate), _give_back)
        self._store, self.recorder, self._mover = opening.run(config.stall_timeout_s)
        lifecycle.register(self)

    def _open(self, recreate: bool) -> _Opened:
        """All that a tracer does to files on behalf of its caller."""
        opening = _opening  # a fork renews it
        # Attempt numbers and version files of this process's tracers must not interleave.
        if not opening.acquire(timeout=self.config.stall_timeout_s):
            raise TraceStallError(
                f"opening {self._described} waited for a tracer of this process whose disk does not answer",
                "look at that disk",
            )
        try:
            return self._open_alone(recreate)
        finally:
            opening.release()

    def _open_alone(self, recreate: bool) -> _Opened:
        if recreate:
            self._check_companions()
        else:
            self._check_recorded()
        layout.make_directory(self.rank_directory)
        config = self.config
        staged = staging.staging_directory(config.staging_dir, self.rank_directory)
        mover: staging.Mover | None = None
        store = _core.Store(
            str(self.rank_directory),
            rank=self._rank,
            durability=config.durability,
            max_bytes=config.max_bytes,
            owner=job_ranks.owner_text(self.job),
            staging="" if staged is None else str(staged),
        )
        try:
            # The lock is held and says whose it is: of two jobs that begin at once, one sees the other.
            job_ranks.refuse_other_jobs(self.directory, self._rank, self.job)
            if staged is not None:
                mover = staging.Mover.acquire(self.rank_directory, staged)
            else:
                staging.adopt(self.rank_directory)
            if recreate:  # first, so that a crash in between leaves no rows under another model's name
                store.drop_all(timeout_s=config.stall_timeout_s)
            recorded = layout.write_version(self.directory, self.info, replace=recreate)
            if not recreate:
                check_same_trace(recorded, self.info)
            recorder = store.recorder(
                layout.register_attempt(self.rank_directory, self.job),
                overflow=config.overflow,
                on_error=config.on_error,
                ring_bytes=config.ring_bytes,
                commit_bytes=config.commit_bytes,
                commit_interval_s=config.commit_interval_s,
                stall_timeout_s=config.stall_timeout_s,
                device_ring_bytes=config.device_ring_bytes,
            )
        except BaseException:
            if mover is not None:
                mover.release(0.0)
            store.close()
            raise
        return store, recorder, mover

    def _check_recorded(self) -> None:
        """Judge what is there before anything is made."""
        try:
            recorded = layout.read_version(self.directory)
        except NotFoundError:
            return
        check_same_trace(recorded, self.info)

    def _check_companions(self) -> None:
        for other in lifecycle.open_sessions():
            if isinstance(other, TraceSession) and other.directory == self.directory and not other._closed:
                check_same_trace(other.info, self.info)

    # State

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def _described(self) -> str:
        return f"the trace {self.info.model_name!r} / {self.info.version_name!r}"

    @property
    def rank(self) -> int:
        """Under which rank it records."""
        return self._rank

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy of its parent's session."""
        return self._pid != os.getpid()

    def counters(self) -> dict[str, Any]:
        """The fields of `TracerStats`, by name."""
        return self.recorder.counters()

    def flush(self, timeout_s: float | None) -> None:
        """Return when all rows handed over are committed; silent about failures under ``on_error="warn"``."""
        if self._closed or self.inherited:
            return
        try:
            self.recorder.flush(timeout_s)
        except StorageError:
            if self.config.on_error == "raise":
                raise

    def report_losses(self) -> tuple[int, int]:
        """(discarded, failed) rows since the last call of this."""
        counters = self.counters()
        now = int(counters["rows_discarded"]), int(counters["rows_failed"])
        before, self._reported = self._reported, now
        return now[0] - before[0], now[1] - before[1]

    # Dropping

    def drop_epoch(self, epoch: int, attempt: int | None) -> dict[str, int]:
        """Delete an epoch of this rank (or one attempt of it); rows deleted by table."""
        self._require_own()
        with self._nothing_moves():
            rows, labels = self._store.drop_epoch(
                epoch, attempt=attempt, timeout_s=self.config.stall_timeout_s
            )
        dropped = {"extracted_feature": rows}
        if labels or self._has_ground_truth():
            dropped["ground_truth"] = labels
        return dropped

    def drop_all(self) -> None:
        """Delete every epoch of this rank."""
        self._require_own()
        with self._nothing_moves():
            self._store.drop_all(timeout_s=self.config.stall_timeout_s)

    def _nothing_moves(self) -> contextlib.AbstractContextManager[Any]:
        """While this is held, no staged segment appears under its final name."""
        return contextlib.nullcontext() if self._mover is None else self._mover.lock

    def epochs(self) -> list[int]:
        """Epochs that this rank has on disk, -1 for rows without one."""
        return [partition.epoch for partition in layout.partitions(self.rank_directory)]

    def _require_own(self) -> None:
        if self.inherited:
            raise TraceInUseError(
                "this tracer was inherited by a fork; its parent writes the trace", "drop it there"
            )

    def _has_ground_truth(self) -> bool:
        for _, rank_dir in layout.rank_directories(self.directory):
            for partition in layout.partitions(rank_dir):
                if any(
                    _ground_truth_rows(segment)
                    for segment in layout.segments(partition.path)
                    if segment.usable
                ):
                    return True
        return False

    # The end

    def close(self) -> None:
        """Flush, stop, let go. Idempotent.

        Raises:
            StorageError: The storage failed and ``on_error="raise"``.
            TraceStallError: ``close_timeout_s`` passed; the rows in flight are lost if the process ends now.
        """
        if self.inherited:  # the lock may be held by a thread that does not exist here
            self._closed = True
            return
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            deadline = time.monotonic() + self.config.close_timeout_s
            try:
                self._finish()
            except MlDebuggerError:
                raise
            except BaseException:
                # A signal ended the wait. Nothing is lost yet: the next close goes on, at the latest at exit.
                self._closed = False
                raise
            finally:
                if self._closed:
                    lifecycle.unregister(self)
                    if self._mover is not None:
                        self._mover.release(max(0.0, deadline - time.monotonic()))
                    self._store.close()
                    self._log_losses()
                    if self.on_closed is not None:
                        self.on_closed()

    def _finish(self) -> None:
        timeout_s = self.config.close_timeout_s
        try:
            finished = self.recorder.close(timeout_s)
            self.recorder.raise_failure()
        except StorageError as error:
            if self.config.on_error == "raise":
                raise
            logger.error("closing %s: %s", self._described, error)
            return
        if not finished:
            raise TraceStallError(
                f"the writer did not finish within close_timeout_s={timeout_s} s: "
                f"{self.counters()['rows_in_flight']} rows are not committed",
                "look at the disk, or raise TracerConfig.close_timeout_s",
            )

    def close_quietly(self) -> None:
        """Close at the end of the process or of the tracer's life: log instead of raising."""
        try:
            self.close()
        except MlDebuggerError as error:
            logger.error("closing %s: %s", self._described, error)

    def _log_losses(self) -> None:
        counters = self.counters()
        lost = {name: counters[f"rows_{name}"] for name in ("discarded", "failed", "in_flight")}
        if any(lost.values()):
            logger.warning(
                "%s: of %d rows %d were committed, %d discarded, %d failed, %d left in flight",
                self._described,
                counters["rows_submitted"],
                counters["rows_committed"],
                *lost.values(),
            )


def check_same_trace(recorded: layout.VersionInfo, wanted: layout.VersionInfo) -> None:
    """Refuse to mix what is recorded with something else.

    Raises:
        ArchitectureMismatchError: Another fingerprint.
        InvalidInputError: Other aliases or fields.
    """
    where = f"the trace {wanted.model_name!r} / {wanted.version_name!r}"
    hint = "use another version_name, or force_table_recreate=True to start from empty tables"
    if recorded.fingerprint != wanted.fingerprint:
        raise ArchitectureMismatchError(
            f"{where} was recorded with another architecture: fingerprint {recorded.fingerprint[:12]}, "
            f"this model has {wanted.fingerprint[:12]}",
            hint,
        )
    for name in ("aliases", "additional_fields", "additional_label_fields"):
        there, here = getattr(recorded, name), getattr(wanted, name)
        if name != "aliases":
            there, here = ({entry["name"]: entry for entry in entries} for entries in (there, here))
        if there != here:
            raise InvalidInputError(
                f"{where} has the {name.replace('_', ' ')} {there}, this tracer has {here}", hint
            )


def _give_back(opened: _Opened) -> None:
    """What was opened when its tracer had given up already."""
    store, recorder, mover = opened
    recorder.close(0.0)
    if mover is not None:
        mover.release(0.0)
    store.close()


def _ground_truth_rows(segment: layout.SegmentEntry) -> int:
    name = layout.parse_slice_name(segment.path.name)
    if name is not None:  # brought by an upload: no LMDB environment
        return name.ground_truth_rows
    try:
        handle = _core.Segment(str(segment.path), sealed=segment.sealed)
    except NotFoundError:
        return 0
    try:
        meta = handle.meta()
        return int(msgpack.unpackb(meta)["ground_truth_rows"]) if meta else 0
    finally:
        handle.close()
