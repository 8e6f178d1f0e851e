"""When rows are committed: as `commit_interval_s` says, also where that is more than the default."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

# Longer than the default interval of half a second, so that a writer that went by it would have committed.
LONGER_THAN_DEFAULT_S = 0.7


def test_rows_wait_as_long_as_commit_interval_s_allows(data_dir: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with ClassificationTracer(model, "m", "v", config=TracerConfig(commit_interval_s=3600.0)) as tracer:
        tracer(torch.zeros(2, 4), None, ["a", "b"])
        time.sleep(LONGER_THAN_DEFAULT_S)
        assert (tracer.stats().rows_in_flight, tracer.stats().commits) == (2, 0)
        tracer.flush()
        assert (tracer.stats().rows_committed, tracer.stats().commits) == (2, 1)
