"""The uploading process, ``python -m ml_debugger.uploading.worker``, which a tracer starts.

Both talk in lines of JSON. Standard input: first the job, then commands; its end means that the tracer's
process is gone. The key comes with the job: a pipe is seen by nobody else, unlike arguments (anybody's
`ps`) and the environment (inherited further, and readable in /proc as long as the process lives).
Standard output: events. Nothing of a training process is in here, no torch, no GIL of its own; it reads
what is committed, as any reader does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_debugger.errors import AuthenticationError, MlDebuggerError, TraceStallError, UploadError
from ml_debugger.uploading.endpoint import parse_endpoint
from ml_debugger.uploading.retry import RetryPolicy
from ml_debugger.uploading.transports import open_transport
from ml_debugger.uploading.upload import TraceUpload

_POLL_S = 0.5
_TAIL_AGE_S = 2.0
_EVENT_INTERVAL_S = 0.2
_PAUSE_AFTER_FAILURE_S = (5.0, 300.0)
_NICE = 10


class Worker:
    """Does one tracer's uploads.

    Args:
        job: ``trace_dir``, ``endpoint``, ``key``, ``rank`` (the tracer's), ``is_auto``, ``stall_timeout_s``,
            ``close_timeout_s``.
        lines: The commands that follow.
    """

    def __init__(self, job: dict[str, Any], lines: Iterator[bytes]) -> None:
        key = job["key"]
        endpoint = parse_endpoint(job["endpoint"], has_key=key is not None)
        policy = RetryPolicy(stall_timeout_s=job["stall_timeout_s"])
        self._rank = int(job["rank"])
        self._is_auto = bool(job["is_auto"])
        self._close_timeout_s = float(job["close_timeout_s"])
        self._lines = lines
        self._is_asked = False
        self._commands: queue.Queue[dict[str, Any]] = queue.Queue()
        self._told_at = 0.0
        self._bytes = 0
        self._uploads = TraceUpload(
            Path(job["trace_dir"]), endpoint, open_transport(endpoint, key, policy), policy, self._count
        )
        self._pause_s = 0.0
        self._next_look = 0.0

    def run(self) -> None:
        """Serve until told to finish, or until the tracer's process is gone."""
        threading.Thread(target=self._listen, name="commands", daemon=True).start()
        while True:
            command = self._next_command()
            if command is None:
                self._advance(_TAIL_AGE_S)
            elif command["command"] == "upload":
                self._upload(command)
            elif command["command"] == "finish":
                if self._is_auto:
                    self._next_look = 0.0
                    self._advance(0.0, patience_s=self._close_timeout_s)
                self._uploads.close()
                return

    def _listen(self) -> None:
        for line in self._lines:
            command = json.loads(line)
            if command["command"] == "finish":
                self._end_within(float(command["timeout_s"]))
            self._commands.put(command)
        # The tracer's process has ended without a word: what it has committed still goes.
        self._end_within(self._close_timeout_s)
        self._commands.put({"command": "finish"})

    def _end_within(self, timeout_s: float) -> None:
        timer = threading.Timer(timeout_s, os._exit, (0,))
        timer.daemon = True
        timer.start()

    def _next_command(self) -> dict[str, Any] | None:
        try:
            return self._commands.get(timeout=_POLL_S if self._is_auto else None)
        except queue.Empty:
            return None

    def _advance(self, tail_age_s: float, *, patience_s: float = 0.0) -> None:
        if time.monotonic() < self._next_look:
            return
        try:
            self._uploads.rank(self._rank).advance(tail_age_s, patience_s=patience_s)
            self._pause_s = 0.0
        except AuthenticationError as error:
            self._is_auto = False  # said once; an upload() tries again
            _tell({"failure": str(error), "is_final": True})
        except (MlDebuggerError, OSError) as error:
            if not self._pause_s:
                _tell({"failure": str(error), "is_final": False})
            shortest, longest = _PAUSE_AFTER_FAILURE_S
            self._pause_s = min(max(shortest, 2 * self._pause_s), longest)
            self._next_look = time.monotonic() + self._pause_s

    def _upload(self, command: dict[str, Any]) -> None:
        number = command["number"]
        self._is_asked = True
        try:
            report = self._uploads.run(command["n_epoch"], force=command["force"])
        except MlDebuggerError as error:
            _tell(
                {"number": number, "error": _class_name(error), "message": error.message, "hint": error.hint}
            )
            return
        finally:
            self._is_asked = False
        _tell({"number": number, "report": vars(report)})

    def _count(self, length_bytes: int) -> None:
        if not self._is_asked:
            return  # nobody reads; what went wrong must still fit into the pipe
        self._bytes += length_bytes
        now = time.monotonic()
        if now - self._told_at >= _EVENT_INTERVAL_S:
            self._told_at = now
            _tell({"bytes": self._bytes})
            self._bytes = 0


def _class_name(error: MlDebuggerError) -> str:
    return type(error).__name__ if isinstance(error, (UploadError, TraceStallError)) else UploadError.__name__


_telling = threading.Lock()


def _tell(event: dict[str, Any]) -> None:
    """Say something. Nobody may be reading: then it is left out, so that nothing ever waits."""
    line = json.dumps(event).encode("ascii") + b"\n"
    with _telling:
        try:
            os.set_blocking(sys.stdout.fileno(), False)
            os.write(sys.stdout.fileno(), line)
        except (BlockingIOError, BrokenPipeError):
            return


def _lines() -> Iterator[bytes]:
    """Lines of standard input, without Python's buffer, whose lock would not outlive the interpreter."""
    rest = b""
    while data := os.read(sys.stdin.fileno(), 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def main() -> None:
    """Read the job, do it."""
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    lines = _lines()
    job = next(lines, None)
    if job is None:
        return
    try:
        worker = Worker(json.loads(job), lines)
    except MlDebuggerError as error:
        _tell({"number": None, "error": _class_name(error), "message": error.message, "hint": error.hint})
        return
    worker.run()


if __name__ == "__main__":
    main()
