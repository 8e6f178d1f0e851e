"""Runs a set of questions one after the other and writes what they find."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.harness.machine import ROOT, describe_machine
from benchmarks.harness.plot import MISSING, draw_bars
from benchmarks.harness.results import Findings, write_results
from benchmarks.harness.setting import Setting

SHARED_MEMORY = Path("/dev/shm")


def add_options(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """The options that every set of questions has."""
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=sorted(names), help="some of the questions")
    parser.add_argument("--memory-dir", type=Path, help="a folder on tmpfs (default: /dev/shm)")
    parser.add_argument("--disk-dir", type=Path, help="a folder on a disk (default: build/ of the checkout)")
    parser.add_argument("--seed", type=int, default=0)


def forget_environment() -> None:
    """From now on the options of the run count, and nothing else."""
    for name in [name for name in os.environ if name.startswith("MLD_")]:
        del os.environ[name]


def folder_in(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="mld-benchmark-", dir=parent))


def memory_parent(needed_bytes: int) -> Path:
    """Where tmpfs has room, else the disk; the results name the filesystem."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= needed_bytes:
        return SHARED_MEMORY
    print(f"{SHARED_MEMORY} has less than {needed_bytes >> 30} GiB: `tmpfs` lies on the disk as well")
    return ROOT / "build"


def run_questions(
    modules: Mapping[str, ModuleType],
    options: argparse.Namespace,
    device: torch.device,
    *,
    needed_bytes: int,
    is_quick: bool = False,
    is_full: bool = False,
) -> int:
    """Ask the chosen questions, write and print the answers; the number of those that failed."""
    failed = 0
    for name, module in modules.items():
        if options.only and name not in options.only:
            continue
        print(f"{name}: {module.QUESTION}", flush=True)
        memory_dir = folder_in(options.memory_dir or memory_parent(needed_bytes))
        disk_dir = folder_in(options.disk_dir or ROOT / "build")
        began = time.monotonic()
        try:
            setting = Setting(device, is_quick, memory_dir, disk_dir, options.seed, is_full)
            findings = module.measure(setting)
            path = write_results(
                options.out, module.NAME, module.QUESTION, describe_machine(device), findings
            )
            is_drawn = draw_bars(
                path.with_suffix(".svg"), module.QUESTION, findings.unit, findings.bars, findings.target
            )
        except Exception:
            traceback.print_exc()
            failed += 1
            continue
        finally:
            for folder in (memory_dir, disk_dir):
                shutil.rmtree(folder, ignore_errors=True)
            gc.collect()  # models and their hooks refer to each other
            if device.type == "cuda":
                torch.cuda.empty_cache()
        _show(findings)
        print(f"  {path} ({time.monotonic() - began:.0f} s){'' if is_drawn else '; ' + MISSING}", flush=True)
    return failed


def _show(findings: Findings) -> None:
    for bar in findings.bars:
        between = "" if bar.low is None else f"  [{bar.low:.4g}, {bar.high:.4g}]"
        print(f"  {bar.label:<55} {bar.value:.4g}{between} {findings.unit}")
