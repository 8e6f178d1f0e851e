"""Question: is a tracer ahead of a Python thread that packs rows with `msgpack` and puts them into `lmdb`?

Method: that is the strongest of what people write themselves (`baselines` has the others), so it is compared
in every column, and not by a training step alone, in which most of a cost can hide. A model whose layers
compute nothing is called with small batches, with many hooks, and with 4 MiB a call; blocks of calls of both,
drained within their time, in random order within a round, in one process. On tmpfs where both survive a kill
at most (``durability="process"``, an LMDB that does not sync), on the disk, with fewer calls, where both
survive a power cut (``"power"``, a sync for each of its commits). Blocks that fill the ring once warm memory
up and do not count. Ratios are the rival's over ours by round, of wall time and of
CPU seconds of all threads: above 1 we are ahead. Everything is read back: the rows by their number, the last
call bit for bit; with a row lost there is no figure.

Excluded: opening, closing and reading back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baselines.base import Baseline
from benchmarks.baselines.lmdb_msgpack import DurableLmdbInThread, LmdbInThread
from benchmarks.baselines.tracer import DurableTracer, Tracer
from benchmarks.cpu.models import Layers
from benchmarks.cpu.training_overhead import one_thread
from benchmarks.harness import setting as settings
from benchmarks.harness.blocks import Arm, Block, ratio_of, run_blocks, step_seconds
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting

NAME = "cpu_rival"
QUESTION = "Is a tracer ahead of a Python thread with lmdb and msgpack, in every column?"
CLASSES = 10
WARM_BYTES = 320 << 20  # more than the ring has by default
MOST_WARM_ROUNDS = 8


@dataclass(frozen=True)
class Load:
    """What is recorded in each call.

    Attributes:
        layers: How many hooks.
        batch_size: Rows.
        width: float32 values a row and layer.
        calls: In a block on tmpfs. Few, since memory that tmpfs takes for the first time costs what the host
            of a virtual machine makes of it.
        disk_calls: In a block on the disk.
    """

    layers: int
    batch_size: int
    width: int
    calls: int
    disk_calls: int

    @property
    def call_bytes(self) -> int:
        """Of its layers."""
        return self.layers * self.batch_size * self.width * 4


LOADS = {
    "small batches, B = 1, 3 layers": Load(3, 1, 256, 2000, 200),
    "small batches, B = 32, 3 layers": Load(3, 32, 256, 500, 100),
    "many hooks, B = 32, 64 layers": Load(64, 32, 64, 60, 60),
    "sustained, 4 MiB a call": Load(1, 256, 4096, 16, 16),
}


class Calls:
    """One tool, and the batch that it is given again and again."""

    def __init__(self, tool: type[Baseline], load: Load, folder: Path, seed: int) -> None:
        self.values = torch.randn(load.batch_size, load.width, generator=torch.Generator().manual_seed(seed))
        self.labels = torch.arange(load.batch_size)
        self.ids = [f"sample-{row:08d}" for row in range(load.batch_size)]
        model = Layers(load.layers, torch.zeros(load.batch_size, CLASSES))
        folder.mkdir()
        self.tool = tool(model, model.paths(), folder)
        self.calls = 0

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.tool.forward(self.values, self.labels, self.ids)
        self.calls += calls

    def finish(self) -> None:
        """Close it and compare what it stored.

        Raises:
            WrongDataError: A row is missing or differs.
        """
        self.tool.close()
        stored = self.tool.read()
        rows, name = len(self.ids), self.tool.name
        if len(stored["input_id"]) != self.calls * rows:
            found = len(stored["input_id"])
            raise settings.WrongDataError(f"{name}: expected {self.calls * rows} rows, there are {found}")
        for column in self.tool.layers:
            last = torch.from_numpy(np.array(stored[column][-rows:]))
            settings.check_equal(last, self.values, f"{name}: {column}")


def measure(setting: Setting) -> Findings:
    summary: dict[str, Any] = {}
    samples: dict[str, list[Block]] = {}
    bars: list[Bar] = []
    places = {
        "tmpfs, survives a kill": (setting.memory_dir, Tracer, LmdbInThread),
        "disk, survives a power cut": (setting.disk_dir, DurableTracer, DurableLmdbInThread),
    }
    missing = LmdbInThread.missing()
    if missing is not None:
        raise ModuleNotFoundError(f"{missing} is not installed: `make bench-tools` installs what is compared")
    with one_thread():
        for load_name, load in LOADS.items():
            for place, (folder, ours, rival) in places.items():
                name = f"{load_name}, {place}"
                samples[name], summary[name] = time_load(setting, load, folder, ours, rival)
                for clock in ("wall", "cpu"):
                    ratio = summary[name][f"{clock}_ratio"]
                    bars.append(Bar(f"{name}: {clock}", ratio.median, ratio.low, ratio.high))
    return Findings(setting.described(), samples, summary, "rival / ours", bars, 1.0)


def time_load(
    setting: Setting, load: Load, folder: Path, ours: type[Tracer], rival: type[Baseline]
) -> tuple[list[Block], dict[str, Any]]:
    runs = {
        name: Calls(tool, load, folder / name, setting.seed)
        for name, tool in (("ours", ours), ("rival", rival))
    }
    calls = load.disk_calls if folder == setting.disk_dir else load.calls
    calls = 4 if setting.is_quick else calls
    rounds = 2 if setting.is_quick else 25 if setting.is_full else 9
    arms = {name: Arm(run.run, run.tool.drain) for name, run in runs.items()}
    warm_rounds = 1 if setting.is_quick else math.ceil(WARM_BYTES / (calls * load.call_bytes))
    run_blocks(arms, rounds=min(MOST_WARM_ROUNDS, warm_rounds), steps=calls, seed=setting.seed)
    blocks = run_blocks(arms, rounds=rounds, steps=calls, seed=setting.seed)
    for run in runs.values():
        run.finish()
    settings.empty_folder(folder)
    return blocks, {
        "wall_ratio": ratio_of(blocks, "rival", "ours"),
        "cpu_ratio": ratio_of(blocks, "rival", "ours", clock="cpu_s"),
        "call_bytes": load.call_bytes,
        "call_s": {name: step_seconds(blocks, name) for name in arms},
        "call_cpu_s": {name: step_seconds(blocks, name, clock="cpu_s") for name in arms},
        "losses": runs["ours"].tool.losses,
    }
