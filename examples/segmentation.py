"""Record a segmentation model by a tracer of your own: masks as labels, a score for every image.

Run it with `python examples/segmentation.py` where ml-debugger is installed. The images are made up:
nothing is downloaded.

A `ClassificationTracer` expects logits and one label (or one row of them) for each sample. Other tasks differ
in what a model is given and returns, and `_parse_and_save_io_data` is where a subclass says so: it runs after
each forward with what the call was given and what the model returned, may change both, and hands them on. The
user of the tracer still gets the model's own output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

MODEL_NAME, VERSION_NAME = "segmentation", "v1"
SIZE, CLASSES = 16, 3  # pixels of a side; background, square, disc
IMAGES, BATCH_SIZE = 96, 16
SEED = 0


class SegmentationNet(nn.Module):
    """A small encoder and decoder; returns a mapping, as the segmentation models of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        )
        self.decoder = nn.Sequential(
            nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(32, CLASSES, 3, padding=1)
        )
        self.auxiliary = nn.Conv2d(32, CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        encoded = self.encoder(images)
        return {"aux": self.auxiliary(encoded), "out": self.decoder(encoded)}


class SegmentationTracer(ClassificationTracer):
    """Records (C, H, W) logits, the mask as label, and `iou`: intersection over union of each class."""

    def __init__(self, model: nn.Module, model_name: str, version_name: str, **options: Any) -> None:
        iou = {"name": "iou", "type": "tensor", "dtype": "float32", "shape": [CLASSES]}
        super().__init__(model, model_name, version_name, additional_label_fields=[iou], **options)

    def _parse_and_save_io_data(
        self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
    ) -> None:
        logits = model_output["out"]  # (B, C, H, W); the auxiliary output is of no use later
        if ground_truth is not None:
            kwargs["iou"] = intersection_over_union(logits.argmax(1), ground_truth)
            ground_truth = ground_truth.flatten(1)  # a label is one number or one row of them
        super()._parse_and_save_io_data(model_input, logits, ground_truth, **kwargs)


def intersection_over_union(predicted: Tensor, masks: Tensor) -> Tensor:
    """(B, C) from (B, H, W) twice; 1 where a class is in neither."""
    ours, theirs = (F.one_hot(mask, CLASSES).flatten(1, 2).bool() for mask in (predicted, masks))
    union = (ours | theirs).sum(1)
    return torch.where(union > 0, (ours & theirs).sum(1) / union.clamp(min=1), 1.0)


def make_images() -> tuple[Tensor, Tensor]:
    """Noisy images (N, 1, H, W) with a square and a disc each, and their masks (N, H, W)."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images, masks = [], []
    for corner in torch.randint(0, SIZE - 6, (IMAGES, 4)).tolist():
        mask = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        mask[corner[0] : corner[0] + 6, corner[1] : corner[1] + 6] = 1
        mask[(rows - corner[2] - 3) ** 2 + (columns - corner[3] - 3) ** 2 <= 9] = 2
        images.append(mask / 2 + 0.3 * torch.randn(SIZE, SIZE))
        masks.append(mask)
    return torch.stack(images)[:, None], torch.stack(masks)


def train(tracer: SegmentationTracer, images: Tensor, masks: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(tracer.model.parameters(), lr=0.01)
    for epoch in range(epochs):
        for ids in torch.randperm(IMAGES).split(BATCH_SIZE):
            output = tracer(images[ids], masks[ids], ids, "train", epoch)
            loss = F.cross_entropy(output["out"], masks[ids]) + 0.4 * F.cross_entropy(
                output["aux"], masks[ids, ::2, ::2]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def report(data_dir: Path, epochs: int) -> bool:
    """Print how the scores went; whether they follow from the logits and masks that were stored."""
    trace = open_trace(MODEL_NAME, VERSION_NAME, data_dir=data_dir)
    agree = True
    for epoch in range(epochs):
        features = trace.tensors("extracted_feature", n_epoch=epoch, columns=["logits", "encoded"])
        truth = trace.tensors("ground_truth", n_epoch=epoch, columns=["input_id", "label", "iou"])
        masks = truth["label"].unflatten(1, (SIZE, SIZE))
        agree &= torch.equal(intersection_over_union(features["logits"].argmax(1), masks), truth["iou"])
        scores = truth["iou"].mean(1)
        worst = [
            f"{truth['input_id'][i]} ({scores[i]:.2f})" for i in np.argsort(scores.numpy(), kind="stable")[:3]
        ]
        print(f"epoch {epoch}: {len(scores)} images, mean IoU {scores.mean():.3f}, worst {', '.join(worst)}")
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--data-dir", type=Path, default=Path("mld_data"))
    options = parser.parse_args()
    torch.manual_seed(SEED)
    images, masks = make_images()
    config = TracerConfig(data_dir=options.data_dir)
    layers = {"encoded": "encoder"}
    with SegmentationTracer(
        SegmentationNet(),
        MODEL_NAME,
        VERSION_NAME,
        target_layers=layers,
        force_table_recreate=True,
        config=config,
    ) as tracer:
        train(tracer, images, masks, options.epochs)
    if not report(options.data_dir, options.epochs):
        print("FAILED: the stored scores are not those of the stored logits", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
