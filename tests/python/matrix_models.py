"""Tiny models of the matrix: one of each kind that users train, and the layers of it that are watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES, TOKENS, WORDS = 8, 3, 5, 20


class Net(nn.Module):
    """A stem, a block that activation checkpointing may run again in backward, and a head."""

    reentrant: bool | None = None  # None: no checkpointing

    def __init__(self, stem: nn.Module, block: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = stem, block, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.reentrant is None or not self.training:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Positions(nn.Linear):
    """Tokens of numbers, each with a learnt position."""

    def __init__(self) -> None:
        super().__init__(4, WIDTH)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.position


class Encoder(nn.Module):
    """A layer of a transformer, put together by hand around torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.mlp = Residual(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.mlp(x + self.attention(y, y, y, need_weights=False)[0])


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Twice(nn.Module):
    """One module that runs twice, and is known under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.again = self.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.layer(x))


class Kind(NamedTuple):
    """What the matrix needs to know of a model.

    Attributes:
        words: How the page calls it.
        build: Makes one, with fresh weights.
        inputs: ``(samples, generator)`` to what a call is given.
        layers: What is watched, as ``target_layers`` names it.
        runs: How often each of these layers runs in a call.
    """

    words: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    layers: dict[str, str]
    runs: int = 1


def mlp() -> nn.Module:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.3))
    return Net(nn.Linear(4, WIDTH), block, nn.Linear(WIDTH, CLASSES))


def cnn() -> nn.Module:
    convolutions = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    return Net(nn.Conv2d(2, 4, 3, padding=1), Residual(*convolutions), head)


def transformer() -> nn.Module:
    return Net(Positions(), Encoder(), nn.Sequential(Mean(), nn.Linear(WIDTH, CLASSES)))


def lstm() -> nn.Module:
    return Net(nn.Embedding(WORDS, WIDTH), Recurrent(), nn.Sequential(Mean(), nn.Linear(WIDTH, CLASSES)))


def shared() -> nn.Module:
    return Net(nn.Linear(4, WIDTH), Twice(), nn.Linear(WIDTH, CLASSES))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=WIDTH,
            vocab_size=WORDS,
            max_position_embeddings=TOKENS,
            num_labels=CLASSES,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=WIDTH,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=CLASSES,
            hidden_dropout_prob=0.1,
        )
    )


def numbers(*shape: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda samples, generator: torch.randn(samples, *shape, generator=generator)


def words(samples: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(WORDS, (samples, TOKENS), generator=generator)


def masked_words(samples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    tokens = words(samples, generator)
    return {
        "input_ids": tokens,
        "attention_mask": (torch.arange(TOKENS) < TOKENS - 1).expand(samples, -1).long(),
    }


KINDS = {
    "mlp": Kind(
        "MLP, in-place ReLU, dropout",
        mlp,
        numbers(4),
        {"stem": "stem", "overwritten": "block.0", "dropped": "block.2"},
    ),
    "cnn": Kind(
        "CNN, batch norm, residual",
        cnn,
        numbers(2, 6, 6),
        {"stem": "stem", "overwritten": "block.1", "block": "block"},
    ),
    "transformer": Kind(
        "transformer layer with `MultiheadAttention`",
        transformer,
        numbers(TOKENS, 4),
        {"attention": "block.attention[0]", "gelu": "block.mlp.2", "block": "block"},
    ),
    "lstm": Kind("LSTM", lstm, words, {"embedding": "stem", "steps": "block.lstm[0]", "pooled": "head.0"}),
    "shared": Kind("one module run twice", shared, numbers(4), {"layer": "block.layer"}, runs=2),
    "bert": Kind(
        "`BertForSequenceClassification`",
        bert,
        masked_words,
        {"attention": "bert.encoder.layer.0.attention.output", "pooled": "bert.pooler"},
    ),
    "vit": Kind(
        "`ViTForImageClassification`",
        vit,
        numbers(1, 8, 8),
        {"embedding": "vit.embeddings", "attention": "vit.layers.0.attention[0]", "block": "vit.layers.1"},
    ),
}
NEEDS_TRANSFORMERS = ("bert", "vit")


def set_checkpointing(model: nn.Module, reentrant: bool) -> None:
    """Let backward compute the model's blocks again."""
    if isinstance(model, Net):
        model.reentrant = reentrant
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
