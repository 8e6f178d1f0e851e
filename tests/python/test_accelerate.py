"""Accelerate: a tracer on what `prepare` returns, with the ids in the batches of the prepared loader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ml_debugger import TracerConfig, open_trace
from ml_debugger.integrations import CollateWithIds, WithIds
from ml_debugger.training import ClassificationTracer
from ranks import run_ranks

pytest.importorskip("accelerate", reason="accelerate is not installed")

SAMPLES = 22
INPUTS = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(SAMPLES) % 3
NAMES = [f"img{number}" for number in range(SAMPLES)]


def train(data_dir: Path, named: bool = False, **options: Any) -> bool:
    """The loop of a user of Accelerate; returns whether the model was wrapped."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, **options)
    dataset = WithIds(TensorDataset(INPUTS, LABELS), NAMES if named else None)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=CollateWithIds())
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    config = TracerConfig(data_dir=data_dir)
    with ClassificationTracer(model, "m", "v", {"hidden": "1"}, config=config) as tracer:
        for epoch in range(2):
            for inputs, labels, ids in loader:
                with accelerator.accumulate(model):
                    logits = tracer(inputs, labels, ids, "train", epoch)
                    accelerator.backward(nn.functional.cross_entropy(logits, labels))
                    optimizer.step()
                    optimizer.zero_grad()
    return model is not module


def rank_of_a_job(rank: int, data_dir: Path) -> list[bool]:
    # What `accelerate launch` says to its processes; the group is there already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return [train(data_dir / str(named), named) for named in (False, True)]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps what the first Accelerator of a process was told."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def check(data_dir: Path, names: list[str]) -> None:
    trace = open_trace("m", "v", data_dir=data_dir)
    for epoch in range(2):
        features = trace.arrays("extracted_feature", n_epoch=epoch, dedupe=True)
        truth = trace.arrays("ground_truth", n_epoch=epoch, dedupe=True)
        assert sorted(features["input_id"]) == sorted(names)
        label_of = dict(zip(truth["input_id"].tolist(), truth["label"].tolist(), strict=True))
        assert label_of == {name: int(LABELS[number]) for number, name in enumerate(names)}


@pytest.mark.parametrize("named", [False, True])
def test_prepared_loop_records_each_sample_once_an_epoch(data_dir: Path, named: bool) -> None:
    train(data_dir, named, gradient_accumulation_steps=3)
    check(data_dir, NAMES if named else list(map(str, range(SAMPLES))))
    assert open_trace("m", "v", data_dir=data_dir).num_rows("extracted_feature") == 2 * SAMPLES


def test_mixed_precision_of_a_prepared_model_is_recorded(data_dir: Path) -> None:
    train(data_dir, mixed_precision="bf16")
    tensors = open_trace("m", "v", data_dir=data_dir).tensors("extracted_feature")
    assert tensors["hidden"].dtype == torch.bfloat16
    assert tensors["logits"].dtype == torch.float32  # prepare() makes the model return that


def test_ranks_of_a_prepared_loop_share_the_samples(data_dir: Path, tmp_path: Path) -> None:
    assert run_ranks(rank_of_a_job, 2, tmp_path, data_dir) == [[True, True]] * 2
    for named in (False, True):
        folder = data_dir / str(named)
        check(folder, NAMES if named else list(map(str, range(SAMPLES))))
        assert len(list(folder.glob("*/*/rank-*"))) == 2
        # Padded, so that every rank has as many batches; dedupe takes the copies out.
        assert open_trace("m", "v", data_dir=folder).num_rows("extracted_feature", n_epoch=0) == 24
