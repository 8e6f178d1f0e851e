"""Runs the GPU benchmarks one after the other: ``python -m benchmarks.gpu --out FOLDER``.

``--device cpu --quick`` runs the code with tiny sizes on a CPU, to check the benchmarks themselves; it
measures nothing about a GPU, says so in the results, and its exit status is never 0.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.gpu import alternatives, bandwidth, hook_time, pinning, step_time
from benchmarks.harness.machine import missing_gpu
from benchmarks.harness.runner import add_options, forget_environment, run_questions

# The longest one last, so that a run that is cut short has most of the answers.
BENCHMARKS = {
    module.NAME.removeprefix("gpu_"): module
    for module in (hook_time, pinning, bandwidth, alternatives, step_time)
}
NEEDED_BYTES = 6 << 30
REHEARSAL_STATUS = 3


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add_options(parser, list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to check the code")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    forget_environment()
    if options.device == "cuda":
        problem = missing_gpu()
        if problem is not None:
            print(f"the GPU benchmarks did not run: {problem}", file=sys.stderr)
            return 1
    device = torch.device(options.device)
    failed = run_questions(BENCHMARKS, options, device, needed_bytes=NEEDED_BYTES, is_quick=options.quick)
    if failed:
        print(f"{failed} benchmarks failed, see above", file=sys.stderr)
        return 1
    if options.device == "cpu" or options.quick:
        print("A rehearsal: these figures say nothing about a GPU.")
        return REHEARSAL_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
