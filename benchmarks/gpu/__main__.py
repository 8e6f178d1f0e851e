"""Runs the GPU benchmarks one after the other: ``python -m benchmarks.gpu --out FOLDER``.

``--device cpu --quick`` runs the code with tiny sizes on a CPU, to check the benchmarks themselves; it
measures nothing about a GPU, says so in the results, and its exit status is never 0.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from benchmarks.gpu import alternatives, bandwidth, hook_time, pinning, step_time
from benchmarks.gpu.setting import Setting
from benchmarks.harness.machine import ROOT, describe_machine, missing_gpu
from benchmarks.harness.plot import MISSING, draw_bars
from benchmarks.harness.results import write_results

# The longest one last, so that a run that is cut short has most of the answers.
BENCHMARKS = {
    module.NAME.removeprefix("gpu_"): module
    for module in (hook_time, pinning, bandwidth, alternatives, step_time)
}
SHARED_MEMORY = Path("/dev/shm")
NEEDED_BYTES = 6 << 30
REHEARSAL_STATUS = 3


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), help="some of the questions")
    parser.add_argument("--memory-dir", type=Path, help="a folder on tmpfs (default: /dev/shm)")
    parser.add_argument("--disk-dir", type=Path, help="a folder on a disk (default: build/ of the checkout)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to check the code")
    return parser.parse_args()


def folder_in(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="mld-benchmark-", dir=parent))


def memory_parent() -> Path:
    """Where tmpfs has room, else the disk; the results name the filesystem."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= NEEDED_BYTES:
        return SHARED_MEMORY
    print(f"{SHARED_MEMORY} has less than {NEEDED_BYTES >> 30} GiB: `tmpfs` lies on the disk as well")
    return ROOT / "build"


def run(options: argparse.Namespace) -> int:
    """Run the chosen benchmarks; the number of those that failed."""
    device = torch.device(options.device)
    names = [name for name in BENCHMARKS if not options.only or name in options.only]
    failed = 0
    for name in names:
        module = BENCHMARKS[name]
        print(f"{name}: {module.QUESTION}", flush=True)
        memory_dir = folder_in(options.memory_dir or memory_parent())
        disk_dir = folder_in(options.disk_dir or ROOT / "build")
        began = time.monotonic()
        try:
            findings = module.measure(Setting(device, options.quick, memory_dir, disk_dir, options.seed))
            machine = describe_machine(device)
            path = write_results(options.out, module.NAME, module.QUESTION, machine, findings)
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
        for bar in findings.bars:
            between = "" if bar.low is None else f"  [{bar.low:.4g}, {bar.high:.4g}]"
            print(f"  {bar.label:<55} {bar.value:.4g}{between} {findings.unit}")
        print(f"  {path} ({time.monotonic() - began:.0f} s){'' if is_drawn else '; ' + MISSING}", flush=True)
    return failed


def main() -> int:
    options = parse_options()
    for name in [name for name in os.environ if name.startswith("MLD_")]:
        del os.environ[name]  # the options of this run, and nothing else
    if options.device == "cuda":
        problem = missing_gpu()
        if problem is not None:
            print(f"the GPU benchmarks did not run: {problem}", file=sys.stderr)
            return 1
    failed = run(options)
    if failed:
        print(f"{failed} benchmarks failed, see above", file=sys.stderr)
        return 1
    if options.device == "cpu" or options.quick:
        print("A rehearsal: these figures say nothing about a GPU.")
        return REHEARSAL_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
