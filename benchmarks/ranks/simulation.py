"""Question: what does a trace of 1,024 ranks cost its readers: files, open handles, memory, seconds?

Method: one process records as each rank in turn, a few small calls an epoch, into one data directory, so that
all that grows with the number of ranks is there and the bytes of rows are not what is measured. Then each
operation runs in a process of its own; a thread of it looks at its open descriptors every 2 ms.
Excluded: the network, and a file system shared by machines.

    python -m benchmarks.ranks.simulation --ranks 64 256 1024
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "count", "read one epoch", "read deduplicated", "export", "verify", "construct")
EPOCHS, ROWS = 2, 8


def generate(data_dir: Path, ranks: int, calls: int) -> float:
    """Record as every rank in turn; seconds a rank."""
    import torch

    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    os.environ.update(WORLD_SIZE=str(ranks), TORCHELASTIC_RUN_ID="simulation")
    started = time.perf_counter()
    for rank in range(ranks):
        os.environ["RANK"] = str(rank)
        config = TracerConfig(data_dir=data_dir, durability="process", ring_bytes=1 << 20)
        with ClassificationTracer(model, "net", "v1", {"hidden": "0"}, config=config) as tracer:
            for epoch in range(EPOCHS):
                for call in range(calls):
                    first = (call * ranks + rank) * ROWS
                    ids = range(first - (call == 0), first - (call == 0) + ROWS)  # one repeats another's
                    tracer(
                        torch.randn(ROWS, 8), torch.zeros(ROWS).long(), list(map(abs, ids)), "train", epoch
                    )
    return (time.perf_counter() - started) / ranks


class _Watch:
    """The most descriptors that this process had open."""

    def __init__(self) -> None:
        self.descriptors = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.descriptors = max(self.descriptors, len(os.listdir("/proc/self/fd")))


def measure(operation: str, data_dir: Path, ranks: int, calls: int) -> dict[str, Any]:
    """Run one operation and say what it took."""
    import torch

    from ml_debugger import TracerConfig, open_trace
    from ml_debugger.exporting import export_trace
    from ml_debugger.trace.verify import verify_trace
    from ml_debugger.training import ClassificationTracer

    (trace_dir,) = data_dir.glob("*/*")
    rows = EPOCHS * calls * ROWS * ranks
    with _Watch() as watch, tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        trace = open_trace("net", "v1", data_dir=data_dir)
        if operation == "count":
            assert trace.num_rows("extracted_feature") == rows
        elif operation == "read one epoch":
            assert len(trace.arrays("extracted_feature", n_epoch=1)["row_id"]) == rows // EPOCHS
        elif operation == "read deduplicated":
            assert len(trace.arrays("extracted_feature", n_epoch=1, dedupe=True)["row_id"]) < rows // EPOCHS
        elif operation == "export":
            export_trace(trace_dir, Path(scratch))
        elif operation == "verify":
            assert verify_trace(trace_dir).ok
        elif operation == "construct":  # what each rank of the next job does at its start
            os.environ.update(RANK="0", WORLD_SIZE=str(ranks), TORCHELASTIC_RUN_ID="next")
            model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
            config = TracerConfig(data_dir=data_dir, ring_bytes=1 << 20)
            ClassificationTracer(model, "net", "v1", {"hidden": "0"}, config=config).close()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # torch and numpy included
    return {"seconds": seconds, "descriptors": watch.descriptors, "memory_mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--calls", type=int, default=4, help="of each rank in each epoch")
    parser.add_argument("--operation", choices=OPERATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--data-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    if options.operation:
        print(json.dumps(measure(options.operation, options.data_dir, options.ranks[0], options.calls)))
        return
    results = []
    print("| ranks | files | disk MiB | operation | seconds | open descriptors | peak memory MiB |")
    print("|---|---|---|---|---|---|---|")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as scratch:
            data_dir = Path(scratch) / "data"
            generate(data_dir, ranks, options.calls)
            files = [path.stat() for path in data_dir.rglob("*") if path.is_file()]
            disk_mib = sum(status.st_blocks for status in files) * 512 / (1 << 20)
            for operation in OPERATIONS:
                command = [sys.executable, "-m", "benchmarks.ranks.simulation", "--ranks", str(ranks)]
                command += [
                    "--operation",
                    operation,
                    "--data-dir",
                    str(data_dir),
                    "--calls",
                    str(options.calls),
                ]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                results.append({"ranks": ranks, "files": len(files), "operation": operation, **found})
                print(
                    f"| {ranks} | {len(files)} | {disk_mib:.0f} | {operation} | {found['seconds']:.2f} | "
                    f"{found['descriptors']} | {found['memory_mib']:.0f} |",
                    flush=True,
                )
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
