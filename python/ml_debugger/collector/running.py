"""How a collector runs and ends: uvicorn, told to end quietly, soon, and without taking the process along.

Needs the extra ``server``; `ml_debugger.collector.server` says so where it is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from ml_debugger.collector.app import Collector

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CollectorServer(uvicorn.Server):
    """Serves one collector until a signal, and then returns.

    Args:
        collector: Whose requests.
        grace_s: How long requests may go on after the signal; a second signal cuts them at once.
        on_started: Called when connections are taken.
    """

    def __init__(
        self, collector: Collector, *, grace_s: float, on_started: Callable[[], object] | None
    ) -> None:
        config = uvicorn.Config(
            _Uncancelled(collector.app()),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(2 * grace_s)),  # ours comes first
        )
        super().__init__(config)
        self._collector = collector
        self._grace_s = grace_s
        self._on_started = on_started
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections, and say so: from then on a signal ends it in order."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self._on_started is not None:
            self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that has ended the server is not raised again behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; for the second time: without waiting for anybody."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._cut)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """A request that hangs is cut as a broken link would, which its handler knows how to end."""
        cut = asyncio.get_running_loop().call_later(self._grace_s, self._cut)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            cut.cancel()

    def _cut(self) -> None:
        self._collector.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Uncancelled:
    """An ASGI application whose requests end without a word when the server takes them back at its end."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        has_begun = False

        async def watched(message: Any) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if scope["type"] == "http" and not has_begun:
                headers = [(b"content-length", b"0"), (b"retry-after", b"1"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
                await send({"type": "http.response.body"})
