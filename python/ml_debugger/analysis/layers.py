"""The passes over one layer: a space by the newest epoch, then drift, maps and neighbours in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ml_debugger.analysis.drift import Moments, frechet_distance, mean_shift
from ml_debugger.analysis.features import FeatureBatch, FeatureSpace, LayerReader
from ml_debugger.analysis.neighbours import Neighbours
from ml_debugger.analysis.predictions import Predictions
from ml_debugger.analysis.rows import kept_by_hash, positions
from ml_debugger.trace.dtypes import Array

if TYPE_CHECKING:
    from ml_debugger.trace.source import Source

# Epochs that features are read of, the first and the last among them.
MAX_EPOCHS = 12
MAX_MAP_ROWS = 3000
# Dataset types that are compared: the first ones.
MAX_TYPES = 8


class Layer:
    """What the passes over a layer have found.

    Attributes:
        name: Its alias.
        epochs: Epochs that were read.
        space: Its principal components.
        maps: By epoch, a bounded number of samples in the first two of them.
        neighbours: Of the newest epoch; None where there is no space.
        disagreement: Share of neighbours with another label, by row of `Predictions.samples`; NaN: unknown.
        skipped: Rows whose features are not finite.
    """

    def __init__(
        self, source: Source, name: str, predictions: Predictions, progress: Callable[[int], object]
    ) -> None:
        """Read the layer: the newest epoch twice, the other chosen ones once."""
        self.name = name
        self.epochs = spread(predictions.followed, MAX_EPOCHS)
        self.maps: dict[int, FeatureBatch] = {}
        self.neighbours: Neighbours | None = None
        self.skipped = 0
        self.disagreement: Array = np.full(predictions.samples.num_rows, np.nan, np.float32)
        self._types: list[str] = []
        self._moments: dict[tuple[int, str], Moments] = {}
        self._predictions = predictions
        self._reader = LayerReader(source, name, predictions.kind)
        self._progress = progress
        newest = self.epochs[-1] if self.epochs else -1
        self.space = FeatureSpace(self._reader, newest)
        if self.space.reference is None:
            return
        self.neighbours = Neighbours(self.space.reference)
        for epoch in self.epochs:
            self._read(epoch, self.neighbours if epoch == newest else None)
        self.neighbours.finish()

    def map_of(self, n_epoch: int | None) -> FeatureBatch | None:
        """A bounded number of samples of an epoch (None: the newest); None without any."""
        if self.space.reference is None:
            return None
        epoch = self.epochs[-1] if n_epoch is None else n_epoch
        if epoch not in self.maps:
            self._read(epoch, None)
        return self.maps.get(epoch)

    def notes(self) -> list[str]:
        """Sentences: what is missing, what was sampled."""
        name = f"Layer {self.name!r}"
        notes = [f"{name}: {self.space.problem}"] if self.space.problem else []
        if self.skipped:
            notes.append(f"{name}: {self.skipped} rows have features that are not finite; they are left out.")
        if self.space.reference is not None and self.space.share < 1:
            notes.append(
                f"{name}: neighbours are looked for among {len(self.space.reference.input_ids)} samples "
                f"({self.space.share:.1%} of the newest epoch), chosen by a hash of their ids."
            )
        if len(self.epochs) < len(self._predictions.followed):
            total = len(self._predictions.followed)
            notes.append(f"{name}: features were read of {len(self.epochs)} of {total} epochs.")
        return notes

    def drift(self) -> list[dict[str, object]]:
        """Rows of the table of drift; see `Analysis.drift`."""
        rows: list[dict[str, object]] = []
        types = sorted(self._types)
        for dataset_type in types:
            known = [epoch for epoch in self.epochs if (epoch, dataset_type) in self._moments]
            for earlier, later in itertools.pairwise(known):
                rows.append(self._compare("epochs", (earlier, dataset_type), (later, dataset_type)))
        for epoch in self.epochs:
            for first, second in itertools.combinations(types, 2):
                if (epoch, first) in self._moments and (epoch, second) in self._moments:
                    rows.append(self._compare("dataset types", (epoch, first), (epoch, second)))
        return rows

    def _compare(self, kind: str, first: tuple[int, str], second: tuple[int, str]) -> dict[str, object]:
        one, other = self._moments[first], self._moments[second]
        return {
            "layer": self.name,
            "between": kind,
            "from_epoch": first[0],
            "from_dataset_type": first[1],
            "to_epoch": second[0],
            "to_dataset_type": second[1],
            "mean_shift": mean_shift(one, other),
            "frechet_distance": frechet_distance(one, other),
            "rows": min(one.rows, other.rows),
        }

    def _read(self, epoch: int, neighbours: Neighbours | None) -> None:
        share = min(1.0, MAX_MAP_ROWS / max(self._reader.rows(epoch), 1))
        points: list[FeatureBatch] = []
        left = MAX_MAP_ROWS
        for batch in self._reader.batches(epoch):
            self.skipped += batch.skipped
            projected = self.space.project(batch)
            self._add_moments(epoch, projected)
            chosen = np.flatnonzero(kept_by_hash(projected.input_ids, share))[:left]
            left -= len(chosen)
            points.append(projected.take(chosen))
            if neighbours is not None:
                self._disagree(projected, neighbours.add(projected))
            self._progress(len(batch.input_ids))
        if points:
            self.maps[epoch] = FeatureBatch.join(points)

    def _add_moments(self, epoch: int, batch: FeatureBatch) -> None:
        for dataset_type, places in positions(batch.dataset_types):
            if dataset_type not in self._types:
                if len(self._types) == MAX_TYPES:
                    continue
                self._types.append(dataset_type)
            key = epoch, dataset_type
            if key not in self._moments:
                self._moments[key] = Moments(batch.vectors.shape[1])
            self._moments[key].add(batch.vectors[places])

    def _disagree(self, batch: FeatureBatch, shares: Array) -> None:
        samples = self._predictions.samples
        for place, share in enumerate(shares):
            row = samples.row_of(batch.dataset_types[place], batch.input_ids[place])
            if row is not None:
                self.disagreement[row] = share


def spread(epochs: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` of some epochs, evenly chosen, the first and the last among them."""
    if len(epochs) <= limit:
        return list(epochs)
    places = np.linspace(0, len(epochs) - 1, limit).round().astype(int)
    return [epochs[place] for place in places]
