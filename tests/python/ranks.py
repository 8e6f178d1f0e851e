"""Runs a function in several processes that form a gloo group; none outlives its deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

DEADLINE_S = 90.0


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` in ``world_size`` new processes and return what they return, by rank.

    Args:
        function: Of the top level of a module, so that a new process finds it.
        world_size: How many processes.
        folder: For the rendezvous (a file, so no port can be taken) and for the results.
        *args: For the function; pickled.
    """
    context = multiprocessing.start_processes(
        _run, (function, world_size, folder, args), nprocs=world_size, join=False, start_method="spawn"
    )
    assert context is not None
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not context.join(timeout=max(0.01, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"ranks did not end within {DEADLINE_S} s"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(
    rank: int, function: Callable[..., Any], world_size: int, folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size
    )
    try:
        torch.save(function(rank, *args), folder / f"result-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
