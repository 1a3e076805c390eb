"""How sure a number is: n, a 95 % interval, and whether two models differ on the same items.

Items with the same reference answer are asked about the same fact: they are resampled, and flipped, together, as one
cluster. Everything here works on one number per item; the other files of this room say what the number is.

Shapes: N items, M scores of each, C clusters, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from duet.stages.metrics.metric import Metric

MAX_EXACT = 12  # clusters up to which all 2^n sign flips are tried
NUM_FLIPS = 4000  # drawn sign flips where there are more
ALPHA = 0.05
# Different answers (clusters) that a score needs to count for or against a model: of n questions that all agree, a share of
# 1 - 0.05^(1/n) may still differ (`upper_end`), and of fewer than 5 that is more than half. Fewer also say little of how items
# vary: of yes and no, two that happen to agree have no width.
MIN_ANSWERS = 5
BLOCK_DRAWS = 2**20  # drawn numbers at a time: 8 MiB


class ScoreRecord(TypedDict):
    """A score in results.json and audit.json."""

    value: float
    n: int
    ci95: list[float]


@dataclass(frozen=True)
class Score:
    """A mean with its number of items and its 95 % interval, and the items that it is made of."""

    value: float
    n: int
    ci95: tuple[float, float]
    items: np.ndarray = field(repr=False, compare=False, default_factory=lambda: np.empty(0))  # float64 [n]
    clusters: tuple[object, ...] = field(repr=False, compare=False, default=())

    def as_json(self) -> ScoreRecord:
        return {"value": self.value, "n": self.n, "ci95": list(self.ci95)}


def score(values: np.ndarray, clusters: Sequence[object] | None = None, seed: int = 0) -> Score:
    """Mean, n and bootstrap interval of per-item values."""
    values = np.asarray(values, np.float64)
    ci95 = bootstrap_ci95(values, seed, clusters=clusters)
    labels = range(len(values)) if clusters is None else clusters
    return Score(float(np.mean(values)), len(values), ci95, values, tuple(labels))


def says_something(found: Score) -> bool:
    """Whether a score is of enough questions to count for or against a model: MIN_ANSWERS different answers."""
    return len(set(found.clusters)) >= MIN_ANSWERS


def upper_end(found: Score, none_above: bool = False) -> float:
    """Of the interval; where all questions agree on less than 1, what their number leaves open: value + 1 - 0.05^(1/n), or 1.

    The exact 95 % bound on the share of questions that would differ, about 3/n (Hanley and Lippman-Hand 1983); questions of one
    answer count once. With `none_above`, no question lies above what a share is measured from: the interval then has a width
    only because some lie below it, which says nothing of those that would lie above, and 1 - 0.05^(1/n) is left open at least.
    """
    low, high = found.ci95
    if not none_above and (low < high or high >= 1):
        return high
    left_open = 1 - 0.05 ** (1 / len(set(found.clusters)))
    return max(high, left_open) if none_above else min(1.0, high + left_open)


def bootstrap_ci95(
    values: np.ndarray, seed: int = 0, resamples: int = 2000, clusters: Sequence[object] | None = None
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; items with equal cluster labels are drawn together.

    A resample's mean is over its items, so clusters of unequal size weigh by their size.
    """
    values_N1 = np.asarray(values, np.float64)[:, None]

    def drawn(labels: Sequence[object] | None) -> tuple[float, float]:
        return interval(bootstrap_means(values_N1, np.random.default_rng(seed), resamples, labels)[:, 0])

    return widened(drawn(clusters), lambda: drawn(None), len(values_N1) if clusters is None else len(set(clusters)))


def widened(
    ci95: tuple[float, float], of_single_items: Callable[[], tuple[float, float]], num_clusters: int
) -> tuple[float, float]:
    """An interval of clusters; of few, so that it also holds that of the same items drawn one by one."""
    if num_clusters >= MIN_ANSWERS:
        return ci95
    single = of_single_items()
    return min(ci95[0], single[0]), max(ci95[1], single[1])


def bootstrap_means(
    values_NM: np.ndarray, rng: np.random.Generator, resamples: int = 2000, clusters: Sequence[object] | None = None
) -> np.ndarray:
    """Means of M scores on R resamples of the same N items, [R, M]; an item's scores stay together, and so does a cluster."""
    if len(values_NM) == 0:
        raise ValueError("no values to resample")
    cluster_of = _cluster_numbers(len(values_NM), clusters)
    counts_C = np.bincount(cluster_of)
    sums_CM = np.stack([np.bincount(cluster_of, column) for column in values_NM.T], axis=1)
    means = []
    for first in range(0, resamples, block := max(1, BLOCK_DRAWS // sums_CM.size)):
        drawn = rng.integers(len(counts_C), size=(min(block, resamples - first), len(counts_C)))
        means.append(sums_CM[drawn].sum(axis=1) / counts_C[drawn].sum(axis=1)[:, None])
    return np.concatenate(means)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray, clusters: Sequence[object] | None = None, seed: int = 0) -> float:
    """Two-sided p of a paired permutation test: the share of sign flips of whole clusters whose mean difference is at least
    as far from 0 as the one found (Fisher's randomisation test for pairs).

    All flips are tried up to MAX_EXACT clusters; above, NUM_FLIPS drawn ones and the one found, so p is never 0. With k
    clusters, p is at least 2 / 2^k.
    """
    differences = np.asarray(differences, np.float64)
    sums = np.bincount(_cluster_numbers(len(differences), clusters), differences)
    if len(sums) <= MAX_EXACT:
        bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
    else:
        drawn = np.random.default_rng(seed).integers(2, size=(NUM_FLIPS, len(sums)), dtype=np.int8)
        bits = np.concatenate([np.zeros((1, len(sums)), np.int8), drawn])
    totals = np.abs((1.0 - 2.0 * bits) @ sums)
    rounding = 1e-12 * np.abs(sums).sum()
    return float(np.mean(totals >= abs(sums.sum()) - rounding))


def compare(model: Score, base: Score, seed: int = 0) -> dict[str, Any]:
    """The paired difference of two scores as results.json has it: mean, interval, n, p, and whether it is distinguishable.

    That takes interval and p, because the interval of very few clusters is too narrow, and p then cannot be small. Raises
    ValueError where the two were not scored on the same clusters in the same order.
    """
    if model.clusters != base.clusters:
        raise ValueError("the two scores are not of the same items")
    differences = model.items - base.items
    ci95 = bootstrap_ci95(differences, seed, clusters=model.clusters)
    p = sign_flip_p(differences, model.clusters, seed)
    return difference_as_json(float(differences.mean()), ci95, len(differences), p)


def difference_as_json(value: float, ci95: tuple[float, float], n: int, p: float) -> dict[str, Any]:
    """A difference as results.json has it, with the words on it: see `compare`."""
    low, high = ci95
    distinguishable = (low > 0 or high < 0) and p < ALPHA
    return {"difference": value, "ci95": [low, high], "n": n, "p": p, "distinguishable": distinguishable}


def unpaired_ci95(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of `other` less `one` where they are not of the same items, from the two intervals alone.

    The method of variance estimates recovery (MOVER; Zou and Donner 2008, Statistics in Medicine 27, 1693). It takes the two as
    independent: where both do well on the same questions, it is wider than it need be.
    """
    difference = other["value"] - one["value"]
    below = [score["value"] - score["ci95"][0] for score in (one, other)]
    above = [score["ci95"][1] - score["value"] for score in (one, other)]
    return difference - math.hypot(below[1], above[0]), difference + math.hypot(above[1], below[0])


def _cluster_numbers(count: int, clusters: Sequence[object] | None) -> np.ndarray:
    """Number of each item's cluster, in order of appearance; without labels, each item is its own."""
    labels = list(range(count)) if clusters is None else list(clusters)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} cluster labels for {count} values")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels])


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
    sums_CS, counts_CS = per_cluster(values, clusters, list(weights))
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


def per_cluster(
    values: Mapping[str, np.ndarray], clusters: Mapping[str, Sequence[object]], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of values and number of items of each cluster in each set, [C, S] both."""
    labels = dict.fromkeys(label for name in names for label in clusters[name])
    number = {label: at for at, label in enumerate(labels)}
    at = [np.array([number[label] for label in clusters[name]]) for name in names]
    sums = [np.bincount(of_set, values[name], len(number)) for of_set, name in zip(at, names, strict=True)]
    counts = [np.bincount(of_set, minlength=len(number)) for of_set in at]
    return np.stack(sums, axis=1), np.stack(counts, axis=1)


def linearised_ratio(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Per item, values whose mean is mean(after) / mean(before) and whose spread is that of the ratio: r + (after - r *
    before) / mean(before), with r the ratio of the means (Taylor; Cochran 1977, chapter 6). `before` must not average 0.
    """
    ratio = after.mean() / before.mean()
    return ratio + (after - ratio * before) / before.mean()


METRICS = (
    Metric(
        "ci95",
        bootstrap_ci95,
        "95 % percentile bootstrap interval of the mean (Efron 1979); items with the same reference answer are drawn "
        "together. Of fewer than five different answers, such as yes and no, it also holds the interval of items drawn one "
        "by one. No width means that all n items scored alike, not certainty: among others, up to 3/n may differ (the rule "
        "of three).",
        better="narrow",
        version=2,
        range="that of its score",
    ),
    Metric(
        "comparison",
        compare,
        "Model less base on the same items: the mean of the paired differences with its bootstrap interval and the p of sign "
        "flips of the pairs, clusters together in both. Distinguishable means that the interval leaves 0 out and p is below "
        "0.05. Neither is corrected for the number of comparisons.",
        better="see the metric",
        range="that of its score, with a sign",
    ),
)
