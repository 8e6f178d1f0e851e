"""Question: how many instructions does recording take, and have they grown?

Method: callgrind counts the calls of `workload.py` and, apart from them, the commits behind them; a hook's
count is the difference between models with many and with few layers, less that of layers without hooks.
``python -m benchmarks.instructions`` compares with `counts.json` and fails when anything has grown by more
than a tenth; ``--record`` makes what is counted now the recorded counts of this environment (Python, torch,
LMDB, compiler).

Excluded: time, caches, the kernel's work (LMDB's system calls count as the few instructions of the call).
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.instructions.counting import (
    CannotCountError,
    count,
    environment,
    grown,
    record,
    recorded_counts,
    side_by_side,
)

NOT_COMPARED_STATUS = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write counts.json instead of comparing")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = parser.parse_args()
    try:
        counts = count()
    except CannotCountError as error:
        print(f"nothing was counted: {error}", file=sys.stderr)
        return 1
    before = recorded_counts().get(environment(), {})
    if options.json:
        print(json.dumps(counts, indent=1))
    else:
        print(side_by_side(before, counts))
    if options.record:
        record(counts)
        return 0
    if not before:
        print(f"not compared: no counts are recorded for {environment()} (--record writes them)")
        return NOT_COMPARED_STATUS
    complaints = grown(before, counts)
    print("\n".join(complaints) or "nothing has grown by more than a tenth")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
