"""The models that are timed, and batches for them that lie on the device already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CLASSES = 1000


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut (He et al., 2015), in-place activations."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce = _conv_norm(inputs, width, 1, 1)
        self.conv = _conv_norm(width, width, 3, stride)
        self.expand = _conv_norm(width, outputs, 1, 1)
        is_same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if is_same else _conv_norm(inputs, outputs, 1, stride)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = self.activation(self.reduce(inputs))
        values = self.expand(self.activation(self.conv(values)))
        return self.activation(values + self.shortcut(inputs))


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """The shape of ResNet-50 with ``blocks=(3, 4, 6, 3)``: 2048 features, 1000 logits."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> None:
        super().__init__()
        stem = _conv_norm(3, width, 7, 2)
        layers: list[nn.Module] = [stem, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        channels = width
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(Bottleneck(channels, width << stage, stride))
                channels = 4 * (width << stage)
        self.body = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.body(inputs)).flatten(1))


class Mlp(nn.Module):
    """Linear layers in float32 with 512 features and 100 logits."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers, nn.Linear(width, 512), nn.ReLU(inplace=True))
        self.fc = nn.Linear(512, 100)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(inputs))


class Trainer:
    """Training steps of one model over a few batches on the device.

    Args:
        model: Is trained; lies on the device.
        inputs: Batches, on the device.
        classes: Of the logits.
        amp: Whether the forward runs under bfloat16 autocast.
    """

    def __init__(self, model: ResNet | Mlp, inputs: list[torch.Tensor], *, classes: int, amp: bool) -> None:
        self.model = model
        self.inputs = inputs
        device = inputs[0].device
        generator = torch.Generator().manual_seed(1)
        self.labels = [
            torch.randint(classes, (len(batch),), generator=generator).to(device) for batch in inputs
        ]
        self.ids = [str(number) for number in range(len(inputs[0]))]
        self.steps = 0
        self._amp = amp
        self._device = device
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run(self, steps: int, forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Do training steps; ``forward`` takes inputs and labels and returns the logits."""
        for _ in range(steps):
            inputs = self.inputs[self.steps % len(self.inputs)]
            labels = self.labels[self.steps % len(self.inputs)]
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._amp):
                logits = forward(inputs, labels)
                loss = nn.functional.cross_entropy(logits, labels)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self.steps += 1

    def plain(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A ``forward`` without anything."""
        logits: torch.Tensor = self.model(inputs)
        return logits


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
