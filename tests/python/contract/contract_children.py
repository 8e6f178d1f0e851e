"""Runs scripts in a child Python whose whole process group dies at a deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent
DEADLINE_S = 90.0
PREAMBLE = "import torch\ntorch.set_num_threads(1)\n"


@dataclass(frozen=True)
class Finished:
    """How a child ended."""

    returncode: int
    stdout: str
    stderr: str


class Child:
    """A running script; a context manager that leaves no process of its group behind."""

    def __init__(
        self,
        folder: Path,
        source: str,
        *args: object,
        env: Mapping[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / f"child_{len(list(folder.glob('child_*.py')))}.py"
        script.write_text(PREAMBLE + textwrap.dedent(source), encoding="utf-8")
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, str(script), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
        )
        self.expired = False
        self._timer = threading.Timer(deadline_s, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._kill_group()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self) -> str:
        """The next line that the child prints."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            _, stderr = self._process.communicate()
            raise AssertionError(f"the child ended or timed out (expired={self.expired}):\n{stderr}")
        return text.strip()

    def say(self, word: str = "go") -> None:
        """Let a child continue that waits in ``input()``."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def finish(self) -> Finished:
        """Wait for the end."""
        stdout, stderr = self._process.communicate()
        self._timer.cancel()
        if self.expired:
            raise AssertionError(f"the child passed its deadline\n{stdout}\n{stderr}")
        return Finished(self._process.returncode, stdout, stderr)

    def _expire(self) -> None:
        self.expired = True
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def run_script(
    folder: Path, source: str, *args: object, expect: int | None = 0, **kwargs: object
) -> Finished:
    """Run a script to its end; ``expect`` is the return code that it must have, None for any."""
    with Child(folder, source, *args, **kwargs) as child:  # type: ignore[arg-type]
        finished = child.finish()
    if expect is not None and finished.returncode != expect:
        raise AssertionError(f"return code {finished.returncode}\n{finished.stdout}\n{finished.stderr}")
    return finished


def verify_segments(data_dir: Path) -> int:
    """Run ``python -m lmdb verify`` over every segment; returns how many there were."""
    segments = sorted(p.parent for p in Path(data_dir).rglob("data.mdb"))
    for segment in segments:
        done = subprocess.run(
            [sys.executable, "-m", "lmdb", "verify", "-e", str(segment)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{segment}: {done.stdout}{done.stderr}"
    return len(segments)
