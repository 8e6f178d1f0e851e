"""`TrainingTracer`: saving, uploading, exporting and dropping what a training run has recorded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ml_debugger.config import TracerConfig
from ml_debugger.errors import (
    RingOverflowError,
    StorageError,
    TraceStallError,
)
from ml_debugger.terminal import stderr_is_terminal
from ml_debugger.tracer.inputs import check_flag, check_seconds, require_epoch, select_epoch
from ml_debugger.tracer.session import TraceSession
from ml_debugger.tracer.torch_tracer import TorchTracer
from ml_debugger.uploading import UploadReport
from ml_debugger.uploading.client import UploadClient

if TYPE_CHECKING:
    from ml_debugger.trace.catalog import RankSummary

__all__ = ["TrainingTracer"]

_LINE_CHARACTERS = 40  # of progress: a shorter line covers the longer one before it


class TrainingTracer(TorchTracer):
    """A tracer for training runs.

    Args:
        model: See `TorchTracer`, like all arguments that are not listed here.
        model_name: See `TorchTracer`.
        version_name: See `TorchTracer`.
        target_layers: See `TorchTracer`.
        additional_fields: See `TorchTracer`.
        additional_label_fields: See `TorchTracer`.
        auto_sync: Upload committed data in the background; needs an endpoint.
        force_table_recreate: Start from empty tables, as `drop_version_data` does.
        api_endpoint: Where `upload` goes: a URL, or a folder. Default ``MLD_API_ENDPOINT``.
        api_key: Key that it shows. Default ``MLD_API_KEY``. Never printed, logged or stored.
        config: See `TorchTracer`.

    Raises:
        InvalidInputError: ``auto_sync`` without an endpoint; or as `TorchTracer`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_name: str,
        version_name: str,
        target_layers: Mapping[str, str] | None = None,
        additional_fields: list[dict[str, Any]] | None = None,
        additional_label_fields: list[dict[str, Any]] | None = None,
        auto_sync: bool = False,
        force_table_recreate: bool = False,
        api_endpoint: str | os.PathLike[str] | None = None,
        api_key: str | None = None,
        *,
        config: TracerConfig | None = None,
    ) -> None:
        check_flag(auto_sync, "auto_sync")
        self._uploads = UploadClient(api_endpoint, api_key)
        if auto_sync:
            self._uploads.check_auto_sync()
        super().__init__(
            model,
            model_name,
            version_name,
            target_layers,
            additional_fields,
            additional_label_fields,
            force_table_recreate,
            config=config,
        )
        if auto_sync and self._session is not None:
            self._uploads.begin_auto_sync(self._session)

    def wait_for_save(self, n_epoch: int | None = None, interval: float = 3, *, force: bool = False) -> None:
        """Return when every row (of that epoch) is committed and, with an endpoint, confirmed by it.

        Blocks as `flush` does. Looks, and on a terminal shows how much is left, every ``interval`` seconds.

        Args:
            n_epoch: The epoch that must be saved; None = all, -1 = rows without one.
            interval: Seconds between two looks.
            force: With an endpoint: send everything again.

        Raises:
            RingOverflowError: Rows were discarded since the last such call; raised once.
            StorageError: Rows failed since the last such call; raised once.
            UploadError: The endpoint does not confirm.
        """
        select_epoch(n_epoch)
        interval = check_seconds(interval, "interval")
        check_flag(force, "force")
        session = self._session
        if session is not None:
            self._wait_for_commit(session, max(interval, 0.001))
        if self._uploads.has_endpoint:
            self.upload(n_epoch, force=force)
        if session is not None:
            _raise_losses(*session.report_losses())

    def _wait_for_commit(self, session: TraceSession, interval_s: float) -> None:
        if session.closed or not stderr_is_terminal():
            session.flush(None)
            return
        left, deadline = -1, 0.0
        while True:
            try:
                session.flush(interval_s)
                break
            except TraceStallError:
                now = int(session.counters()["rows_in_flight"])
                if now != left:
                    left, deadline = now, time.monotonic() + self._config.stall_timeout_s
                elif time.monotonic() > deadline:
                    raise
                sys.stderr.write(f"\rsaving: {left} rows left".ljust(_LINE_CHARACTERS))
                sys.stderr.flush()
        if left >= 0:
            sys.stderr.write("\rsaving: done".ljust(_LINE_CHARACTERS) + "\n")

    def upload(self, n_epoch: int | None = None, *, force: bool = False) -> UploadReport:
        """Send what the endpoint does not hold, of every rank that records into this directory.

        Flushes first, works after ``close()``. Blocks; the work is done by a process of its own. The
        endpoint is asked what it holds, so that a second call sends nothing, and one after an interruption
        sends the rest.

        Args:
            n_epoch: None = all, -1 = rows without an epoch. Of an epoch that is not there nothing is sent.
            force: Send everything again.

        Raises:
            UploadError: There is no endpoint, or it failed; what has arrived is not sent again.
            AuthenticationError: The endpoint refused the key.
        """
        epoch = select_epoch(n_epoch)
        check_flag(force, "force")
        self._uploads.require_endpoint()
        if self._session is None:
            return UploadReport(0, 0, 0, 0.0)
        self._session.flush(None)
        return self._uploads.upload(self._session, epoch, force=force)

    def export(
        self,
        output_path: str | os.PathLike[str] | None = None,
        n_epoch: int | None = None,
        *,
        format: Literal["npy", "parquet"] = "npy",
        dedupe: bool = True,
        progress: bool | Callable[..., Any] | None = None,
    ) -> Path | None:
        """Write the trace (or one epoch of it) as a ZIP; flushes first, works after ``close()``.

        Not a collective call: on the primary rank (0) it asks the other ranks that record here for what
        they have handed over, and waits until that is committed, at most ``stall_timeout_s``. A rank that
        has ended or is late, or whose rows are not here, is named in a warning; the rest is exported.

        Args:
            output_path: File or directory; a name without ``.zip`` is a directory, which gets
                ``<model_name>_<version_name>[_epoch<n>].zip``. Default: the current directory.
            n_epoch: None = all, -1 = rows without an epoch.
            format: ``"npy"`` opens with plain ``numpy.load``, ``"parquet"`` with pandas, polars and DuckDB;
                to write it needs pyarrow.
            dedupe: Keep the newest row of each ``(dataset_type, n_epoch, input_id)``; False keeps every row.
            progress: Whether to show progress; None shows it on a terminal.

        Returns:
            The path of the archive; None on a rank that is not the primary one, and when nothing is recorded
            here at all (``mode="disabled"``).

        Raises:
            StorageError: The archive cannot be written.
        """
        epoch = select_epoch(n_epoch)
        session = self._session
        if session is None:
            return None
        session.flush(None)
        if session.rank != 0:
            return None
        from ml_debugger.exporting import export_trace
        from ml_debugger.training.gathering import Gathering

        gathering = Gathering(session.directory, session.rank, session.job)
        gathering.settle(self._config.stall_timeout_s)
        ranks: list[RankSummary] = []
        path = export_trace(
            session.directory,
            output_path,
            n_epoch=epoch,
            format=format,
            dedupe=dedupe,
            progress=progress,
            on_ranks=ranks.extend,
        )
        gathering.warn_of_missing(ranks)
        return path

    def drop_epoch_data(self, n_epoch: int, *, attempt: int | None = None) -> dict[str, int]:
        """Delete an epoch's rows of this rank; flushes first.

        When it returns the epoch is gone for every reader, and its disk space is given back.

        Args:
            n_epoch: The epoch.
            attempt: Delete only what this attempt recorded.

        Returns:
            Deleted rows by table: ``{"extracted_feature": N, "ground_truth": M}``, without the second if the
            trace has no ground truth. Zeros if the epoch is not there.

        Raises:
            InvalidTypeError: ``n_epoch`` is not an int.
            InvalidInputError: It is negative.
            TracerClosedError: After ``close()``.
        """
        epoch = require_epoch(n_epoch)
        only = None if attempt is None else require_epoch(attempt, parameter="attempt")
        self._require_open("drop_epoch_data")
        self.flush()
        if self._session is None:
            return {"extracted_feature": 0}
        return self._recorder.drop_epoch(epoch, only)

    def drop_version_data(self) -> None:
        """Delete all rows of this rank in this (model, version); flushes first. Recording goes on.

        Raises:
            TracerClosedError: After ``close()``.
        """
        self._require_open("drop_version_data")
        self.flush()
        if self._session is not None:
            self._recorder.drop_all()


def _raise_losses(discarded: int, failed: int) -> None:
    if failed:
        raise StorageError(
            f"{failed} rows were lost to the storage and {discarded} discarded since the last wait_for_save",
            "look at the disk that holds data_dir; stats() has the counts",
        )
    if discarded:
        raise RingOverflowError(
            f"{discarded} rows were discarded since the last wait_for_save (stats().discarded_by_cause)",
            'raise TracerConfig.ring_bytes, or use overflow="block"',
        )
