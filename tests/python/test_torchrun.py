"""Jobs that torchrun starts: what all ranks recorded, read as one trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ml_debugger import load_export, open_trace
from ml_debugger.trace.trace import Trace
from ml_debugger.trace.verify import verify_trace
from torchrun_program import EPOCHS, SAMPLES, dataset

pytest.importorskip("torch.distributed.run")

FEATURES, LABELS = "extracted_feature", "ground_truth"
PROGRAM = Path(__file__).with_name("torchrun_program.py")
DEADLINE_S = 240


def torchrun(world_size: int, scenario: str, folder: Path, *options: str) -> list[dict[str, object]]:
    """Run the program to its end; what its ranks wrote, by rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={world_size}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id=job-{os.getpid()}"]
    command += ["--monitor-interval=0.1", *options, str(PROGRAM), scenario, str(folder)]
    done = subprocess.run(
        command,
        # A store of its own for each restart: in the shared one gloo finds the dead (torch 2.13).
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning: rank" not in done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]


def check_is_the_dataset(trace: Trace, dataset_type: str, epoch: int) -> None:
    """Every sample once, in both tables, bit for bit."""
    inputs, labels, _ = dataset()[:]
    for table, column, expected in ((FEATURES, "stem", inputs), (LABELS, "label", labels)):
        rows = trace.tensors(
            table, n_epoch=epoch, dataset_type=dataset_type, dedupe=True, columns=["input_id", column]
        )
        order = [int(text) for text in rows["input_id"]]
        assert sorted(order) == list(range(SAMPLES))
        assert torch.equal(rows[column], expected[order])


def check_a_job(world_size: int, folder: Path) -> None:
    found = torchrun(world_size, "epochs", folder)
    assert [one["exported"] is None for one in found] == [False] + [True] * (world_size - 1)
    live = open_trace("net", "v1", data_dir=folder / "data")
    for trace in (live, load_export(folder / "out.zip")):
        assert trace.epochs == [0, 1]
        assert trace.attempts == [0]
        for epoch in range(EPOCHS):
            for dataset_type in ("train", "val"):
                check_is_the_dataset(trace, dataset_type, epoch)
    padded = -(-SAMPLES // world_size) * world_size
    assert live.num_rows(FEATURES, n_epoch=0, dataset_type="train") == padded
    assert live.num_rows(FEATURES, n_epoch=1, dataset_type="val") == SAMPLES
    (trace_dir,) = (folder / "data").glob("*/*")
    report = verify_trace(trace_dir)
    assert report.problems == []
    assert report.rows == EPOCHS * (padded + SAMPLES)


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_of_all_ranks_are_the_dataset_without_the_samplers_padding(
    world_size: int, tmp_path: Path
) -> None:
    check_a_job(world_size, tmp_path)


@pytest.mark.soak
def test_rows_of_eight_ranks_are_the_dataset(tmp_path: Path) -> None:
    check_a_job(8, tmp_path)


def check_a_restart(world_size: int, folder: Path) -> None:
    found = torchrun(world_size, "restart", folder, "--max-restarts=1")
    assert [one["restart"] for one in found] == [1] * world_size
    trace = open_trace("net", "v1", data_dir=folder / "data")
    assert trace.attempts == [0, 1]
    rows = trace.arrays(FEATURES, n_epoch=1, columns=["row_id"])["row_id"]
    by_attempt = Counter(((rows >> 36) & 0x1FFF).tolist())
    padded = -(-SAMPLES // world_size) * world_size
    assert by_attempt[1] == padded
    assert 0 < by_attempt[0] < padded  # the first try was cut short, and is still told apart
    check_is_the_dataset(trace, "train", 1)
    newest = trace.arrays(FEATURES, n_epoch=1, dedupe=True, columns=["row_id"])["row_id"]
    assert np.array_equal(np.unique((newest >> 36) & 0x1FFF), [1])
    exported = load_export(folder / "out.zip").arrays(FEATURES, n_epoch=1, columns=["row_id"])["row_id"]
    assert sorted(exported.tolist()) == sorted(newest.tolist())


def test_a_rank_killed_in_mid_epoch_is_restarted_and_its_first_try_is_not_mixed_in(tmp_path: Path) -> None:
    check_a_restart(2, tmp_path)


@pytest.mark.soak
def test_a_job_of_eight_ranks_is_restarted(tmp_path: Path) -> None:
    check_a_restart(8, tmp_path)
