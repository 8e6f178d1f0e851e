"""What keeps a layer from running, and which keywords keep a call from it: the errors name the cause."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger.errors import AliasNotCapturedError, InvalidInputError
from ml_debugger.training import ClassificationTracer
from plain_net import BATCH, IDS, Net, rows, stored

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, 4)


class Direct(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body.forward(x)))


class Branch(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x) if x[0, 0] > 0 else torch.zeros(len(x), 6)
        return self.head(self.act(hidden))


class InThread(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: results.append(self.body(x)))
        thread.start()
        thread.join()
        return self.head(self.act(results[0]))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleDict({"main": nn.Linear(4, 3), "aux": nn.Linear(4, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        self.aux = self.heads["aux"](x)
        return self.heads["main"](x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.attend(x[:, None], x[:, None], x[:, None])[0]
        return self.head(self.seen[:, 0])


@pytest.mark.parametrize(
    ("model", "path", "named"),
    [
        (Direct(), "body", ".forward()"),
        (InThread(), "body", "thread"),
        (Lists(), "blocks", "'blocks.0'"),
        (Lists(), "blocks[2]", "'blocks.2'"),
        (Lists(), 'heads["aux"]', "'heads.aux'"),
        (Attention(), "attend.out_proj", "'attend' itself"),
    ],
    ids=["forward", "thread", "list", "list[2]", "dict", "attention"],
)
def test_a_layer_that_does_not_run_is_refused_by_alias_with_the_likely_cause(
    model: nn.Module, path: str, named: str, trace: Any, x: torch.Tensor
) -> None:
    foreseen = pytest.warns(UserWarning, match="out_proj") if path == "attend.out_proj" else nullcontext()
    with foreseen:
        tracer = trace(model, {"hidden": path})
    with pytest.raises(AliasNotCapturedError, match="'hidden'") as caught:
        tracer(x, torch.zeros(BATCH), IDS)
    assert named in caught.value.hint
    assert rows(tracer) == 0
    assert tracer.stats().rows_submitted == 0


def test_a_layer_that_some_calls_skip_is_an_error_in_those_calls_alone(trace: Any) -> None:
    tracer = trace(Branch(), {"hidden": "body"})
    run, skip = torch.ones(BATCH, 4), -torch.ones(BATCH, 4)
    tracer(run, None, IDS)
    with pytest.raises(AliasNotCapturedError, match="'hidden'"):
        tracer(skip, None, IDS)
    tracer(run, None, IDS)
    assert rows(tracer) == 2 * BATCH


def test_layers_inside_of_lists_and_dicts_and_attention_itself_are_recorded(
    trace: Any, x: torch.Tensor
) -> None:
    model = Lists()
    tracer = trace(model, {"second": "blocks.1", "aux": "heads.aux"})
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["second"], model.blocks[1](model.blocks[0](x)))
    assert torch.equal(stored(tracer)["aux"], model.aux)
    attention = Attention()
    tracer = trace(attention, {"attend": "attend"}, "attention")
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer, "attention")["attend"], attention.seen)


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("epoch", "n_epoch"),
        ("n_epochs", "n_epoch"),
        ("dataset", "dataset_type"),
        ("split", "dataset_type"),
        ("labels", "ground_truth"),
        ("ids", "input_ids"),
        ("camra", "camera"),
    ],
)
def test_a_misspelt_keyword_of_the_call_names_what_was_meant(
    keyword: str, meant: str, x: torch.Tensor
) -> None:
    fields = [{"name": "camera", "type": "str", "default": "none"}]
    with ClassificationTracer(Net(), "net", "v1", {}, fields) as tracer:
        with pytest.raises(InvalidInputError, match=f"'{keyword}'") as caught:
            tracer(x, None, IDS, **{keyword: 3})
        assert f"did you mean {meant!r}" in caught.value.hint
        with pytest.raises(InvalidInputError, match="'zzz'") as caught:
            tracer(x, None, IDS, zzz=3)
        assert "did you mean" not in caught.value.hint
