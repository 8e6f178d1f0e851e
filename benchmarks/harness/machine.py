"""What a figure was measured on: hardware, versions, revision, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import ml_debugger
from ml_debugger import _core

ROOT = Path(__file__).resolve().parent.parent.parent


def missing_gpu() -> str | None:
    """One sentence about why there is no GPU to measure or test on; None if there is one."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: start from a Python whose torch has it, as in "
            "make PYTHON=..."
        )
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU on this machine (see nvidia-smi)"
    return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge a figure, ready for JSON; unknown things are null."""
    described: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": None,
        "gpu_driver": None,
        "gpu_memory_bytes": None,
        "gpu_count": 0,
        "package": ml_debugger.__version__,
        "lmdb": _core.LMDB_VERSION,
        **_revision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_bytes"] = properties.total_memory
        described["gpu_count"] = torch.cuda.device_count()
        described["gpu_driver"] = _driver_version()
    return described


def filesystem_of(path: Path) -> str | None:
    """Type of the filesystem that holds ``path``, such as ``tmpfs`` or ``ext4``."""
    found, length = None, -1
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, mount, kind, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= length:
            found, length = kind, len(mount)
    return found


def _output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _revision() -> dict[str, Any]:
    """The commit of the checkout and whether files differ from it; null outside of one."""
    changes = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "git_revision": _output_of("git", "rev-parse", "HEAD"),
        "git_changed": None if changes is None else bool(changes),
    }


def _cpu_name() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _driver_version() -> str | None:
    version = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if version:
        return version.splitlines()[0].strip()
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None
