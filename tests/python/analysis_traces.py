"""Small classifier traces for the tests of `Trace.analysis` and the report, and their rows as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from format_writer import Column, FormatWriter
from ml_debugger import open_trace
from ml_debugger.trace import Trace

SPLITS = ("train", "val")


@dataclass
class Rows:
    """All rows of a trace in the order of recording, one list entry a call."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def of(self, epoch: int | None, split: str) -> dict[str, np.ndarray]:
        """Rows of an epoch and split."""
        found = [call for call in self.calls if call["epoch"] == epoch and call["split"] == split]
        return {
            name: np.concatenate([call[name] for call in found])
            for name in ("ids", "logits", "labels", "features")
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The textbook formula in float64."""
    exact = logits.astype(np.float64)
    exact = exact - exact.max(axis=1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


def classifier_trace(
    data_dir: Path, *, epochs: int = 4, samples: int = 60, classes: int = 4, width: int = 6, seed: int = 0
) -> tuple[Trace, Rows]:
    """A classifier that gets better; samples are shuffled in every epoch, and every fourth is in ``val``."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=samples)
    centres = 3 * generator.normal(size=(classes, width))
    noise = generator.normal(size=(samples, width))
    writer, rows = FormatWriter(data_dir), Rows()
    number = 0
    for epoch in range(epochs):
        for split in SPLITS:
            own = [one for one in range(samples) if (one % 4 == 3) == (split == "val")]
            order = generator.permutation(own)
            for chosen in np.array_split(order, 3):
                features = (centres[labels[chosen]] + noise[chosen] + 0.1 * epoch).astype("<f4")
                logits = generator.normal(size=(len(chosen), classes)).astype("<f4")
                logits[np.arange(len(chosen)), labels[chosen]] += np.float32(epoch)
                ids = np.array([f"id{one}" for one in chosen])
                call = {
                    "epoch": epoch, "split": split, "ids": ids, "logits": logits, "labels": labels[chosen],
                    "features": features,
                }  # fmt: skip
                rows.calls.append(call)
                writer.call(
                    number,
                    ids.tolist(),
                    {"features": Column(features), "logits": Column(logits)},
                    {"label": Column(labels[chosen].astype("<i8"))},
                    epoch=epoch,
                    dataset_type=split,
                )
                number += 1
    writer.write()
    return open_trace("model", "v1", data_dir), rows


def one_call_trace(
    data_dir: Path,
    features: Mapping[str, Any],
    label: Any = None,
    *,
    ids: list[str] | None = None,
    epochs: tuple[int | None, ...] = (0, 1),
    names: list[str] | None = None,
) -> Trace:
    """The same rows in every epoch: features by column, labels or None, names of classes or None."""
    rows = len(next(iter(features.values())))
    writer = FormatWriter(data_dir)
    truths = {} if label is None else {"label": Column(label)}
    if names is not None:
        truths["name"] = Column(names, "str")
    for number, epoch in enumerate(epochs):
        columns = {name: Column(values) for name, values in features.items()}
        writer.call(number, ids or [f"s{row}" for row in range(rows)], columns, truths or None, epoch=epoch)
    writer.write()
    return open_trace("model", "v1", data_dir)
