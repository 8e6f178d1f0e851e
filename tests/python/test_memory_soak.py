"""The memory of report, export and Arrow stays the same while the trace grows: each in a process of its own.

The long form (``make soak``) compares 1 GB with SOAK_GIGABYTES, by default 6; needs twice that on the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")

PROGRAM = Path(__file__).with_name("memory_of_readers.py")
KINDS = ("report", "npy", "parquet", "arrow")
ALLOWED_GROWTH = 1.10
ALLOWED_MIB = 16  # the allocator's own ways


def run(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def peaks_mib(data_dir: Path, gigabytes: float) -> dict[str, float]:
    """Peak RssAnon of every way to read a trace of this size, which is gone afterwards."""
    try:
        run("make", data_dir, gigabytes)
        return {kind: int(run(kind, data_dir)) / 1024 for kind in KINDS}
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


def check_flat(small: dict[str, float], large: dict[str, float]) -> None:
    for kind in KINDS:
        print(f"{kind}: {small[kind]:.0f} MiB, then {large[kind]:.0f} MiB")
        assert large[kind] <= ALLOWED_GROWTH * small[kind] + ALLOWED_MIB, (kind, small, large)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_memory_of_report_export_and_arrow_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    large = float(os.environ.get("SOAK_GIGABYTES", "6"))
    check_flat(peaks_mib(tmp_path / "small", 1), peaks_mib(tmp_path / "large", large))
