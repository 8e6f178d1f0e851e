"""The short form of `make fuzz`: a few hundred mutants for every decoder, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_mutants_of_sound_bytes_are_refused_by_our_errors_or_taken(tmp_path: Path) -> None:
    seed = os.environ.get("FUZZ_SEED", "20")
    command = [sys.executable, "-W", "ignore", str(HERE / "fuzz_decoders.py"), "--seed", seed, "--runs", "40"]
    done = subprocess.run([*command, "--keep", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all(": 40 inputs, " in line for line in lines), done.stdout
    # The mutants are no noise: of most kinds some are refused, and some are taken.
    assert sum(int(line.rsplit(" ", 2)[1]) for line in lines) > 60, done.stdout
