"""A call on a CUDA stream that is being captured into a graph is refused before the forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ml_debugger.errors import StreamCaptureError
from ml_debugger.training import ClassificationTracer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return self.fc(x)


def test_call_on_a_captured_stream_is_refused_before_the_forward(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    ids = ["a", "b"]
    inputs = torch.randn(2, 4)
    with ClassificationTracer(model, "net", "v1") as tracer:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(StreamCaptureError, match="captured"):
            tracer(inputs, torch.tensor([0, 1]), ids, dataset_type="train", n_epoch=0)
        assert model.forwards == 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        tracer(inputs, torch.tensor([0, 1]), ids, dataset_type="train", n_epoch=0)
        assert model.forwards == 1
        assert tracer.stats().rows_submitted == 2
