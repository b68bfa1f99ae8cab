"""Confidence intervals of means."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def mean_interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (low, high) of the mean of (n,) values, n >= 1."""
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
