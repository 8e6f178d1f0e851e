"""Starts recorders and judges as forks of a process that has imported everything, a tenth of a second each.

As a script: the server. It reads one JSON request a line and answers with one. It never uses the core itself,
so its forks are like fresh processes to it. `ForkServer` is the client that tests use.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BOOT_ID = "/proc/sys/kernel/random/boot_id"
_CLONE_NEWNS = 0x00020000
_MNT_DETACH = 2
_MS_BIND, _MS_PRIVATE, _MS_REC = 0x1000, 1 << 18, 0x4000


def pretend_boot(boot_id_file: str, data_dir: str) -> None:
    """Let this process, and no other, see another boot id, as after a power cut.

    It lets go of all disks of tests but that of ``data_dir``: else they would stay mounted as long as we
    live, in our copy of the mounts, and a test beside us would not get a fresh one after its own power cut.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for result in (
        libc.unshare(_CLONE_NEWNS),
        libc.mount(None, b"/", None, _MS_PRIVATE | _MS_REC, None),
        libc.mount(boot_id_file.encode(), BOOT_ID.encode(), None, _MS_BIND, None),
    ):
        if result != 0:
            raise OSError(ctypes.get_errno(), "cannot pretend another boot")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, mount, *_ = line.split()
        if device.startswith("/dev/loop") and not data_dir.startswith(f"{mount}/"):
            libc.umount2(mount.encode(), _MNT_DETACH)


def _judge(job: dict[str, Any]) -> int:
    from acknowledgements import Promise
    from oracle import judge

    promises = [Promise(**promise) for promise in job["promises"]]
    verdict = judge(job["data_dir"], promises, job["tracers"])
    Path(job["report"]).write_text(json.dumps(verdict.as_json()))
    return 0


def _script(job: dict[str, Any]) -> int:
    exec(compile(job["source"], "<script>", "exec"), {"__name__": "__main__", "ARGS": job.get("args", [])})
    return 0


def _child(job: dict[str, Any]) -> int:
    """What a fork does; returns its exit status."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(job.get("environment", {}))
    if "boot_id_file" in job:
        pretend_boot(job["boot_id_file"], job.get("data_dir", ""))
    import recorder

    kinds = {"record": recorder.main, "judge": _judge, "script": _script}
    return kinds[job["kind"]](job)


def serve() -> None:
    """Answer requests until standard input ends."""
    import torch

    import acknowledgements  # noqa: F401
    import ml_debugger.exporting  # noqa: F401
    import oracle  # noqa: F401
    import recorder  # noqa: F401

    with contextlib.suppress(ImportError):  # the judge does without
        import lmdb.verify  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a fork that collects would copy every page of what was imported here
    print(json.dumps({"ready": os.getpid()}), flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _child(request)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)


class Hung(AssertionError):
    """A process passed its deadline and was killed."""


class Process:
    """A fork of the server."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self._server, self.pid, self.log = server, pid, log
        self.status: int | None = None

    def wait(self, deadline_s: float = 60.0) -> int:
        """Its exit status, negative for a signal; raises `Hung` after ``deadline_s``, having killed it."""
        if self.status is None:
            answer = self._server.ask({"wait": self.pid}, deadline_s)
            if answer is None:
                stacks = self.stacks()
                self.kill()
                self.status = self._server.answer(30.0)["status"]  # type: ignore[index]
                raise Hung(
                    f"process {self.pid} was still there after {deadline_s} s\n{stacks}\n{self.output()}"
                )
            self.status = int(answer["status"])
        return self.status

    def kill(self) -> None:
        """SIGKILL to it and its children; nothing if it has been waited for."""
        if self.status is None:
            for send, target in ((os.killpg, self.pid), (os.kill, self.pid)):
                try:
                    send(target, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue

    def stop_state(self) -> str:
        """The letter of /proc/PID/stat, "?" if it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "?"

    def wait_until_stopped(self, deadline_s: float = 60.0) -> None:
        """Until it has stopped itself (step "stop"), or ended."""
        deadline = time.monotonic() + deadline_s
        while self.stop_state() not in "TtZ?":
            if time.monotonic() > deadline:
                raise Hung(f"process {self.pid} never came to its stop\n{self.output()}")
            time.sleep(0.005)

    def threads(self) -> dict[str, int]:
        """Thread ids by name."""
        found = {}
        for task in Path(f"/proc/{self.pid}/task").glob("*"):
            try:
                found[(task / "comm").read_text().strip()] = int(task.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def stacks(self) -> str:
        """Where its threads wait in the kernel, for the report of a hang."""
        lines = []
        for task in Path(f"/proc/{self.pid}/task").glob("*"):
            try:
                lines.append(f"{(task / 'comm').read_text().strip()}: {(task / 'wchan').read_text()}")
            except OSError:
                continue
        return "\n".join(lines)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class ForkServer:
    """Client of a server process."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MLD_")}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**clean, "PYTHONPATH": path, **(environment or {})},
        )
        self._buffer = b""
        if self.answer(120.0) is None:
            raise Hung("the fork server did not start")

    def start(self, job: dict[str, Any]) -> Process:
        """Fork; ``job["kind"]`` is "record", "judge" or "script", ``job["log"]`` a file for its output."""
        answer = self.ask(job, 60.0)
        if answer is None:
            raise Hung("the fork server did not answer")
        return Process(self, answer["pid"], Path(job["log"]))

    def ask(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any] | None:
        """Send a request; None if no answer came in time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self.answer(deadline_s)

    def answer(self, deadline_s: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return None
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise AssertionError("the fork server died")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


if __name__ == "__main__":
    serve()
