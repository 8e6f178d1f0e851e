"""Two hosts on one machine: network namespaces joined by a cable, and a tunnel to a collector on the first.

Run as a program, it is the tunnel: ``hosts.py LISTEN_HOST LISTEN_PORT HOST PORT`` forwards connections, as
``ssh -L`` would; a key travels over plain http to loopback only.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLLECTOR_PORT, TUNNEL_PORT, RENDEZVOUS_PORT = 8123, 9123, 29400


def can_make_hosts() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "mld-try"], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", "mld-try"], capture_output=True, check=False)
    return made


class Hosts:
    """Namespaces ``mld-<pid>-1`` and ``-2`` with the addresses 10.77.0.1 and 10.77.0.2."""

    def __init__(self) -> None:
        self.names = [f"mld-{os.getpid()}-{number}" for number in (1, 2)]
        self.links = [f"mld{os.getpid() % 100000}v{number}" for number in (1, 2)]
        self._processes: list[subprocess.Popen[Any]] = []

    def start(
        self, host: int, command: list[str], environment: dict[str, str], log: Path
    ) -> subprocess.Popen[Any]:
        """Run a command on a host (1 or 2)."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host - 1], *command],
                env={**os.environ, **environment, "GLOO_SOCKET_IFNAME": self.links[host - 1]},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process

    def tunnel(self, host: int, listen: tuple[str, int], to: tuple[str, int], log: Path) -> None:
        """Forward connections on a host."""
        self.start(host, [sys.executable, __file__, *map(str, (*listen, *to))], {}, log)

    def make(self) -> None:
        """Make the namespaces and the cable between them."""
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True), 1):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """End what runs there and remove them."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """The hosts; gone at the end."""
    hosts = Hosts()
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


def wait_for_text(log: Path, text: str, deadline_s: float = 60.0) -> None:
    """Until a program has printed something."""
    deadline = time.monotonic() + deadline_s
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.05)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


async def _forward(listen_host: str, listen_port: str, host: str, port: str) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        ends = (pump(reader, there_writer), pump(there_reader, writer))
        await asyncio.gather(*ends, return_exceptions=True)

    server = await asyncio.start_server(serve, listen_host, int(listen_port))
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_forward(*sys.argv[1:]))
