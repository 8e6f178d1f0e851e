"""What a collector has, for its page, and a trace of it as an export."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import defaultdict
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from ml_debugger.collector.page import TraceSummary, traces_page
from ml_debugger.collector.storage import Storage, is_document_path, slice_of
from ml_debugger.errors import NotFoundError
from ml_debugger.exporting import export_trace
from ml_debugger.exporting.naming import default_name
from ml_debugger.store import layout
from ml_debugger.uploading.mirror import mirror_trace
from ml_debugger.uploading.transports.folder import FolderTransport


class ClosingError(Exception):
    """The collector ends."""


class Overview:
    """Looks at a collector's storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._documents: dict[str, tuple[Any, layout.VersionInfo]] = {}
        self._exporting = threading.Semaphore(2)
        self._is_closing = False

    def close(self) -> None:
        """The exports that are being made end soon, without a result."""
        self._is_closing = True

    def traces(self) -> list[TraceSummary]:
        """Every trace, by name."""
        files: dict[str, list[tuple[str, int, datetime]]] = defaultdict(list)
        for path, length, modified in self._storage.transport.listing():
            if is_document_path(path) or slice_of(path) is not None:
                files["/".join(path.split("/")[:2])].append((path, length, modified))
        found = []
        for trace, listed in files.items():
            summary = self._summary(trace, listed)
            if summary is not None:
                found.append(summary)
        return sorted(found, key=lambda summary: (summary.model_name, summary.version_name))

    def page(self, *, can_sign_out: bool) -> str:
        """The page that lists them."""
        return traces_page(self.traces(), can_sign_out=can_sign_out)

    def export(self, trace: str) -> FileResponse:
        """A trace as an export, in a file that goes when it has been sent.

        Raises:
            NotFoundError: No such trace.
            ClosingError: The collector ends.
        """
        with self._exporting:
            self._look_whether_closing()
            place = tempfile.TemporaryDirectory(prefix="export-", dir=self._storage.uploads_dir)
            try:
                transport = self._storage.transport
                if isinstance(transport, FolderTransport):
                    trace_dir = transport.root / trace
                else:
                    trace_dir = Path(place.name) / trace
                    mirror_trace(transport, trace, Path(place.name))
                info = layout.read_version(trace_dir)
                name = default_name(info.model_name, info.version_name, None)
                path = export_trace(
                    trace_dir, Path(place.name) / "export.zip", progress=self._look_whether_closing
                )
            except BaseException:
                place.cleanup()
                raise
        return FileResponse(
            path, media_type="application/zip", filename=name, background=BackgroundTask(place.cleanup)
        )

    def _look_whether_closing(self, *progress: object) -> None:
        if self._is_closing:
            raise ClosingError

    def _summary(self, trace: str, files: list[tuple[str, int, datetime]]) -> TraceSummary | None:
        info = self._version(f"{trace}/version.json", files)
        if info is None:
            return None
        summary = TraceSummary(trace, info.model_name, info.version_name)
        tag = layout.version_tag(info)
        for path, length, modified in files:
            name = slice_of(path)
            summary.last_sync = max(filter(None, [summary.last_sync, modified]))
            if name is None or name.version_tag != tag:
                continue
            partition = PurePosixPath(path).parent
            epoch = partition.name.removeprefix("epoch-")
            summary.epochs.add(layout.NO_EPOCH if epoch == "none" else int(epoch))
            summary.ranks.add(partition.parent.name)
            summary.rows += name.rows
            summary.ground_truth_rows += name.ground_truth_rows
            summary.length_bytes += length
        return summary

    def _version(self, path: str, files: list[tuple[str, int, datetime]]) -> layout.VersionInfo | None:
        identity = next((entry for entry in files if entry[0] == path), None)
        if identity is None:
            return None
        known = self._documents.get(path)
        if known is not None and known[0] == identity:
            return known[1]
        data = self._storage.transport.read(path)
        try:
            info = layout.parse_version(json.loads(data or b"null"), Path(path))
        except (ValueError, RecursionError, NotFoundError, OSError):
            return None
        self._documents[path] = identity, info
        return info
