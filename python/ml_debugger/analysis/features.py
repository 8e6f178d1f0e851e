"""The features of a layer as vectors: pooled, projected, and gathered for a bounded number of samples.

A layer whose rows are no vectors is pooled: tokens (T, C) to their mean over T, maps (C, H, W, ...) to their
mean over everything behind the channel. Vectors wider than `MAX_WIDTH` go through a seeded sparse random
projection (Li, Hastie and Church 2006), which keeps distances. What is compared are the first principal
components of a sample of the newest epoch, on which all epochs are projected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.analysis.outputs import LOGITS, OutputKind
from ml_debugger.analysis.rows import LABEL, LabelledBatch, LabelledRows, kept_by_hash
from ml_debugger.extras import require
from ml_debugger.trace.arguments import RowFilter
from ml_debugger.trace.dtypes import Array

if TYPE_CHECKING:
    from ml_debugger.trace.source import Source

MAX_WIDTH = 4096
MAX_COMPONENTS = 32
MAX_REFERENCE_ROWS = 10_000
_MAX_REFERENCE_VALUES = 1 << 23
_SEED = 0


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Vectors of some rows of an epoch; rows whose features are not finite are left out.

    Attributes:
        dataset_types: One text a row.
        input_ids: One text a row.
        vectors: float32 (rows, width).
        labels: Class of each row, int64; -1: none.
        predictions: Likewise; -1: none.
        skipped: Rows that were left out.
    """

    dataset_types: list[str]
    input_ids: list[str]
    vectors: Array
    labels: Array
    predictions: Array
    skipped: int = 0

    def take(self, places: Array) -> FeatureBatch:
        """Some of the rows."""
        return FeatureBatch(
            [self.dataset_types[place] for place in places],
            [self.input_ids[place] for place in places],
            self.vectors[places],
            self.labels[places],
            self.predictions[places],
        )

    @classmethod
    def join(cls, batches: list[FeatureBatch]) -> FeatureBatch:
        """All rows of some batches, at least one."""
        return cls(
            [name for batch in batches for name in batch.dataset_types],
            [name for batch in batches for name in batch.input_ids],
            np.concatenate([batch.vectors for batch in batches]),
            np.concatenate([batch.labels for batch in batches]),
            np.concatenate([batch.predictions for batch in batches]),
        )


class LayerReader:
    """Reads a layer as vectors."""

    def __init__(self, source: Source, layer: str, kind: OutputKind) -> None:
        self._source = source
        self._rows = LabelledRows(source)
        self._layer = layer
        self._kind = kind
        self._projection: Any = None

    def rows(self, n_epoch: int) -> int:
        """Rows of an epoch."""
        return self._source.select_tables(RowFilter(n_epoch, dedupe=True))[0].rows

    def batches(self, n_epoch: int) -> Iterator[FeatureBatch]:
        """Vectors of an epoch, batch by batch."""
        for batch in self._rows.batches(n_epoch, [self._layer, LOGITS], [LABEL]):
            values = batch.columns.get(self._layer)
            if values is None:
                continue
            vectors, valid = pool(values)
            if vectors.shape[1] > MAX_WIDTH:
                vectors = self._projected(vectors)
            yield self._described(batch, vectors, valid)

    def _described(self, batch: LabelledBatch, vectors: Array, valid: Array) -> FeatureBatch:
        scores = self._kind.score(batch)
        places = np.flatnonzero(valid)
        whole = FeatureBatch(
            batch.dataset_types, batch.input_ids, vectors, scores.labels, scores.predictions
        ).take(places)
        skipped = len(valid) - len(places)
        return FeatureBatch(
            whole.dataset_types, whole.input_ids, whole.vectors, whole.labels, whole.predictions, skipped
        )

    def _projected(self, vectors: Array) -> Array:
        if self._projection is None:
            module = require("sklearn.random_projection", "report", "the analysis of features")
            projection = module.SparseRandomProjection(n_components=MAX_WIDTH // 4, random_state=_SEED)
            self._projection = projection.fit(np.zeros((1, vectors.shape[1]), np.float32))
        projected: Array = self._projection.transform(vectors).astype(np.float32, copy=False)
        return projected


def pool(values: Array) -> tuple[Array, Array]:
    """Vectors of rows of any shape, float32 (rows, width), and which of them are finite.

    Rows of differing shape (an object array) are pooled one by one; those of another width than most are not
    valid, as are rows without the column.
    """
    if values.dtype != object:
        vectors = _pooled(values)
        return vectors, _finite(vectors)
    rows = [None if row is None else _pooled(np.asarray(row)[None])[0] for row in values]
    widths = [len(row) for row in rows if row is not None]
    width = max(set(widths), key=widths.count, default=0)
    vectors = np.full((len(rows), width), np.nan, np.float32)
    for place, row in enumerate(rows):
        if row is not None and len(row) == width:
            vectors[place] = row
    return vectors, _finite(vectors)


def _finite(vectors: Array) -> Array:
    finite: Array = np.isfinite(vectors).all(axis=1) & (vectors.shape[1] > 0)
    return finite


def _pooled(values: Array) -> Array:
    if values.dtype.kind == "c":
        values = np.abs(values)
    if values.ndim == 1:
        values = values[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        if values.ndim == 3:
            values = _mean(values, (1,))
        elif values.ndim > 3:
            values = _mean(values, tuple(range(2, values.ndim)))
        vectors: Array = values.astype(np.float32, copy=False)
    return vectors


def _mean(values: Array, axes: tuple[int, ...]) -> Array:
    if not values.size:
        kept = [size for axis, size in enumerate(values.shape) if axis not in axes]
        return np.full(kept, np.nan, np.float32)
    means: Array = values.mean(axis=axes, dtype=np.float32 if values.dtype != np.float64 else np.float64)
    return means


class FeatureSpace:
    """The principal components of a layer, and a bounded number of samples in it.

    Attributes:
        reference: Samples of the newest epoch, their vectors projected; None: there are none.
        share: Share of that epoch's rows that they are; 1: all.
        explained: Share of the variance that each component has.
        problem: A sentence that says why there is no such space; empty if there is one.
    """

    def __init__(self, reader: LayerReader, n_epoch: int) -> None:
        decomposition = require("sklearn.decomposition", "report", "the analysis of features")
        self.reference: FeatureBatch | None = None
        self.explained: Array = np.empty(0)
        self.problem = ""
        self.share = 1.0
        self._mean: Array = np.empty(0)
        self._scale = np.float32(1)
        self._axes: Array = np.empty((0, 0))
        gathered = self._gather(reader, n_epoch)
        if gathered is None or len(gathered.input_ids) < 3:
            self.problem = "Fewer than three samples of the newest epoch have finite features of one width."
            return
        if (gathered.vectors == gathered.vectors[0]).all():
            self.problem = "All samples of the newest epoch have equal features."
            return
        rows, width = gathered.vectors.shape
        components = min(MAX_COMPONENTS, width, rows - 1)
        # What is compared are ratios; the scale keeps squares within the range of float32.
        self._mean = gathered.vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._scale = np.abs(gathered.vectors - self._mean).max()
        solver = "randomized" if min(rows, width) > 512 else "full"
        fitted = decomposition.PCA(components, svd_solver=solver, random_state=_SEED)
        fitted.fit((gathered.vectors - self._mean) / self._scale)
        self._axes = fitted.components_.astype(np.float32)
        self.explained = np.asarray(fitted.explained_variance_ratio_, np.float64)
        self.reference = self.project(gathered)

    @property
    def width(self) -> int:
        """Numbers of a vector before it is projected."""
        return len(self._mean)

    def project(self, batch: FeatureBatch) -> FeatureBatch:
        """The same rows in principal components; those of another width are left out."""
        if batch.vectors.shape[1] != self.width:
            return batch.take(np.empty(0, np.int64))
        vectors = (batch.vectors - self._mean) / self._scale @ self._axes.T
        return FeatureBatch(batch.dataset_types, batch.input_ids, vectors, batch.labels, batch.predictions)

    def _gather(self, reader: LayerReader, n_epoch: int) -> FeatureBatch | None:
        rows, wanted = reader.rows(n_epoch), MAX_REFERENCE_ROWS
        kept: list[FeatureBatch] = []
        left = 0
        for batch in reader.batches(n_epoch):
            width = batch.vectors.shape[1]
            if not kept:
                wanted = left = min(wanted, _MAX_REFERENCE_VALUES // max(width, 1))
                self.share = min(1.0, wanted / max(rows, 1))
            elif width != kept[0].vectors.shape[1]:
                continue
            chosen = np.flatnonzero(kept_by_hash(batch.input_ids, self.share))[:left]
            left -= len(chosen)
            kept.append(batch.take(chosen))
        return FeatureBatch.join(kept) if kept else None
