"""Processes that are ranks of a job by their environment, without a process group: no rank waits for another.

A rank runs a few lines of Python with `PRELUDE` before them; what it puts into ``result`` comes back.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from fork_server import ForkServer, Process

PRELUDE = """
import json, os, signal, time, warnings
from pathlib import Path
import torch
from ml_debugger import TracerConfig, errors
from ml_debugger.training import ClassificationTracer

folder, rank = Path(os.environ["FOLDER"]), int(os.environ.get("RANK", "0"))
result = {}

def open_tracer(version="v1", width=3, recreate=False, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, width))
    config = TracerConfig(durability="process", **options)
    layers = {"stem": "0"}
    return ClassificationTracer(model, "net", version, layers, force_table_recreate=recreate, config=config)

def call(tracer, number, epoch=0, dataset_type="train", rows=4):
    x = torch.full((rows, 4), 1000.0 * rank + number)
    ids = [f"r{rank}c{number}i{i}" for i in range(rows)]
    return tracer(x, torch.zeros(rows, dtype=torch.int64), ids, dataset_type, epoch)

def reach(name):
    (folder / f"{name}-{rank}").touch()

def wait_for(*names):
    deadline = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, names
        time.sleep(0.01)

def timed(function, *args, **kwargs):
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        returned = function(*args, **kwargs)
    result["seconds"] = time.monotonic() - started
    result["warnings"] = [str(warning.message) for warning in caught]
    result["returned"] = None if returned is None else str(returned)
    return returned
"""
_ENDING = """
(folder / f"result-{rank}.json.tmp").write_text(json.dumps(result))
os.replace(folder / f"result-{rank}.json.tmp", folder / f"result-{rank}.json")
import ml_debugger.tracer.lifecycle as lifecycle
lifecycle._registry.close_all()
"""


class Ranks:
    """Starts ranks of one job after the other, and ends what is left of them."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        folder.mkdir()
        self._server, self.folder, self.data_dir = server, folder, folder / "data"
        self._processes: list[Process] = []

    def start(self, rank: int, source: str, *, world_size: int = 2, **environment: str) -> Process:
        """Run ``source`` as a rank; ``environment`` says more, such as torchrun's variables."""
        job = {
            "kind": "script",
            "source": PRELUDE + source + _ENDING,
            "log": str(self.folder / f"log-{rank}"),
            "environment": {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "29500",
                "MLD_DATA_DIR": str(self.data_dir),
                "MLD_RING_BYTES": str(1 << 20),
                "FOLDER": str(self.folder),
                **environment,
            },
        }
        process = self._server.start(job)
        self._processes.append(process)
        return process

    def run(self, rank: int, source: str, **options: Any) -> dict[str, Any]:
        """Run ``source`` to its end."""
        return self.result(self.start(rank, source, **options), rank)

    def result(self, process: Process, rank: int) -> dict[str, Any]:
        """What a rank has put into ``result``; it must have ended well."""
        assert process.wait(60) == 0, process.output()
        found: dict[str, Any] = json.loads((self.folder / f"result-{rank}.json").read_text())
        return found

    def reached(self, name: str, rank: int, process: Process) -> None:
        """Wait until a rank has come to ``reach(name)``."""
        deadline = time.monotonic() + 60
        while not (self.folder / f"{name}-{rank}").exists():
            assert time.monotonic() < deadline and process.stop_state() not in "Z?", process.output()
            time.sleep(0.01)

    def tell(self, name: str) -> None:
        """Let ``wait_for(name)`` return."""
        (self.folder / name).touch()

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            if process.status is None:
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
                process.wait(30)
