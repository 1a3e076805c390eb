"""How sure a number is over the seeds of a training and over the questions together.

Every training answers the same questions, so seeds and questions are crossed. A resample draws both with replacement and
independently of each other (the pigeonhole bootstrap, Owen 2007): C of C clusters of questions, as `uncertainty` does for one
model, and S - 1 of S > 1 seeds. S drawn ones would have (S - 1)/S of the variance of a mean of S, for three a third too little;
S - 1 have all of it (Rao and Wu 1988). The value is the mean over the drawn seeds of the weighted sum over the drawn questions.
With three seeds the interval reaches from the lowest seed's value to the highest's, at least.

Shapes: S seeds, N items of a set, C clusters, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duet.stages.metrics.uncertainty import (
    BLOCK_DRAWS,
    difference_as_json,
    interval,
    per_cluster,
    sign_flip_p,
    widened,
)

RESAMPLES = 2000
DEFINITION = (
    "95 % percentile bootstrap interval over training seeds and questions, drawn independently of each other: all clusters of "
    "questions (Owen 2007) and, of S seeds, S - 1 (Rao and Wu 1988). Of fewer than five clusters it also "
    "holds the interval of questions drawn one by one. p is that of sign flips of each question's mean over the seeds."
)

Values = Mapping[str, np.ndarray]  # of each set, float64 [S, N]


def weighted_sum(
    values: Values, clusters: Mapping[str, Sequence[object]], weights: Mapping[str, float], seed: int = 0
) -> dict[str, Any]:
    """Sum over the sets of weight times mean over items and seeds: value, n, ci95, and the sum of each seed."""
    per_seed = _sums(values, weights)

    def drawn(labels: Mapping[str, Sequence[object]]) -> tuple[float, float]:
        return interval(_drawn(_resampled(values, labels, weights, seed), np.random.default_rng([seed, 1])))

    n = sum(values[name].shape[1] for name in weights)
    num_clusters = len({label for name in weights for label in clusters[name]})
    singles = {name: [(name, number) for number in range(values[name].shape[1])] for name in weights}
    ci95 = widened(drawn(clusters), lambda: drawn(singles), num_clusters)
    return {"value": float(np.mean(per_seed)), "n": n, "ci95": list(ci95), "seeds": per_seed}


def difference(
    model: Values,
    other: Values,
    clusters: Mapping[str, Sequence[object]],
    weights: Mapping[str, float],
    seed: int = 0,
) -> dict[str, Any]:
    """The weighted sum of a model less that of another on the same items, as `uncertainty.compare` has it.

    Both have the same questions in each resample, and each its own seeds.
    """
    ours_R, others_R = (
        _drawn(_resampled(values, clusters, weights, seed), np.random.default_rng([seed, number]))
        for number, values in enumerate((model, other), start=1)
    )
    shares = [
        weight * (model[name].mean(0) - other[name].mean(0)) / model[name].shape[1] for name, weight in weights.items()
    ]
    labels = [label for name in weights for label in clusters[name]]
    value = float(np.mean(_sums(model, weights)) - np.mean(_sums(other, weights)))
    p = sign_flip_p(np.concatenate(shares), labels, seed)
    return difference_as_json(value, interval(ours_R - others_R), len(labels), p)


def _sums(values: Values, weights: Mapping[str, float]) -> list[float]:
    """The weighted sum of each seed, S numbers."""
    return [float(total) for total in sum(weight * values[name].mean(axis=1) for name, weight in weights.items())]  # pyright: ignore


def _resampled(
    values: Values, clusters: Mapping[str, Sequence[object]], weights: Mapping[str, float], seed: int
) -> np.ndarray:
    """The weighted sum of each seed on each resample of the questions, [R, S]: the same questions for the same `seed`.

    Clusters are drawn among those that lie in the same sets, as in `uncertainty.weighted_sum`.
    """
    names = list(weights)
    num_seeds = values[names[0]].shape[0]
    both = [per_cluster({name: values[name][s] for name in names}, clusters, names) for s in range(num_seeds)]
    counts_CK, sums_CSK = both[0][1], np.stack([sums for sums, _ in both], axis=1)  # K sets
    _, stratum_C = np.unique(counts_CK > 0, axis=0, return_inverse=True)
    strata = [np.flatnonzero(stratum_C.ravel() == number) for number in range(stratum_C.max() + 1)]
    rng, weights_K = np.random.default_rng(seed), np.array([weights[name] for name in names])
    found = []
    for first in range(0, RESAMPLES, block := max(1, BLOCK_DRAWS // counts_CK.size)):
        count = min(block, RESAMPLES - first)
        drawn = np.concatenate([rng.choice(stratum, (count, len(stratum))) for stratum in strata], axis=1)
        means_RSK = sums_CSK[drawn].sum(axis=1) / counts_CK[drawn].sum(axis=1)[:, None]
        found.append(means_RSK @ weights_K)
    return np.concatenate(found)


def _drawn(means_RS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of each resample the mean over drawn seeds, [R]."""
    num_seeds = means_RS.shape[1]
    drawn = rng.integers(num_seeds, size=(len(means_RS), max(1, num_seeds - 1)))
    return np.take_along_axis(means_RS, drawn, axis=1).mean(axis=1)
