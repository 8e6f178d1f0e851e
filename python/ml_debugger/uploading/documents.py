"""The small files of a trace at an endpoint: `version.json`, and each rank's `attempts.json`.

Attempts get their numbers from the endpoint: two machines that record under one name (a job that was
restarted with an empty disk) both begin with attempt 0, and a row is identified by rank, attempt and call.
A number that is taken by another attempt is replaced by the next free one.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from ml_debugger.errors import UploadError
from ml_debugger.store import layout
from ml_debugger.uploading.ledger import Ledger
from ml_debugger.uploading.transports import Item, Transport

_TRIES = 20
_IDENTITY = ("started_unix_s", "pid")


class Documents:
    """Keeps the endpoint's documents of one rank up to date.

    Args:
        transport: How to get there.
        trace_dir: Directory of the trace here.
        trace: Path of the trace at the endpoint.
        rank: Whose attempts.
        ledger: Remembers what was sent where the endpoint cannot be asked.
    """

    def __init__(self, transport: Transport, trace_dir: Path, trace: str, rank: int, ledger: Ledger) -> None:
        self._transport = transport
        self._ledger = ledger
        self._rank_dir = layout.rank_directory(trace_dir, rank)
        self._trace_dir = trace_dir
        self._version_path = f"{trace}/version.json"
        self._attempts_path = f"{trace}/{self._rank_dir.name}/attempts.json"

    def attempts(self) -> dict[int, dict[str, Any]]:
        """The endpoint's entry for each attempt of the rank here, which gets one where it has none.

        Raises:
            UploadError: The endpoint failed, or has no number left.
        """
        local = layout.attempt_entries(self._rank_dir)
        if not self._transport.keeps_documents:
            self._send_attempts(local)
            return {int(entry["attempt"]): entry for entry in local}
        for _ in range(_TRIES):
            before = self._transport.read(self._attempts_path)
            entries = self._entries(before)
            numbers = _assign(local, entries)
            known = len(self._entries(before))
            if known == len(entries) or self._transport.swap(
                self._attempts_path, before, _encoded({"attempts": entries})
            ):
                return numbers
        raise _keeps_changing(self._attempts_path)

    def send_version(self, info: layout.VersionInfo) -> None:
        """Make the endpoint's `version.json` say what is recorded here.

        Slices of a version that was recreated with other columns stay there, unseen: their names say so.

        Raises:
            UploadError: The endpoint failed.
        """
        new = _encoded(layout.version_document(info))
        if not self._transport.keeps_documents:
            self._send(self._version_path, new)
            return
        for _ in range(_TRIES):
            before = self._transport.read(self._version_path)
            if before is not None and _decoded(before) == _decoded(new):
                return
            if self._transport.swap(self._version_path, before, new):
                return
        raise _keeps_changing(self._version_path)

    def _entries(self, document: bytes | None) -> list[dict[str, Any]]:
        found = _decoded(document).get("attempts", []) if document is not None else []
        if not isinstance(found, list) or not all(
            isinstance(entry, dict) and type(entry.get("attempt")) is int for entry in found
        ):
            raise UploadError(
                f"{self._attempts_path} at the endpoint is damaged", "restore or remove it there"
            )
        return found

    def _send_attempts(self, entries: list[dict[str, Any]]) -> None:
        self._send(self._attempts_path, _encoded({"attempts": entries}))

    def _send(self, path: str, data: bytes) -> None:
        sent = self._ledger.documents()
        digest = hashlib.sha256(data).hexdigest()
        if sent.get(path) == digest:
            return
        self._transport.send(
            Item(path, io.BytesIO(data), len(data), digest, None, lambda url: None, lambda sent: None)
        )
        self._ledger.put_documents(sent | {path: digest})


def _keeps_changing(path: str) -> UploadError:
    return UploadError(
        f"{path} at the endpoint changed {_TRIES} times while it was to be changed",
        "upload again, with fewer uploaders of one trace",
    )


def _assign(local: list[dict[str, Any]], remote: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Find the remote entry of each local attempt; those that have none are appended to ``remote``."""
    by_identity = {_identity(entry): entry for entry in remote}
    taken = {int(entry["attempt"]) for entry in remote}
    numbers = {}
    for entry in local:
        found = by_identity.get(_identity(entry))
        if found is None:
            number = int(entry["attempt"])
            if number in taken:
                number = max(taken) + 1
            if number >= layout.MAX_ATTEMPTS:
                raise UploadError(
                    f"the endpoint has {layout.MAX_ATTEMPTS} attempts of this rank, the most there can be",
                    "use another version_name",
                )
            found = {**entry, "attempt": number}
            if number != entry["attempt"]:
                found["recorded_as"] = entry["attempt"]
            taken.add(number)
            remote.append(found)
        numbers[int(entry["attempt"])] = found
    return numbers


def _identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry.get("recorded_as", entry["attempt"]), *(entry.get(name) for name in _IDENTITY)


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps({"format_version": layout.FORMAT_VERSION, **document}, indent=1).encode("ascii")


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UploadError("a document of this trace at the endpoint is damaged", "restore or remove it there")
    return document
