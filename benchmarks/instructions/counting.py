"""Runs the workload under callgrind and makes counts of its dumps."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import ROOT
from benchmarks.instructions.workload import (
    BATCHES,
    FEW_CALLS,
    FEW_LAYERS,
    MANY_CALLS,
    MANY_LAYERS,
    REPEATS,
)
from ml_debugger import _core

HERE = Path(__file__).resolve().parent
COUNTS_FILE = HERE / "counts.json"
ALLOWED_GROWTH = 1.10
TIMEOUT_S = 900

Dumps = dict[str, int]


class CannotCountError(Exception):
    """A tool is missing, or the workload failed."""


def missing_tool() -> str | None:
    """One sentence about why nothing can be counted here; None if it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (Debian/Ubuntu: apt install valgrind)"
    if not any(Path(folder, "valgrind", "callgrind.h").exists() for folder in _include_folders()):
        return "valgrind's header callgrind.h is not installed"
    if _compiler() is None:
        return "there is no C compiler (looked for cc, gcc, clang)"
    return None


def environment() -> str:
    """What counts depend on besides our code; those of another environment are not compared."""
    version = ".".join(platform.python_version_tuple()[:2])
    torch_version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return (
        f"{platform.machine()}, {platform.python_implementation()} {version}, torch {torch_version}, "
        f"LMDB {_core.LMDB_VERSION}, {compiler_version()}"
    )


def compiler_version() -> str:
    """Of the C compiler, which is taken for the one that has built the extension."""
    command = _compiler()
    if command is None:
        return "no compiler"
    said = subprocess.run([command, "-v"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"(gcc|clang) version (\d+)", said)
    return f"{found[1]} {found[2]}" if found else command


def count() -> dict[str, int]:
    """Instructions by what they were spent on; takes about a minute.

    Raises:
        CannotCountError: A tool is missing, or the workload failed.
    """
    problem = missing_tool()
    if problem is not None:
        raise CannotCountError(problem)
    with tempfile.TemporaryDirectory(prefix="mld-instructions-", dir=_scratch()) as folder:
        marks = Path(folder, "marks.so")
        _run([str(_compiler()), "-shared", "-fPIC", "-O1", "-o", str(marks), str(HERE / "marks.c")])
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        out = f"--callgrind-out-file={folder}/counts"
        workload = [sys.executable, "-m", "benchmarks.instructions.workload", str(marks), f"{folder}/data"]
        _run([*tool, out, *workload])
        return derive(read_dumps(Path(folder)))


def read_dumps(folder: Path) -> Dumps:
    """Instructions of all threads, by the name of a dump."""
    dumps = {}
    for path in folder.glob("counts*"):
        text = path.read_text(errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (\S+)", text, re.M)
        total = re.search(r"^(?:summary|totals): (\d+)", text, re.M)
        if name and total:
            dumps[name[1]] = int(total[1])
    return dumps


def derive(dumps: Dumps) -> dict[str, int]:
    """Counts of one hook, of one call, and of what the writer makes of it.

    Raises:
        CannotCountError: A dump is missing.
    """

    def total(name: str) -> int:
        if name not in dumps:
            raise CannotCountError(f"callgrind has written no dump {name!r}; there are {sorted(dumps)}")
        return dumps[name]

    def layers(hook: str) -> float:
        return (total(f"{hook}-{MANY_LAYERS}/call") - total(f"{hook}-{FEW_LAYERS}/call")) / REPEATS

    counts: dict[str, float] = {}
    for hook, label in (("empty", "empty Python hook"), ("tracer", "hook")):
        counts[label] = (layers(hook) - layers("none")) / (MANY_LAYERS - FEW_LAYERS)
    for batch_size in BATCHES:
        few, many = f"batch{batch_size}-{FEW_CALLS}", f"batch{batch_size}-{MANY_CALLS}"
        counts[f"call, B = {batch_size}"] = total(f"{many}/call") / MANY_CALLS
        commits = [total(f"{name}/commit") for name in (few, many)]
        a_call = (commits[1] - commits[0]) / (MANY_CALLS - FEW_CALLS)
        counts[f"writer, a call of B = {batch_size}"] = a_call
    few_rows, many_rows = BATCHES[0], BATCHES[-1]
    counts["writer, a row"] = (
        counts[f"writer, a call of B = {many_rows}"] - counts[f"writer, a call of B = {few_rows}"]
    ) / (many_rows - few_rows)
    return {name: round(value) for name, value in counts.items()}


def grown(recorded: dict[str, int], counted: dict[str, int]) -> list[str]:
    """What is more than a tenth above the recorded counts, or no longer counted; a sentence each."""
    complaints = []
    for name, before in recorded.items():
        now = counted.get(name)
        if now is None:
            complaints.append(f"{name}: {before} instructions before, not counted now")
        elif now > before * ALLOWED_GROWTH:
            complaints.append(f"{name}: {before} instructions before, {now} now ({now / before - 1:+.0%})")
    return complaints


def side_by_side(recorded: dict[str, int], counted: dict[str, int]) -> str:
    """A table of both."""
    lines = []
    for name, value in counted.items():
        before = f"{recorded[name]:>10,}" if name in recorded else "         -"
        lines.append(f"  {name:<26} {value:>10,} instructions, recorded {before}")
    return "\n".join(lines)


def recorded_counts() -> dict[str, dict[str, int]]:
    """The committed counts, by environment."""
    found: dict[str, dict[str, int]] = json.loads(COUNTS_FILE.read_text()) if COUNTS_FILE.exists() else {}
    return found


def record(counts: dict[str, int]) -> None:
    """Make ``counts`` the recorded ones of this environment."""
    recorded = {**recorded_counts(), environment(): counts}
    COUNTS_FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


def _run(command: list[str]) -> None:
    settings: dict[str, Any] = {name: value for name, value in os.environ.items() if name[:4] != "MLD_"}
    # The order of sets and dicts of text, and so the work, is the same in every run.
    settings |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    # Copies by `rep movsb`, which glibc chooses by the machine, would count as an instruction a byte.
    thresholds = ("rep_movsb_threshold", "rep_stosb_threshold")
    settings["GLIBC_TUNABLES"] = ":".join(f"glibc.cpu.x86_{name}={1 << 40}" for name in thresholds)
    done = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise CannotCountError(f"{' '.join(command)[:200]} failed: {done.stderr[-2000:]}")


def _compiler() -> str | None:
    return next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _include_folders() -> list[str]:
    return ["/usr/include", "/usr/local/include", *os.environ.get("CPATH", "").split(os.pathsep)]


def _scratch() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
