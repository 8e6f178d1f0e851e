"""Live counters of a rank, as its writer leaves them in `status.json` (`docs/record_format.md`)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ml_debugger import _core
from ml_debugger.store import layout

_STATUS_FILE = "status.json"
_TRIES = 20
_RETRY_S = 0.005
_MARK = b', "crc32c": '


def is_writing(rank_dir: Path) -> bool:
    """Whether a process holds the writer lock of a rank."""
    return _core.is_locked(str(rank_dir / layout.LOCK_FILE))


def read_status(rank_dir: Path) -> dict[str, Any] | None:
    """The status of a rank as it was at most 0.2 s ago; None if it never recorded or the file is damaged.

    A writer rewrites the file in place, so a wrong checksum is read again a few times.
    """
    for _ in range(_TRIES):
        try:
            data = (rank_dir / _STATUS_FILE).read_bytes()
        except OSError:
            return None
        document = _decode(data)
        if document is not None:
            return document
        time.sleep(_RETRY_S)
    return None


def _decode(data: bytes) -> dict[str, Any] | None:
    checked, mark, _ = data.rpartition(_MARK)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not mark or not isinstance(document, dict) or document.get("crc32c") != _core.crc32c(checked):
        return None
    return document
