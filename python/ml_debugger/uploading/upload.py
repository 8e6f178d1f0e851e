"""`upload_trace`: what `ml-debugger upload` does, and what a tracer's uploader does in its own process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from ml_debugger.errors import MlDebuggerError, UploadError
from ml_debugger.store import layout
from ml_debugger.trace.trace import check_epoch
from ml_debugger.uploading.endpoint import Endpoint, parse_endpoint
from ml_debugger.uploading.progress import ProgressCallback, UploadProgress
from ml_debugger.uploading.rank_upload import RankUpload
from ml_debugger.uploading.report import UploadReport
from ml_debugger.uploading.retry import RetryPolicy
from ml_debugger.uploading.transports import Transport, open_transport


def upload_trace(
    model_name: str,
    version_name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    endpoint: str | os.PathLike[str] | None = None,
    api_key: str | None = None,
    n_epoch: int | None = None,
    force: bool = False,
    progress: bool | ProgressCallback | None = None,
    stall_timeout_s: float = 300.0,
) -> UploadReport:
    """Send what an endpoint does not hold of a trace, all of its ranks; also while a tracer writes to it.

    Blocks, in the calling process. Interrupted at any moment, it goes on where it stopped when it is called
    again.

    Args:
        model_name: As given to the tracer.
        version_name: As given to the tracer.
        data_dir: Where traces live; None: ``MLD_DATA_DIR``, else ``./mld_data``.
        endpoint: Where to; None: ``MLD_API_ENDPOINT``.
        api_key: The key to show; None: ``MLD_API_KEY``.
        n_epoch: The epoch; -1: rows without one; None: all. Of one that is not there nothing is sent.
        force: Send again what the endpoint holds already.
        progress: True or False; None: on a terminal only; or a callable that takes the bytes sent so far.
        stall_timeout_s: Longest time without progress.

    Raises:
        NotFoundError: No such trace.
        UploadError: No endpoint, or it failed.
        AuthenticationError: The endpoint refused the key.
        CorruptDataError: Stored bytes are not what was written; what is intact before them was sent.
    """
    epoch = check_epoch(n_epoch)
    model = layout.check_name(model_name, "model_name")
    version = layout.check_name(version_name, "version_name")
    trace_dir = layout.trace_directory(layout.resolve_data_dir(data_dir), model, version)
    layout.read_version(trace_dir)
    address = os.fspath(endpoint or "") or os.environ.get("MLD_API_ENDPOINT")
    key = (os.environ.get("MLD_API_KEY") if api_key is None else api_key) or None
    target = parse_endpoint(address, has_key=key is not None)
    policy = RetryPolicy(stall_timeout_s=stall_timeout_s)
    with UploadProgress(progress) as shown:
        uploads = TraceUpload(trace_dir, target, open_transport(target, key, policy), policy, shown.advance)
        try:
            return uploads.run(epoch, force=force)
        finally:
            uploads.close()


class TraceUpload:
    """All ranks of a trace on their way to one endpoint.

    Args:
        trace_dir: Directory of the (model, version).
        endpoint: Where to.
        transport: How; closed by `close`.
        policy: Bounds of all waits.
        on_bytes: Called with a number of bytes after they have travelled.
    """

    def __init__(
        self,
        trace_dir: Path,
        endpoint: Endpoint,
        transport: Transport,
        policy: RetryPolicy,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._trace_dir = trace_dir
        self._endpoint = endpoint
        self._transport = transport
        self._policy = policy
        self._on_bytes = on_bytes
        self._ranks: dict[int, RankUpload] = {}

    def rank(self, rank: int) -> RankUpload:
        """The upload of one rank."""
        if rank not in self._ranks:
            self._ranks[rank] = RankUpload(
                self._trace_dir,
                rank,
                self._endpoint,
                self._transport,
                stall_timeout_s=self._policy.stall_timeout_s,
                on_bytes=self._on_bytes,
            )
        return self._ranks[rank]

    def run(self, n_epoch: int | None, *, force: bool) -> UploadReport:
        """Send what is missing of every rank.

        Raises:
            UploadError: It failed.
            MlDebuggerError: The trace cannot be read.
        """
        begin = time.monotonic()
        sent = skipped = length = 0
        for rank, _ in layout.rank_directories(self._trace_dir):
            try:
                tally = self.rank(rank).run(n_epoch, force=force)
            except MlDebuggerError:
                raise
            except OSError as error:
                raise UploadError(f"cannot upload: {error.strerror or error}", "look at the disk") from error
            sent += tally.segments_sent
            skipped += tally.segments_skipped
            length += tally.bytes_sent
        return UploadReport(sent, skipped, length, time.monotonic() - begin)

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
