"""A small net, and what a trace of it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ml_debugger import open_trace
from ml_debugger.training import ClassificationTracer

BATCH = 4
IDS = list(range(BATCH))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body(x)))


def stored(tracer: ClassificationTracer, version: str = "v1") -> dict[str, Any]:
    tracer.flush()
    return open_trace("net", version).tensors("extracted_feature")


def rows(tracer: ClassificationTracer, version: str = "v1") -> int:
    tracer.flush()
    return open_trace("net", version).num_rows("extracted_feature")
