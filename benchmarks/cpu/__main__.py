"""Runs the CPU benchmarks one after the other: ``python -m benchmarks.cpu``; ``--full`` takes an hour."""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.cpu import (
    baselines,
    drop,
    export,
    hook_cost,
    import_time,
    rival,
    scaling,
    sustained,
    training_overhead,
    upload,
)
from benchmarks.harness.allocator import keep_freed_memory
from benchmarks.harness.runner import add_options, forget_environment, run_questions

BENCHMARKS = {
    module.NAME.removeprefix("cpu_"): module
    for module in (
        hook_cost,
        training_overhead,
        sustained,
        rival,
        export,
        drop,
        upload,
        scaling,
        import_time,
        baselines,
    )
}
NEEDED_BYTES = 4 << 30
REHEARSAL_STATUS = 3


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    add_options(parser, list(BENCHMARKS))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="more rounds, sizes and calls (an hour)")
    size.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    forget_environment()
    if not keep_freed_memory():
        print("no mallopt: steps may differ by what the allocator gives back to the kernel", file=sys.stderr)
    failed = run_questions(
        BENCHMARKS,
        options,
        torch.device("cpu"),
        needed_bytes=NEEDED_BYTES,
        is_quick=options.quick,
        is_full=options.full,
    )
    if failed:
        print(f"{failed} benchmarks failed, see above", file=sys.stderr)
        return 1
    if options.quick:
        print("A rehearsal: these figures say nothing.")
        return REHEARSAL_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
