"""Progress of an export: a line on a terminal, or a callback."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from ml_debugger.errors import InvalidTypeError
from ml_debugger.terminal import stderr_is_terminal

ProgressCallback = Callable[[int, int], object]

_INTERVAL_S = 0.2


class Progress:
    """Counts written bytes and shows them.

    Args:
        progress: True or False; None: a line on standard error if it is a terminal; or a callable that takes
            (bytes done, bytes in all).
        label: What the line says is going on.
    """

    def __init__(self, progress: bool | ProgressCallback | None, label: str = "export") -> None:
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise InvalidTypeError(
                f"progress must be a bool, a callable or None, got {type(progress).__name__}",
                "pass a function of (bytes done, bytes in all)",
            )
        self._label = label
        self._callback = progress if callable(progress) else None
        if progress is None:
            progress = stderr_is_terminal()
        self._shows = progress is True
        self._shown_at = 0.0
        self._is_shown = False
        self._done_bytes = 0
        self._total_bytes = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_shown:
            sys.stderr.write("\n")

    def start(self, total_bytes: int) -> None:
        """Begin, or begin anew: so many bytes are expected."""
        self._done_bytes, self._total_bytes = 0, total_bytes

    def advance(self, length_bytes: int) -> None:
        """Count some more bytes."""
        self.show(self._done_bytes + length_bytes, self._total_bytes)

    def show(self, done_bytes: int, total_bytes: int) -> None:
        """So many bytes of so many are done."""
        self._done_bytes, self._total_bytes = done_bytes, total_bytes
        if self._callback is not None:
            self._callback(self._done_bytes, max(self._total_bytes, self._done_bytes))
        now = time.monotonic()
        if self._shows and (now - self._shown_at >= _INTERVAL_S or self._done_bytes >= self._total_bytes):
            self._shown_at, self._is_shown = now, True
            share = 100 * self._done_bytes // max(self._total_bytes, 1)
            sys.stderr.write(f"\r{self._label}: {min(share, 100):3d} % of {self._total_bytes / 1e6:.1f} MB")
            sys.stderr.flush()
