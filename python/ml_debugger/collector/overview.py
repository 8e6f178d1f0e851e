"""What a collector has, as a page, and a trace of it as an export."""

from __future__ import annotations

import html
import json
import tempfile
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from ml_debugger.collector.storage import Storage, is_document_path, slice_of
from ml_debugger.errors import NotFoundError
from ml_debugger.exporting import export_trace
from ml_debugger.exporting.naming import default_name
from ml_debugger.store import layout
from ml_debugger.uploading.mirror import mirror_trace
from ml_debugger.uploading.transports.folder import FolderTransport

_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1c1c1c}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.45rem .7rem;"
    "border-bottom:1px solid #ddd;vertical-align:top;overflow-wrap:anywhere}td.n{text-align:right}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#e4e4e4}a{color:#8ab4f8}"
    "th,td{border-color:#444}}"
)
_SHOWN_EPOCHS = 12


@dataclass
class TraceSummary:
    """What the collector has of one (model, version), as the names of its slices tell."""

    path: str
    model_name: str
    version_name: str
    epochs: set[int] = field(default_factory=set)
    ranks: set[str] = field(default_factory=set)
    rows: int = 0
    length_bytes: int = 0
    last_sync: datetime | None = None


class Overview:
    """Looks at a collector's storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._documents: dict[str, tuple[Any, layout.VersionInfo]] = {}
        self._exporting = threading.Semaphore(2)

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

    def page(self) -> str:
        """The HTML page."""
        rows = "".join(_row(summary) for summary in self.traces())
        if not rows:
            rows = '<tr><td colspan="7">Nothing has been uploaded yet.</td></tr>'
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ml-debugger collector</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<style>{_STYLE}</style></head><body><h1>Collected traces</h1><table><thead><tr><th>model</th>"
            "<th>version</th><th>epochs</th><th>rows</th><th>size</th><th>last sync</th><th></th></tr>"
            "</thead>"
            f"<tbody>{rows}</tbody></table></body></html>"
        )

    def export(self, trace: str) -> FileResponse:
        """A trace as an export, in a file that goes when it has been sent.

        Raises:
            NotFoundError: No such trace.
        """
        with self._exporting:
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
                path = export_trace(trace_dir, Path(place.name) / "export.zip", progress=False)
            except BaseException:
                place.cleanup()
                raise
        return FileResponse(
            path, media_type="application/zip", filename=name, background=BackgroundTask(place.cleanup)
        )

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


def _row(summary: TraceSummary) -> str:
    last = (
        ""
        if summary.last_sync is None
        else f"{summary.last_sync.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    )
    ranks = "" if len(summary.ranks) < 2 else f" ({len(summary.ranks)} ranks)"
    return (
        f"<tr><td>{_escaped(summary.model_name)}</td><td>{_escaped(summary.version_name)}</td>"
        f"<td>{_epochs(summary.epochs)}</td><td class=n>{summary.rows}{ranks}</td>"
        f"<td class=n>{summary.length_bytes / 1e6:.1f} MB</td><td>{last}</td>"
        f'<td><a href="export/{html.escape(summary.path)}.zip" download>export</a></td></tr>'
    )


def _epochs(epochs: set[int]) -> str:
    listed = sorted(epochs - {layout.NO_EPOCH})
    is_row = len(listed) > 2 and listed[-1] - listed[0] == len(listed) - 1
    if is_row:
        shown = f"{listed[0]}–{listed[-1]}"
    else:
        shown = ", ".join(map(str, listed[:_SHOWN_EPOCHS])) + (", …" if len(listed) > _SHOWN_EPOCHS else "")
    return ", ".join(filter(None, ["none" if layout.NO_EPOCH in epochs else "", shown]))


def _escaped(name: str) -> str:
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return html.escape(printable)
