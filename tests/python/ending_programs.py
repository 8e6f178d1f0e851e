"""Programs of a test that are processes of their own, judged by their end."""

from __future__ import annotations

import os
import subprocess
import sys

PATIENCE_S = 20.0  # of a process that does not end; each takes about a second


def last_words_of(program: str, *arguments: str) -> str:
    """Run a program to its end, which must be a good one, with nothing on standard error; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
