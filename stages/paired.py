"""Intervals of what is put together from several query sets, for one model or for the difference of two on the same items.

Items with the same reference answer are drawn together, in all sets, as everywhere; see `metrics.py` for a single set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 2000


def weighted_sum(
    values: Mapping[str, np.ndarray], clusters: Mapping[str, Sequence[object]], weights: Mapping[str, float], seed: int
) -> tuple[float, tuple[float, float]]:
    """Sum over the sets of weight times mean of the items' values, with its 95 % percentile bootstrap interval.

    Clusters are drawn with replacement among those that lie in the same sets, so that no resample loses a whole set; a set's
    mean is over its items in the resample. With differences between two models as values, the bootstrap is a paired one.
    """
    names = list(weights)
    labels = list(dict.fromkeys(label for name in names for label in clusters[name]))
    number = {label: at for at, label in enumerate(labels)}
    at = {name: np.array([number[label] for label in clusters[name]]) for name in names}
    sums_CS = np.stack([np.bincount(at[name], values[name], len(labels)) for name in names], axis=1)
    counts_CS = np.stack([np.bincount(at[name], minlength=len(labels)) for name in names], axis=1)
    weights_S = np.array([weights[name] for name in names])
    strata = _strata(counts_CS > 0)
    rng = np.random.default_rng(seed)
    resampled = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata])
        resampled[i] = (sums_CS[drawn].sum(0) / counts_CS[drawn].sum(0)) @ weights_S
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(sum(weights[name] * values[name].mean() for name in names)), (float(low), float(high))


def _strata(present_CS: np.ndarray) -> list[np.ndarray]:
    """The numbers of the clusters that lie in the same sets, group by group."""
    _, group_C = np.unique(present_CS, axis=0, return_inverse=True)
    return [np.flatnonzero(group_C.ravel() == group) for group in range(group_C.max() + 1)]
