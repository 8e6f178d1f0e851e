"""Statistics of samples: quantiles and bootstrap intervals of a median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A median with its bootstrap confidence interval.

    Attributes:
        median: Of the samples.
        low: Lower end of the interval.
        high: Upper end.
        level: Confidence, such as 0.95.
        samples: How many there were.
    """

    median: float
    low: float
    high: float
    level: float
    samples: int


def estimate_median(samples: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """The median, with the percentile interval of medians of resampled data (seeded).

    Few samples make the interval too narrow: with 6 it hardly reaches further than from the least to the
    greatest.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("there are no samples")
    indices = np.random.default_rng(seed).integers(values.size, size=(_DRAWS, values.size))
    medians = np.median(values[indices], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(np.median(values)), float(low), float(high), level, int(values.size))


def describe_samples(samples: Sequence[float]) -> dict[str, float]:
    """Median, tail and worst of samples where less is better."""
    values = np.asarray(samples, dtype=np.float64)
    median, p90, p99, p999 = np.quantile(values, [0.5, 0.9, 0.99, 0.999])
    return {
        "median": float(median),
        "p90": float(p90),
        "p99": float(p99),
        "p99.9": float(p999),
        "worst": float(values.max()),
        "samples": int(values.size),
    }
