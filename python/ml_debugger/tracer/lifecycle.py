"""Ends of a process: every open session is flushed and closed, however the process ends.

``atexit`` alone is not enough: fork and forkserver children skip it and run the finalizers of
``multiprocessing.util``.
"""

from __future__ import annotations

import atexit
import os
import threading
from multiprocessing import util as multiprocessing_util
from typing import Protocol

# Above the priorities of multiprocessing's own finalizers: they end managers and queues.
_EXIT_PRIORITY = 100


class Closeable(Protocol):
    """What is to be closed at the end."""

    def close_quietly(self) -> None:
        """Close within the configured time; log instead of raising."""


class _Registry:
    """Open sessions of this process."""

    def __init__(self) -> None:
        # Re-entrant: what is done under it may set off the collector, which closes a forgotten tracer.
        self._lock = threading.RLock()
        self._open: dict[int, Closeable] = {}
        self._hooked_pid: int | None = None

    def add(self, session: Closeable) -> None:
        with self._lock:
            self._open[id(session)] = session
            if self._hooked_pid != os.getpid():
                # A child starts with an empty list of finalizers, so each process registers its own.
                self._hooked_pid = os.getpid()
                atexit.register(self.close_all)
                multiprocessing_util.Finalize(None, self.close_all, exitpriority=_EXIT_PRIORITY)

    def discard(self, session: Closeable) -> None:
        with self._lock:
            self._open.pop(id(session), None)

    def open_sessions(self) -> list[Closeable]:
        with self._lock:
            return list(self._open.values())

    def close_all(self) -> None:
        interruption: BaseException | None = None
        for session in self.open_sessions():
            try:
                session.close_quietly()
            except BaseException as error:  # Ctrl-C ends the wait for one; the others are closed all the same
                interruption = error
            self.discard(session)
        if interruption is not None:
            raise interruption

    def forget_inherited(self) -> None:
        # The parent's sessions are the parent's; its lock may be held by a thread that does not exist here.
        self._lock = threading.RLock()
        self._open = {}
        atexit.unregister(self.close_all)


_registry = _Registry()
os.register_at_fork(after_in_child=_registry.forget_inherited)

register = _registry.add
unregister = _registry.discard
open_sessions = _registry.open_sessions
