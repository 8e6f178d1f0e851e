"""Faults in system calls of a running process, by strace(1).

strace counts the calls of each thread that it traces; so a fault that is meant for the writer is attached to
the writer's thread only, and one for a whole process is armed while that process has stopped itself.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from typing_extensions import Self

ATTACH_DEADLINE_S = 30.0
_CALL_LINE = re.compile(r"(?:(\d+) +)?(\w+)\(")
# What our code and LMDB call to write, and what glibc makes of it. `require_every_call` keeps the list true.
WRITE_CALLS = (
    "pwrite64",
    "pwritev",
    "lseek",
    "sync_file_range",
    "write",
    "fdatasync",
    "fsync",
    "openat",
    "link",
    "rename",
    "fallocate",
    "mmap",
    "mkdir",
    "unlink",
    "rmdir",
    "flock",
)
# Of recorders in these tests: groups of more than 4 MiB, so that commits write in strides.
WIDE_ROWS = {"widths": [16, 300_000]}
WIDE_RING = {"ring_bytes": 16 << 20}


def require_every_call(counts: dict[str, int], but: tuple[str, ...] = ()) -> None:
    """Fail where a fault is meant for a call that a life never makes, as after a change of the store."""
    missing = [call for call in WRITE_CALLS if call not in counts and call not in but]
    assert not missing, f"never called in this life: {missing}; counted: {counts}"
    strange = [call for call in but if call in counts]
    assert not strange, f"called after all: {strange}; counted: {counts}"


def require_strace() -> None:
    """Skip the test where strace is missing or may not attach."""
    if shutil.which("strace") is None:
        pytest.skip("needs the program strace (Debian package strace)")
    probe = subprocess.Popen(["sleep", "20"])
    try:
        command = ["strace", "-e", "inject=pause:error=EIO:when=9", "-p", str(probe.pid), "-o", os.devnull]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=10)
        if "attached" not in line:
            pytest.skip(f"strace may not inject faults here: {line.strip()}")
    finally:
        probe.kill()
        probe.wait()


class Attached:
    """strace, attached to a stopped process or to one thread of a running one; a context manager.

    Args:
        target: Process id, or the id of a thread.
        options: What strace is to do.
    """

    def __init__(self, target: int, options: list[str]) -> None:
        self._process = subprocess.Popen(
            ["strace", "-e", "signal=none", *options, "-p", str(target)], stderr=subprocess.PIPE, text=True
        )
        self._wait_until_attached(target)

    def _wait_until_attached(self, target: int) -> None:
        tracer_line = re.compile(r"^TracerPid:\s+(\d+)", re.MULTILINE)
        deadline = time.monotonic() + ATTACH_DEADLINE_S
        while True:
            try:
                status = Path(f"/proc/{target}/status").read_text()
            except FileNotFoundError:
                return
            found = tracer_line.search(status)
            if found and int(found[1]) == self._process.pid:
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"strace could not attach: {self._process.communicate()[1]}")
            time.sleep(0.005)

    def detach(self) -> None:
        """Let the process go; idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class Injection(Attached):
    """Faults in the calls of a process or a thread.

    Args:
        target: As above.
        faults: Arguments of ``--inject``, such as ``"pwrite64:error=EIO:when=3+"``.
        log: Where strace writes what it sees.
        all_threads: Follow the threads of the process, those to come included.
    """

    def __init__(self, target: int, faults: list[str], log: Path, *, all_threads: bool) -> None:
        calls = ",".join(dict.fromkeys(fault.split(":", 1)[0] for fault in faults))
        options = ["-o", str(log), "-e", f"trace={calls}", *(["-f"] if all_threads else [])]
        for fault in faults:
            options += ["-e", f"inject={fault}"]
        self._log = log
        super().__init__(target, options)

    def fired(self) -> int:
        """How many calls have failed by our hand so far."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return text.count("(INJECTED)")

    def counts(self) -> dict[str, int]:
        """The most calls that one thread has made so far, by name: beyond it no ``when=N`` fires."""
        by_thread: Counter[tuple[str, str]] = Counter()
        for line in self._log.read_text(errors="replace").splitlines():
            if found := _CALL_LINE.match(line):
                by_thread[found[1] or "", found[2]] += 1
        most: dict[str, int] = {}
        for (_, call), count in by_thread.items():
            most[call] = max(most.get(call, 0), count)
        return most
