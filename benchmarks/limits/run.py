"""Runs the programs of this folder, which use nothing of ours: on tmpfs and on the disk of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"


def run(folder: Path, *command: str | Path) -> None:
    """One program with an empty folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mld-limit-", dir=folder) as place:
        words = [str(word).replace("PLACE", place) for word in command]
        print("$", *(Path(word).name for word in words), f"(in {folder})", flush=True)
        subprocess.run(words, check=True)


def main() -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("expected a C++ compiler (c++ or g++) on PATH, found none")
    BUILD.mkdir(exist_ok=True)
    chain = BUILD / "copy_and_write"
    options = ("-O3", "-std=c++17", "-pthread")
    subprocess.run([compiler, *options, HERE / "copy_and_write.cpp", "-o", chain], check=True)
    python = sys.executable
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else BUILD
    for folder in (memory, BUILD):
        run(folder, chain, "PLACE/file")
        run(folder, python, HERE / "new_environments.py", "PLACE")
        run(folder, python, HERE / "send_slices.py", "PLACE")
    run(BUILD, chain, "PLACE/file", "32")
    for mebibytes in ("1", "64"):
        run(BUILD, python, HERE / "remove_files.py", "PLACE", mebibytes)
    for batch_size, without_map in (("256", "1"), ("256", "0"), ("1024", "0")):
        run(BUILD, python, HERE / "step_with_copies.py", "PLACE/file", batch_size, "1", without_map)


if __name__ == "__main__":
    main()
