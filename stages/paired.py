"""How sure a number is that is put together from several query sets: a performance shift, or one less another.

Items with the same reference answer are resampled, and flipped, together in all sets; see `uncertainty.py` for a single score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.uncertainty import BLOCK_DRAWS, difference_as_json, interval, sign_flip_p


def weighted_sum(
    values: Mapping[str, np.ndarray],
    clusters: Mapping[str, Sequence[object]],
    weights: Mapping[str, float],
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, tuple[float, float]]:
    """Sum over the sets of weight times mean of the items' values, with its 95 % percentile bootstrap interval.

    Clusters are drawn with replacement among those that lie in the same sets, so that no resample loses a whole set; a set's
    mean is over its items in the resample.
    """
    sums_CS, counts_CS = _per_cluster(values, clusters, list(weights))
    weights_S = np.array(list(weights.values()))
    _, stratum_C = np.unique(counts_CS > 0, axis=0, return_inverse=True)
    strata = [np.flatnonzero(stratum_C.ravel() == number) for number in range(stratum_C.max() + 1)]
    rng = np.random.default_rng(seed)
    found = []
    for first in range(0, resamples, block := max(1, BLOCK_DRAWS // len(sums_CS))):
        count = min(block, resamples - first)
        drawn = np.concatenate([rng.choice(stratum, (count, len(stratum))) for stratum in strata], axis=1)
        found.append((sums_CS[drawn].sum(axis=1) / counts_CS[drawn].sum(axis=1)) @ weights_S)
    return float((sums_CS.sum(0) / counts_CS.sum(0)) @ weights_S), interval(np.concatenate(found))


def compare_sums(
    model: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    clusters: Mapping[str, Sequence[object]],
    weights: Mapping[str, float],
    seed: int = 0,
) -> dict[str, Any]:
    """The weighted sum of a model less that of another on the same items, as `uncertainty.compare` has it of one score."""
    differences = {name: model[name] - other[name] for name in weights}
    value, ci95 = weighted_sum(differences, clusters, weights, seed)
    shares = [weight * differences[name] / len(differences[name]) for name, weight in weights.items()]
    labels = [label for name in weights for label in clusters[name]]
    return difference_as_json(value, ci95, len(labels), sign_flip_p(np.concatenate(shares), labels, seed))


def _per_cluster(
    values: Mapping[str, np.ndarray], clusters: Mapping[str, Sequence[object]], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of values and number of items of each cluster in each set, [C, S] both."""
    labels = dict.fromkeys(label for name in names for label in clusters[name])
    number = {label: at for at, label in enumerate(labels)}
    at = [np.array([number[label] for label in clusters[name]]) for name in names]
    sums = [np.bincount(of_set, values[name], len(number)) for of_set, name in zip(at, names, strict=True)]
    counts = [np.bincount(of_set, minlength=len(number)) for of_set in at]
    return np.stack(sums, axis=1), np.stack(counts, axis=1)
