"""Classifiers written by hand: the usual architectures of vision, heads of every kind, and where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

BATCH, CLASSES = 4, 5


class Shaped(nn.Module):
    """A network from a function over its layers."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def resnet() -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    return Shaped(
        run,
        fc=nn.Linear(12, CLASSES),  # registered first, run last
        stem=conv(3, 8, 7, 2),
        layer1=BasicBlock(8, 8, 1),
        layer2=BasicBlock(8, 12, 2),
        avgpool=nn.AdaptiveAvgPool2d((1, 1)),
    )


def vgg() -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    return Shaped(
        run,
        features=nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 8), nn.MaxPool2d(2)),
        avgpool=nn.AdaptiveAvgPool2d((2, 2)),
        classifier=nn.Sequential(
            nn.Linear(32, 16),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(16, 14),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(14, CLASSES),
        ),
    )


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet() -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)

    return Shaped(
        run,
        features=nn.Sequential(conv(3, 8, 3, 4), Fire(8, 4, 6), Fire(12, 4, 6)),
        classifier=nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(12, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        ),
    )


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))

    return Shaped(
        run,
        features=nn.Sequential(conv(3, 8, 3, 2), DenseLayer(8), DenseLayer(12), nn.BatchNorm2d(16)),
        classifier=nn.Linear(16, CLASSES),
    )


class InvertedResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(width, 2 * width, 1),
            conv(2 * width, 2 * width, groups=2 * width),
            SqueezeExcite(2 * width),
            nn.Conv2d(2 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


def mobilenet_v2() -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean([2, 3]))

    return Shaped(
        run,
        features=nn.Sequential(conv(3, 8, 3, 2), InvertedResidual(8), conv(8, 20, 1)),
        classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(20, CLASSES)),
    )


def mobilenet_v3() -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    return Shaped(
        run,
        features=nn.Sequential(conv(3, 8, 3, 2), InvertedResidual(8)),
        avgpool=nn.AdaptiveAvgPool2d(1),
        classifier=nn.Sequential(
            nn.Linear(8, 18),
            nn.Hardswish(inplace=True),
            nn.Dropout(0.2, inplace=True),
            nn.Linear(18, CLASSES),
        ),
    )


def inception() -> nn.Module:
    """The auxiliary head runs before the main one, and is returned after it."""

    def run(self: Any, x: torch.Tensor) -> Any:
        x = self.body(x)
        auxiliary = self.aux(x.mean((2, 3))) if self.training else None
        return self.fc(torch.flatten(self.tail(x).mean((2, 3)), 1)), auxiliary

    return Shaped(
        run, body=conv(3, 8, 3, 2), aux=nn.Linear(8, CLASSES), tail=conv(8, 12), fc=nn.Linear(12, CLASSES)
    )


def auxiliary_last() -> nn.Module:
    """The auxiliary head runs after the main one, whose logits are scaled meanwhile."""

    def run(self: Any, x: torch.Tensor) -> Any:
        x = self.body(x)
        logits = self.fc(x) / 2
        return {"aux": self.aux(x), "logits": logits}

    return Shaped(run, body=nn.Linear(6, 8), aux=nn.Linear(8, CLASSES), fc=nn.Linear(8, CLASSES))


class ViT(nn.Module):
    """Its head is a module, or with ``bare`` a parameter of the model itself."""

    def __init__(self, bare: bool = False, token: bool = True) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, CLASSES, 8))  # as many tokens as classes
        self.embed = nn.Conv2d(3, 8, 8, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(8)
        self.token = token
        if bare:
            self.head = nn.Parameter(torch.randn(8, CLASSES))
        else:
            self.heads = nn.Sequential()
            self.heads.add_module("head", nn.Linear(8, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.norm(self.encoder(x))
        x = x[:, 0] if self.token else x.mean(1)
        return self.heads(x) if hasattr(self, "heads") else x @ self.head


class Cosine(nn.Module):
    """A bare weight, both sides normalised, a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 8))
        self.scale = nn.Parameter(torch.tensor(16.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


class SubCentres(nn.Module):
    """Three centres a class: the weight is three times as large as the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * CLASSES, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight)).view(-1, CLASSES, 3).amax(2)


class Prototypes(nn.Module):
    """Distances to bare prototypes, with elementwise operations only."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x.unsqueeze(1) - self.prototypes).square().sum(2)


class Functional(nn.Module):
    """Calls ``F.linear`` with the weight of a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


class Temperature(nn.Module):
    """Calibration behind the head: a parameter that makes no classes."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits / self.temperature


class LowRank(nn.Module):
    """A linear layer with an adapter beside it: the adapter's modules run last."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, CLASSES)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def lstm() -> nn.Module:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(self.embedding(x))
        return self.fc(hidden[-1])

    return Shaped(
        run,
        embedding=nn.Embedding(20, 6),
        lstm=nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True),
        fc=nn.Linear(8, CLASSES),
    )


def every_token() -> nn.Module:
    """A head over tokens that the attention pools afterwards, with weights computed last."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embedding(x))
        return (self.fc(x) * torch.softmax(self.attention(x.tanh()), 1)).sum(1)

    return Shaped(
        run,
        embedding=nn.Embedding(20, 8),
        body=nn.Linear(8, 8),
        attention=nn.Linear(8, 1),
        fc=nn.Linear(8, CLASSES),
    )


def several_heads() -> nn.Module:
    """One head a class, stacked: the last one counts."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body(x))
        return torch.cat([head(x) for head in self.heads], 1)

    heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(CLASSES))
    return Shaped(run, heads=heads, body=nn.Linear(6, 8))


def written_in_place() -> nn.Module:
    """Every head writes its column of a matrix that was there before."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body(x))
        logits = torch.zeros(len(x), CLASSES)
        for column, head in enumerate(self.heads):
            logits[:, column] = head(x).squeeze(1)
        return logits

    heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(CLASSES))
    return Shaped(run, heads=heads, body=nn.Linear(6, 8))


def tied() -> nn.Module:
    """The model multiplies by the weight of its own embedding: no module is given the features."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(self.body(self.embedding(x)).mean(1)), self.embedding.weight)

    return Shaped(run, embedding=nn.Embedding(20, 8), body=nn.Linear(8, 8), norm=nn.LayerNorm(8))


def frozen_head() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES), nn.Softplus())
    return model.requires_grad_(False)


def images() -> torch.Tensor:
    return torch.randn(BATCH, 3, 16, 16)


def rows() -> torch.Tensor:
    return torch.randn(BATCH, 6)


def tokens() -> torch.Tensor:
    return torch.randint(0, 20, (BATCH, 7))


def body(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A network whose features have 8 numbers a sample."""
    return lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), *layers)


@dataclass(frozen=True)
class Net:
    """One network.

    Attributes:
        name: Of the test.
        build: Makes it.
        batch: Makes its input.
        head: Path of its head; None if there is none to find.
        sample_shape: Shape of the features of one sample.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], torch.Tensor]
    head: str | None
    sample_shape: tuple[int, ...] = (8,)


def _linear() -> nn.Linear:
    return nn.Linear(8, CLASSES)


NETS = [
    Net("resnet", resnet, images, "fc", (12,)),
    Net("vgg", vgg, images, "classifier.6", (14,)),
    Net("squeezenet", squeezenet, images, "classifier.1", (12, 4, 4)),
    Net("densenet", densenet, images, "classifier", (16,)),
    Net("mobilenet v2", mobilenet_v2, images, "classifier.1", (20,)),
    Net("mobilenet v3", mobilenet_v3, images, "classifier.3", (18,)),
    Net("inception", inception, images, "fc", (12,)),
    Net("auxiliary head last", auxiliary_last, rows, "fc"),
    Net("vit", ViT, images, "heads.head"),
    Net("vit, mean of tokens", lambda: ViT(token=False), images, "heads.head"),
    Net("vit, bare head", lambda: ViT(bare=True), images, None),
    Net("vit, bare head, inside", lambda: nn.Sequential(ViT(bare=True), nn.Softplus()), images, None),
    Net("linear alone", lambda: nn.Linear(6, CLASSES), rows, "", (6,)),
    Net("mlp", body(_linear()), rows, "2"),
    Net("log softmax", body(_linear(), nn.LogSoftmax(1)), rows, "2"),
    Net("dropout", body(_linear(), nn.Dropout(0.1)), rows, "2"),
    Net("temperature", body(_linear(), Temperature()), rows, "2"),
    Net("batch norm behind", body(_linear(), nn.BatchNorm1d(CLASSES)), rows, "2"),
    Net("binary, squeezed", body(nn.Linear(8, 1), nn.Flatten(0)), rows, "2"),
    Net("bare parameter", body(Cosine()), rows, "2"),
    Net("sub-centres", body(SubCentres()), rows, "2"),
    Net("prototypes", body(Prototypes()), rows, "2"),
    Net("weight of an inner module", body(Functional()), rows, "2"),
    Net("weight norm", body(parametrizations.weight_norm(_linear())), rows, "2"),
    Net(
        "parametrized, no bias",
        body(parametrizations.orthogonal(nn.Linear(8, CLASSES, bias=False))),
        rows,
        "2",
    ),
    Net("spectral norm", body(parametrizations.spectral_norm(_linear())), rows, "2"),
    Net(
        "as many classes as features",
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)),
        rows,
        "1",
        (4,),
    ),
    Net("low rank", body(LowRank()), rows, "2.up", (2,)),
    Net(
        "bilinear",
        body(Shaped(lambda self, x: self.mix(x, x), mix=nn.Bilinear(8, 8, CLASSES))),
        rows,
        "2.mix",
    ),
    Net("several heads", several_heads, rows, f"heads.{CLASSES - 1}"),
    Net("written in place", written_in_place, rows, f"heads.{CLASSES - 1}"),
    Net("nothing but a norm", lambda: nn.BatchNorm1d(6), rows, "", (6,)),
    Net("frozen", frozen_head, rows, "2"),
    Net("lstm", lstm, tokens, "fc"),
    Net("every token", every_token, tokens, "fc", (7, 8)),
    Net("embedding bag", lambda: nn.Sequential(nn.EmbeddingBag(20, 8), _linear()), tokens, "1"),
    Net("tied", tied, tokens, None),
]
