"""MultiheadAttention and TransformerEncoder: what hooks do not see, or change, is said and never silent."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig
from ml_debugger.errors import AliasNotCapturedError, InvalidInputError
from ml_debugger.training import ClassificationTracer

BATCH, TOKENS, WIDTH = 4, 5, 8


class Attending(nn.Module):
    def __init__(self, attention: type[nn.Module] = nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention(WIDTH, 2, batch_first=True)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.attention(x, x, x)[0].mean(1))


class Encoding(nn.Module):
    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.fc(self.encoder(x, src_key_padding_mask=mask).mean(1))


@pytest.fixture
def make(data_dir: Path) -> Iterator[Any]:
    made = []

    def tracer(model: nn.Module, layer: str) -> ClassificationTracer:
        made.append(ClassificationTracer(model, "net", "v1", {"seen": layer}, config=TracerConfig()))
        return made[-1]

    yield tracer
    for each in made:
        each.close()


def tokens() -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


def padded() -> dict[str, torch.Tensor]:
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[1, 3:] = True
    return {"x": tokens(), "mask": mask}


@pytest.mark.parametrize("training", [True, False])
def test_out_proj_of_attention_is_warned_about_and_never_silent(training: bool, make: Any) -> None:
    with pytest.warns(UserWarning, match="'seen'.*never runs.*'attention'"):
        tracer = make(Attending().train(training), "attention.out_proj")
    with pytest.raises(AliasNotCapturedError, match="seen"):
        tracer(tokens(), None, range(BATCH))
    assert tracer.stats().rows_submitted == 0


def test_attention_itself_is_the_remedy(make: Any) -> None:
    model, given = Attending(), tokens()
    tracer = make(model, "attention")
    tracer(given, None, range(BATCH))
    expected = model.attention(given, given, given)[0]
    assert torch.equal(tracer.get_hooked_features("seen"), expected)


def test_attention_that_calls_its_projection_is_not_warned_about(make: Any) -> None:
    class Calling(nn.MultiheadAttention):
        def forward(self, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
            return self.out_proj(query), None

    model, given = Attending(Calling), tokens()
    tracer = make(model, "attention.out_proj")
    tracer(given, None, range(BATCH))
    assert torch.equal(tracer.get_hooked_features("seen"), model.attention.out_proj(given))


def test_watching_an_encoder_layer_warns_that_it_leaves_its_fused_path(make: Any) -> None:
    with pytest.warns(UserWarning, match="'encoder.layers.1'.*fused path.*enable_nested_tensor=False"):
        make(Encoding(nested=False), "encoder.layers.1.linear1")


def test_encoder_itself_is_watched_without_a_warning(make: Any) -> None:
    model, given = Encoding(nested=True).eval(), padded()
    tracer = make(model, "encoder")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        expected = model.encoder(given["x"], src_key_padding_mask=given["mask"])
        tracer(given, None, range(BATCH))
    assert torch.equal(tracer.get_hooked_features("seen"), expected)


@pytest.mark.parametrize("layer", ["encoder.layers.0", "encoder.layers.1.norm2"])
def test_nested_tensors_of_a_padded_encoder_are_refused_by_name(layer: str, make: Any) -> None:
    with pytest.warns(UserWarning, match="fused path"):
        tracer = make(Encoding(nested=True).eval(), layer)
    with torch.no_grad(), pytest.raises(InvalidInputError, match=r"'seen'.*nested"):
        tracer(padded(), None, range(BATCH))
    assert tracer.stats().rows_submitted == 0


def test_padded_encoder_without_nested_tensors_is_recorded(make: Any) -> None:
    model, given, seen = Encoding(nested=False).eval(), padded(), []
    with pytest.warns(UserWarning, match="fused path"):
        tracer = make(model, "encoder.layers.0")
    model.encoder.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with torch.no_grad():
        tracer(given, None, range(BATCH))
    assert torch.equal(tracer.get_hooked_features("seen"), seen[0])
