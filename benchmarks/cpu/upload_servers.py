"""The servers that `upload.py` sends to, each a process: our collector, and a plain PUT on the same stack.

``python -m benchmarks.cpu.upload_servers collector|put FOLDER`` prints its address when it takes connections.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.machine import ROOT
from ml_debugger.store.layout import sync_directory


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    pid: int
    url: str

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, in steps of 1/100."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(kind: str, folder: Path) -> Iterator[Server]:
    """A server that keeps what it gets in ``folder``."""
    command = [sys.executable, "-m", "benchmarks.cpu.upload_servers", kind, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the {kind} server did not start")
        yield Server(process.pid, url)
    finally:
        process.kill()
        process.communicate()


def serve_put(folder: Path) -> None:
    """One PUT, one file: written as it comes, hashed, synced with its name, and answered with its SHA-256."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    async def put(request: Request) -> Response:
        digest = hashlib.sha256()
        path = folder / request.path_params["name"]
        with open(path.with_suffix(".part"), "wb") as file:
            async for part in request.stream():
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".part"), path)
        sync_directory(folder)
        return PlainTextResponse(digest.hexdigest())

    folder.mkdir()
    listener = socket.create_server(("127.0.0.1", 0))
    app = Starlette(routes=[Route("/{name}", put, methods=["PUT"])])
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listener])


def serve_collector(folder: Path) -> None:
    from ml_debugger.collector import KeyRing, serve

    serve(port=0, storage=folder, keys=KeyRing([]), on_ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    {"put": serve_put, "collector": serve_collector}[sys.argv[1]](Path(sys.argv[2]))
