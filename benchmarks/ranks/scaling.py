"""Question: does recording cost a rank more when there are more ranks on the machine?

Method: n processes (1, 2, 4, 8), each a rank with a tracer of its own in one data directory, train a small
model; steps come in blocks of 30, traced or not in random order, each drained inside its timed block. A
rank's figure is the median block of each kind; what is compared is CPU seconds (of all threads of the
process), since with more ranks than cores wall time measures how the kernel shares the cores. The ratio is
traced to untraced, the median over ranks.
Excluded: communication between ranks, and disks of more than one machine.

    python -m benchmarks.ranks.scaling --ranks 1 2 4 8
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCK_STEPS = 30


def run_rank(data_dir: Path, rank: int, blocks: int) -> dict[str, Any]:
    """What one rank measures."""
    import torch
    from torch import nn

    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, labels, ids = torch.randn(256, 256), torch.randint(10, (256,)), torch.arange(256)
    config = TracerConfig(data_dir=data_dir, durability="process", ring_bytes=32 << 20, data_rank=rank)
    found: dict[str, list[tuple[float, float]]] = {"traced": [], "untraced": []}
    with ClassificationTracer(model, "net", "v1", {"hidden": "3"}, config=config) as tracer:

        def block(kind: str) -> tuple[float, float]:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(BLOCK_STEPS):
                output = tracer(inputs, labels, ids, "train", 0) if kind == "traced" else model(inputs)
                optimizer.zero_grad()
                nn.functional.cross_entropy(output, labels).backward()
                optimizer.step()
            tracer.flush()
            return time.perf_counter() - wall, time.process_time() - cpu

        for kind in found:
            block(kind)
        order = [kind for kind in found for _ in range(blocks)]
        random.Random(rank).shuffle(order)
        for kind in order:
            found[kind].append(block(kind))
        stats = tracer.stats()
    lost = stats.rows_discarded + stats.rows_failed
    median = {
        f"{kind}_{name}": statistics.median(one[position] for one in times) / BLOCK_STEPS
        for kind, times in found.items()
        for position, name in enumerate(("wall_s", "cpu_s"))
    }
    return {**median, "rows_lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--blocks", type=int, default=8, help="traced blocks, and as many untraced ones")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data-dir", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(run_rank(options.data_dir, options.rank, options.blocks)))
        return
    print(f"{os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} before the start")
    print("| ranks | CPU ms a step, untraced | traced | ratio | ratio of wall time | rows lost |")
    print("|---|---|---|---|---|---|")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                sys.executable,
                "-m",
                "benchmarks.ranks.scaling",
                "--data-dir",
                str(Path(scratch) / "data"),
            ]
            command += ["--blocks", str(options.blocks), "--rank"]
            running = [
                subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True)
                for rank in range(ranks)
            ]
            found = [json.loads(process.communicate()[0]) for process in running]

        def median(name: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.median(one[name] for one in found)

        cpu = statistics.median(one["traced_cpu_s"] / one["untraced_cpu_s"] for one in found)
        wall = statistics.median(one["traced_wall_s"] / one["untraced_wall_s"] for one in found)
        print(
            f"| {ranks} | {1e3 * median('untraced_cpu_s'):.2f} | {1e3 * median('traced_cpu_s'):.2f} | "
            f"{cpu:.3f} | {wall:.3f} | {sum(one['rows_lost'] for one in found)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
