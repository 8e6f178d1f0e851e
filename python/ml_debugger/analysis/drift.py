"""How far two groups of feature vectors are apart, from sums alone."""

from __future__ import annotations

import math

import numpy as np

from ml_debugger.trace.dtypes import Array


class Moments:
    """Number, mean and covariance of vectors, of which only sums are kept."""

    def __init__(self, width: int) -> None:
        self.rows = 0
        self._sum = np.zeros(width)
        self._products = np.zeros((width, width))

    def add(self, vectors: Array) -> None:
        """Take in some vectors."""
        exact = vectors.astype(np.float64)
        self.rows += len(exact)
        self._sum += exact.sum(axis=0)
        self._products += exact.T @ exact

    @property
    def mean(self) -> Array:
        """Mean vector."""
        mean: Array = self._sum / max(self.rows, 1)
        return mean

    @property
    def covariance(self) -> Array:
        """Covariance matrix of the population."""
        mean = self.mean
        covariance: Array = self._products / max(self.rows, 1) - np.outer(mean, mean)
        return covariance


def mean_shift(first: Moments, second: Moments) -> float:
    """Distance of the means, in standard deviations: of the square root of the mean total variance."""
    return _over(float(np.linalg.norm(first.mean - second.mean)), _spread(first, second))


def frechet_distance(first: Moments, second: Moments) -> float:
    """Fréchet distance of two normal distributions with these moments, over the same spread as `mean_shift`.

    ``d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``: Dowson and Landau (1982), and for features Heusel
    et al. (2017); divided by the spread, so that layers and scales compare.
    """
    root = _square_root(first.covariance)
    inner = np.linalg.eigvalsh(root @ second.covariance @ root)
    squared = float(((first.mean - second.mean) ** 2).sum())
    squared += float(np.trace(first.covariance) + np.trace(second.covariance))
    squared -= 2 * float(np.sqrt(np.maximum(inner, 0)).sum())
    return _over(math.sqrt(max(squared, 0.0)), _spread(first, second))


def _spread(first: Moments, second: Moments) -> float:
    total = float(np.trace(first.covariance) + np.trace(second.covariance)) / 2
    return math.sqrt(max(total, 0.0))


def _over(distance: float, spread: float) -> float:
    if spread == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / spread


def _square_root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root
