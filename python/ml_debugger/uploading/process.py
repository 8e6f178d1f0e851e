"""A tracer's side of its uploading process: start, ask, end. Nothing of it runs between calls."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_debugger
from ml_debugger import errors
from ml_debugger.errors import UploadError
from ml_debugger.uploading.report import UploadReport

logger = logging.getLogger("ml_debugger")

# Beyond the uploader's own deadlines, which end it first if it still can.
_GRACE_S = 30.0
_SLICE_S = 0.05
_LEAVE_S = 2.0
_MAX_SHOWN_BYTES = 2000


class UploaderProcess:
    """One uploading process.

    Args:
        trace_dir: Directory of the (model, version).
        endpoint: Where to.
        key: The key to show, or None. It travels through a pipe.
        rank: The tracer's rank.
        is_auto: Whether it uploads by itself as rows are committed.
        stall_timeout_s: Longest time without progress.
        close_timeout_s: How long it goes on after this process has gone without a word.

    Raises:
        UploadError: It cannot be started.
    """

    def __init__(
        self,
        trace_dir: Path,
        endpoint: str,
        key: str | None,
        rank: int,
        *,
        is_auto: bool,
        stall_timeout_s: float,
        close_timeout_s: float,
    ) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._stall_timeout_s = stall_timeout_s
        self._number = 0
        self._lines = b""
        self._has_ended = False
        environment = {name: value for name, value in os.environ.items() if name != "MLD_API_KEY"}
        environment["PYTHONSAFEPATH"] = "1"  # a json.py in the working directory is not meant
        package_dir = str(Path(ml_debugger.__file__).resolve().parent.parent)
        if package_dir not in (*site.getsitepackages(), site.getusersitepackages()):
            # Where this process found the package, the new one must find it too.
            paths = [package_dir, *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ml_debugger.uploading.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                bufsize=0,
                # Ctrl-C is meant for the training; the end of the pipe tells the uploader.
                start_new_session=True,
            )
        except OSError as error:
            raise UploadError(
                f"cannot start the uploader with {sys.executable}: {error.strerror}", "check the interpreter"
            ) from error
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._send(
            {
                "trace_dir": str(trace_dir),
                "endpoint": endpoint,
                "key": key,
                "rank": rank,
                "is_auto": is_auto,
                "stall_timeout_s": stall_timeout_s,
                "close_timeout_s": close_timeout_s,
            }
        )

    def __repr__(self) -> str:
        return f"<UploaderProcess {self._process.pid}>"

    @property
    def is_inherited(self) -> bool:
        """Whether this is a forked child's copy of its parent's."""
        return self._pid != os.getpid()

    def upload(self, n_epoch: int | None, *, force: bool, on_bytes: Callable[[int], None]) -> UploadReport:
        """Have everything sent that is missing; waits for it.

        Raises:
            UploadError: It failed, or there was no sign of progress for ``stall_timeout_s``.
        """
        with self._lock:
            self._number += 1
            self._send({"command": "upload", "number": self._number, "n_epoch": n_epoch, "force": force})
            since = time.monotonic()
            while True:
                for event in self._events(_SLICE_S):
                    since = time.monotonic()
                    if "bytes" in event:
                        on_bytes(int(event["bytes"]))
                    elif event.get("number", 0) in (self._number, None):
                        return self._outcome(event)
                if self._has_ended:
                    raise self._crash()
                if time.monotonic() - since > self._stall_timeout_s + _GRACE_S:
                    raise UploadError(
                        f"the uploader made no progress for stall_timeout_s={self._stall_timeout_s:g} s",
                        "check the endpoint and the network; what has arrived is not sent again",
                    )

    def report(self) -> None:
        """Log what has gone wrong since, and whether it has died."""
        with self._lock:
            self._events(0.0)
            if self._has_ended:
                logger.warning("%s", self._crash())

    def finish(self, timeout_s: float) -> None:
        """Let it send what is left, for so long, and end it. What is left then goes with the next upload."""
        with self._lock:
            begin = time.monotonic()
            with contextlib.suppress(UploadError):
                self._send({"command": "finish", "timeout_s": timeout_s})
            try:
                while not self._has_ended and time.monotonic() - begin < timeout_s:
                    self._events(_SLICE_S)
            finally:
                self._end(is_late=not self._has_ended, timeout_s=timeout_s)

    def kill(self) -> None:
        """End it at once: nothing is lost by that but the time for what is under way."""
        self._process.kill()
        self._reap()

    def _end(self, *, is_late: bool, timeout_s: float) -> None:
        try:
            self._process.wait(_SLICE_S if is_late else _LEAVE_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the uploader did not finish within close_timeout_s=%g s: upload() sends the rest", timeout_s
            )
            self._process.kill()
        crashed = self._process.poll() not in (0, None)
        if crashed and not is_late:
            logger.warning("%s", self._crash())
        self._reap()

    def _reap(self) -> None:
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode("ascii") + b"\n")
        except (OSError, ValueError):
            raise self._crash() from None

    def _events(self, timeout_s: float) -> list[dict[str, Any]]:
        """What the uploader has said since; its failures in the background go to the log."""
        stream = self._process.stdout
        assert stream is not None
        if stream.closed or not select.select([stream], [], [], timeout_s)[0]:
            return []
        while (data := stream.read(1 << 16)) is not None:
            if not data:
                self._has_ended = True
                break
            self._lines += data
        *lines, self._lines = self._lines.split(b"\n")
        events = [json.loads(line) for line in lines]
        for event in events:
            if "failure" in event:
                rest = "it stops until upload() is called" if event["is_final"] else "it will try again"
                logger.warning("uploading in the background failed: %s; %s", event["failure"], rest)
        return events

    def _outcome(self, event: dict[str, Any]) -> UploadReport:
        if "report" in event:
            return UploadReport(**event["report"])
        kind = getattr(errors, event["error"])
        raise kind(event["message"], event["hint"])

    def _crash(self) -> UploadError:
        """What became of a process that is not there any more."""
        try:
            status: int | None = self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            status = None
        said = ""
        stream = self._process.stderr
        if stream is not None and not stream.closed:
            os.set_blocking(stream.fileno(), False)
            text = (stream.read(1 << 16) or b"")[-_MAX_SHOWN_BYTES:].decode("utf-8", "replace").strip()
            said = f": {text.splitlines()[-1]}" if text else ""
        return UploadError(
            f"the uploader ended with status {status}{said}",
            "upload again: it goes on where it stopped",
        )
