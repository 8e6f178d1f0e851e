"""What a killed process leaves, and what the next tracer on the same trace makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ml_debugger import open_trace
from ml_debugger.training import ClassificationTracer

KILLED = """
import os, signal, torch
from ml_debugger.training import ClassificationTracer
tracer = ClassificationTracer(torch.nn.Sequential(torch.nn.Linear(4, 3)), "net", "v1", {"head": "0"})
tracer(torch.ones(2, 4), [0, 1], ["a", "b"], n_epoch=0)
tracer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def restarted(data_dir: Path) -> Any:
    """A tracer on a trace whose last writer was killed after a flush."""
    child = subprocess.run([sys.executable, "-c", KILLED], check=False, timeout=60)
    assert child.returncode == -9
    assert not list(data_dir.glob("*/*/rank-*/epoch-*/*/sealed.json"))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with ClassificationTracer(model, "net", "v1", {"head": "0"}) as tracer:
        yield tracer


def test_segments_of_a_killed_process_are_sealed_without_counts(restarted: Any, data_dir: Path) -> None:
    (sealed,) = data_dir.glob("*/*/rank-*/epoch-*/*/sealed.json")
    assert json.loads(sealed.read_text()) == {"format_version": 1}
    assert open_trace("net", "v1").num_rows("ground_truth", n_epoch=0) == 2


def test_dropping_an_absent_epoch_after_a_kill_gives_zeros_for_both_tables(restarted: Any) -> None:
    assert restarted.drop_epoch_data(7) == {"extracted_feature": 0, "ground_truth": 0}


def test_rows_of_a_killed_process_are_dropped_with_their_epoch(restarted: Any) -> None:
    restarted(torch.ones(1, 4), [2], ["c"], n_epoch=0)
    assert restarted.drop_epoch_data(0, attempt=0) == {"extracted_feature": 2, "ground_truth": 2}
    assert open_trace("net", "v1").arrays("extracted_feature")["input_id"].tolist() == ["c"]
