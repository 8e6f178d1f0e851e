"""Nearest neighbours in feature space: samples far from all others, samples on top of another, odd labels.

The distance to the k-th neighbour as an outlier score is that of Ramaswamy, Rastogi and Shim (2000). All rows
of an epoch are compared with a bounded number of reference samples (`FeatureSpace.reference`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_debugger.analysis.features import FeatureBatch
from ml_debugger.extras import require
from ml_debugger.trace.dtypes import Array

NEIGHBOURS = 10
MAX_LISTED = 500


@dataclass(frozen=True, slots=True)
class Outlier:
    """A sample that is far from others; ``distance`` to its k-th neighbour in medians of that distance."""

    dataset_type: str
    input_id: str
    label: int
    prediction: int
    distance: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples that are close; ``distance`` in medians of the distance to the nearest neighbour."""

    first: tuple[str, str, int]  # dataset_type, input_id, label
    second: tuple[str, str, int]
    distance: float


class Neighbours:
    """Compares rows with the reference samples, and remembers the extremes.

    Attributes:
        outliers: At most `MAX_LISTED`, farthest first, after `finish`.
        pairs: At most `MAX_LISTED`, closest first, after `finish`.
    """

    def __init__(self, reference: FeatureBatch) -> None:
        module = require("sklearn.neighbors", "report", "the analysis of features")
        self._reference = reference
        self._count = min(NEIGHBOURS, len(reference.input_ids) - 1)
        self._search: Any = module.NearestNeighbors(algorithm="brute", n_jobs=1).fit(reference.vectors)
        names = zip(reference.dataset_types, reference.input_ids, strict=True)
        self._own = {name: place for place, name in enumerate(names)}
        distances, _ = self._nearest(reference)
        self._typical_last = float(np.median(distances[:, -1])) or 1.0
        self._typical_first = float(np.median(distances[:, 0])) or 1.0
        self._far: list[tuple[float, int, FeatureBatch, int]] = []
        self._close: dict[tuple[tuple[str, str], tuple[str, str]], Pair] = {}
        self._ties = itertools.count()
        self.outliers: list[Outlier] = []
        self.pairs: list[Pair] = []

    def add(self, batch: FeatureBatch) -> Array:
        """Compare some rows; returns the share of each one's neighbours with another label, or NaN."""
        if not batch.input_ids:
            return np.empty(0, np.float32)
        distances, places = self._nearest(batch)
        self._note_far(batch, distances[:, -1])
        self._note_close(batch, distances[:, 0], places[:, 0])
        labels = self._reference.labels[places]
        known = labels >= 0
        differing = (known & (labels != batch.labels[:, None])).sum(axis=1)
        usable = known.any(axis=1) & (batch.labels >= 0)
        shares: Array = np.where(usable, differing / np.maximum(known.sum(axis=1), 1), np.nan)
        return shares.astype(np.float32)

    def finish(self) -> None:
        """Sort what was found."""
        self.outliers = [
            Outlier(
                batch.dataset_types[place],
                batch.input_ids[place],
                int(batch.labels[place]),
                int(batch.predictions[place]),
                distance,
            )
            for distance, _, batch, place in self._far
        ]
        self.pairs = sorted(self._close.values(), key=lambda pair: pair.distance)

    def _nearest(self, batch: FeatureBatch) -> tuple[Array, Array]:
        """Distances to, and places of, the nearest reference samples other than the row itself; rising."""
        distances, places = self._search.kneighbors(batch.vectors, self._count + 1)
        names = zip(batch.dataset_types, batch.input_ids, strict=True)
        own = np.fromiter((self._own.get(name, -1) for name in names), np.int64, len(batch.input_ids))
        distances = np.where(places == own[:, None], np.inf, distances)
        order = np.argsort(distances, axis=1, kind="stable")[:, : self._count]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(places, order, 1)

    def _note_far(self, batch: FeatureBatch, distances: Array) -> None:
        chosen = np.argsort(-distances, kind="stable")[:MAX_LISTED]
        kept = batch.take(chosen)  # not the whole batch
        ratios = (distances[chosen] / self._typical_last).tolist()
        self._far += [(ratio, next(self._ties), kept, place) for place, ratio in enumerate(ratios)]
        self._far.sort(key=lambda one: (-one[0], one[1]))
        del self._far[MAX_LISTED:]

    def _note_close(self, batch: FeatureBatch, distances: Array, places: Array) -> None:
        reference = self._reference
        for row in np.argsort(distances, kind="stable")[: 2 * MAX_LISTED].tolist():
            place = int(places[row])
            one = (batch.dataset_types[row], batch.input_ids[row], int(batch.labels[row]))
            other = (
                reference.dataset_types[place],
                reference.input_ids[place],
                int(reference.labels[place]),
            )
            first, second = sorted((one, other))
            pair = Pair(first, second, float(distances[row]) / self._typical_first)
            self._close.setdefault((first[:2], second[:2]), pair)
        if len(self._close) > MAX_LISTED:
            closest = sorted(self._close.items(), key=lambda entry: entry[1].distance)
            self._close = dict(closest[:MAX_LISTED])
