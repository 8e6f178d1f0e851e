"""A deadline for whole answers.

Timeouts of sockets bound one read each: a server that sends a byte now and then meets all of them, and its
answer never ends.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any


class AnswerWatch:
    """Cuts the connection of a client that makes one request at a time when an answer takes too long.

    Args:
        timeout_s: From the end of a request to the end of its answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._deadline = 0.0
        self.has_cut = False

    def on_event(self, name: str, details: Mapping[str, Any]) -> None:
        """What httpx tells to the extension ``trace`` of a request."""
        if name.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._socket = details["return_value"].get_extra_info("socket")
        elif name.endswith(".send_request_body.complete"):
            self.begin()

    def begin(self) -> None:
        """The time runs from now on."""
        with self._lock:
            self._deadline = time.monotonic() + self._timeout_s
            if self._timer is None:
                self._wait(self._timeout_s)

    def end(self) -> None:
        """No answer is waited for."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wait(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._look)
        self._timer.daemon = True
        self._timer.start()

    def _look(self) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():
                return  # the answer is there
            left = self._deadline - time.monotonic()
            if left > 0:  # more of it has come meanwhile
                self._wait(left)
                return
            self.has_cut = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    # Not that of a TLS socket, which takes its state from under the thread that reads.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
