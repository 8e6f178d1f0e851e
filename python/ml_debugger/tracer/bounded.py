"""File work with a deadline: a thread that sits in the kernel, on a frozen disk, is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from ml_debugger.errors import TraceStallError

T = TypeVar("T")


class BoundedWork(Generic[T]):
    """Work on a thread of its own that nobody waits for longer than he wants to.

    Args:
        what: Names the work in the error.
        work: What is to be done. Whoever gives it up gets none of its results.
        undo: Called with what ``work`` returned when it has been given up by then.
    """

    def __init__(self, what: str, work: Callable[[], T], undo: Callable[[T], None]) -> None:
        self._what, self._work, self._undo = what, work, undo
        self._lock = threading.Lock()
        self._given_up = False
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self, timeout_s: float) -> T:
        """What the work returns, or raises; signal handlers run meanwhile.

        Raises:
            TraceStallError: It took longer than ``timeout_s``, and may go on without anybody.
        """
        # A daemon: the end of the process does not wait for it either.
        thread = threading.Thread(target=self._run, name="mld-opening", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is ending: then without a deadline
            self._run()
        else:
            self._wait(thread, timeout_s)
        if self._error is not None:
            raise self._error
        return self._results.pop()

    def _wait(self, thread: threading.Thread, timeout_s: float) -> None:
        try:
            thread.join(timeout_s)
        except BaseException:  # of a signal handler: nobody takes the result any more
            with self._lock:
                self._given_up = True
            for result in self._results:
                self._undo(result)
            raise
        with self._lock:
            self._given_up = not self._results and self._error is None
        if self._given_up:
            raise TraceStallError(
                f"{self._what} took longer than {timeout_s} s",
                "look whether the disk still answers, or raise TracerConfig.stall_timeout_s",
            )

    def _run(self) -> None:
        try:
            result = self._work()
        except BaseException as error:
            self._error = error
            return
        with self._lock:
            is_wanted = not self._given_up
            if is_wanted:
                self._results.append(result)
        if not is_wanted:
            self._undo(result)
