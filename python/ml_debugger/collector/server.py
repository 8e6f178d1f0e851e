"""`serve`: a collector on a port."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ml_debugger.collector.keys import KeyRing
from ml_debugger.errors import InvalidInputError
from ml_debugger.uploading.endpoint import is_loopback

if TYPE_CHECKING:
    from ml_debugger.collector.running import CollectorServer

DEFAULT_PORT = 8420
DEFAULT_STORAGE = "mld_collected"
_GRACE_S = 5.0


def serve(
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    storage: str | os.PathLike[str] = DEFAULT_STORAGE,
    *,
    keys: KeyRing | None = None,
    on_ready: Callable[[str], object] | None = None,
) -> None:
    """Run a collector until SIGINT or SIGTERM; then it returns.

    Blocks. What is on its way in has some seconds to arrive, after a second signal none; what has arrived of
    the rest stays, and its upload goes on when a collector runs again. In the main thread the handlers of the
    two signals are its own meanwhile; in another thread nothing but the end of the process ends it.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        storage: Folder that takes the traces (`open_trace(data_dir=storage)` reads them), or the address of
            an object store.
        keys: Who may come in; None: the keys of ``MLD_API_KEYS``. None at all only on a loopback address.
        on_ready: Called with the collector's URL when connections are taken.

    Raises:
        InvalidInputError: No keys on an address that others reach, a bad storage, or the port is taken.
        StorageError: The folder cannot be written.
    """
    ring = KeyRing.from_environment() if keys is None else keys
    if not ring and not is_loopback(host):
        raise InvalidInputError(
            f"a collector on {host} can be reached by others and needs keys",
            "set MLD_API_KEYS or name a keys file, or listen on 127.0.0.1",
        )
    server, _, listener = make_server(host, port, storage, ring, on_ready)
    with listener:
        server.run(sockets=[listener])


def make_server(
    host: str,
    port: int,
    storage: str | os.PathLike[str],
    keys: KeyRing,
    on_ready: Callable[[str], object] | None = None,
) -> tuple[CollectorServer, str, socket.socket]:
    """A server that is bound and does not run yet, its URL and its socket.

    Raises:
        As `serve`.
    """
    try:
        from ml_debugger.collector.app import Collector
        from ml_debugger.collector.running import CollectorServer
    except ImportError as error:
        raise InvalidInputError(
            f"the collector needs a package that is not installed ({error.name})",
            'pip install "ml-debugger[server]"',
        ) from error
    from ml_debugger.collector.storage import Storage

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InvalidInputError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            "choose another host or port",
        ) from error
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    said = None if on_ready is None else lambda: on_ready(url)
    try:
        server = CollectorServer(Collector(Storage(storage), keys), grace_s=_GRACE_S, on_started=said)
    except BaseException:
        listener.close()
        raise
    return server, url, listener
