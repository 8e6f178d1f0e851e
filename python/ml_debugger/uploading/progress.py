"""Progress of an upload: a bar on a terminal, a line in the log elsewhere, or a callback."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ml_debugger.errors import InvalidTypeError
from ml_debugger.terminal import stderr_is_terminal

ProgressCallback = Callable[[int], object]

logger = logging.getLogger("ml_debugger")


class UploadProgress:
    """Counts bytes that travelled and shows them.

    Args:
        progress: True or False; None: on standard error if it is a terminal; or a callable that takes the
            bytes sent so far.
    """

    def __init__(self, progress: bool | ProgressCallback | None) -> None:
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise InvalidTypeError(
                f"progress must be a bool, a callable or None, got {type(progress).__name__}",
                "pass a function of the bytes sent",
            )
        self._callback = progress if callable(progress) else None
        if progress is None:
            progress = stderr_is_terminal()
        self._shows = progress is True
        self._bar: Any = None
        self._bytes = 0

    def __enter__(self) -> UploadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._bytes:
            logger.info("upload: %.1f MB sent", self._bytes / 1e6)

    def advance(self, length_bytes: int) -> None:
        """Count some more bytes."""
        self._bytes += length_bytes
        if self._callback is not None:
            self._callback(self._bytes)
        if self._shows:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(desc="upload", unit="B", unit_scale=True, unit_divisor=1000)
            self._bar.update(length_bytes)
