"""What a rank of the torchrun tests runs: ``torchrun torchrun_program.py SCENARIO FOLDER``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SAMPLES, BATCH, EPOCHS = 23, 3, 2


def dataset() -> TensorDataset:
    """Inputs, labels, ids; 23 is a multiple of no number of ranks, so the sampler pads."""
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(5))
    return TensorDataset(inputs, torch.arange(SAMPLES) % 3, torch.arange(SAMPLES))


def make_model() -> nn.Module:
    """Its first layer returns its input, so that what must be stored is known."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def train_epoch(
    model: nn.Module, tracer: object, epoch: int, batch_size: int = BATCH, die_at: int | None = None
) -> None:
    """Train with gradients that are exchanged every second step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler: DistributedSampler[object] = DistributedSampler(dataset(), shuffle=True, seed=1)
    sampler.set_epoch(epoch)
    for step, (inputs, labels, ids) in enumerate(DataLoader(dataset(), batch_size, sampler=sampler)):
        if step == die_at:
            tracer.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        with model.no_sync() if step % 2 == 0 else contextlib.nullcontext():
            logits = tracer(inputs, labels, ids, "train", epoch)
            nn.functional.cross_entropy(logits, labels).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


def evaluate(tracer: object, rank: int, world_size: int, epoch: int) -> None:
    """Ranks have different numbers of batches, the last one none at all in epoch 1."""
    shard = list(range(rank, SAMPLES, world_size))
    if epoch == 1:
        shard = list(range(SAMPLES))[rank :: world_size - 1] if rank < world_size - 1 else []
    inputs, labels, ids = dataset()[:]
    with torch.no_grad():
        for start in range(0, len(shard), BATCH):
            rows = shard[start : start + BATCH]
            tracer(inputs[rows], labels[rows], ids[rows], "val", epoch)


def main(scenario: str, folder: Path) -> None:
    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    model = nn.parallel.DistributedDataParallel(make_model())
    config = TracerConfig(data_dir=folder / "data", ring_bytes=1 << 20, durability="process")
    exported = None
    with ClassificationTracer(model, "net", "v1", {"stem": "0", "hidden": "2"}, config=config) as tracer:
        if scenario == "restart":
            dies = restart == 0 and rank == 1
            for epoch in range(restart, EPOCHS):  # epoch 0 was finished, a checkpoint would say
                train_epoch(model, tracer, epoch, batch_size=1, die_at=2 if dies and epoch == 1 else None)
        else:
            for epoch in range(EPOCHS):
                train_epoch(model, tracer, epoch)
                evaluate(tracer, rank, world_size, epoch)
        dist.barrier()  # export sees what was handed over before
        exported = tracer.export(folder / "out.zip")
        if scenario == "hosts":
            tracer.wait_for_save()  # MLD_API_ENDPOINT says where
        dist.barrier()  # no rank writes while the next looks
    found = {"rank": rank, "exported": None if exported is None else str(exported), "restart": restart}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    finally:
        dist.destroy_process_group()
