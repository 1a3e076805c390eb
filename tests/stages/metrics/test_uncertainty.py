"""Intervals and paired tests: brute force, hand-counted sign flips, and how often they err on data without a difference."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from duet.stages.metrics.uncertainty import (
    MAX_EXACT,
    Score,
    bootstrap_ci95,
    compare,
    score,
    sign_flip_p,
    unpaired_ci95,
    upper_end,
)


def test_bootstrap_by_brute_force():
    values, labels = np.array([0.0, 1.0, 1.0, 0.5, 0.2, 0.9, 0.1]), ["a", "a", "b", "c", "c", "d", "e"]
    groups = [values[:2], values[2:3], values[3:5], values[5:6], values[6:]]
    rng, means = np.random.default_rng(7), []
    for _ in range(2000):
        means.append(np.concatenate([groups[i] for i in rng.integers(5, size=5)]).mean())
    assert bootstrap_ci95(values, seed=7, clusters=labels) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_bootstrap_covers_the_truth_and_widens_with_clusters():
    rng = np.random.default_rng(0)
    hits = [low <= 0.3 <= high for low, high in (bootstrap_ci95(rng.random(60) < 0.3, s, 400) for s in range(200))]
    assert 0.88 <= np.mean(hits) <= 0.99
    values = np.repeat(rng.random(10), 8)
    low, high = bootstrap_ci95(values)
    wide_low, wide_high = bootstrap_ci95(values, clusters=np.repeat(np.arange(10), 8).tolist())
    assert wide_high - wide_low > 1.5 * (high - low)


def test_two_answers_that_happen_to_agree_are_not_certainty():
    """Questions answered yes or no: two clusters, whose means say nothing of how questions vary."""
    right, answers = np.array(([1.0] * 7 + [0.0] * 3) * 2), ["yes"] * 10 + ["no"] * 10
    assert bootstrap_ci95(right, clusters=answers) == bootstrap_ci95(right) == (0.5, 0.9)
    rng, hits = np.random.default_rng(0), []
    for _ in range(150):
        answers = rng.integers(2, size=40).tolist()
        low, high = bootstrap_ci95(rng.random(40) < 0.7, 0, 300, answers)
        hits.append(low <= 0.7 <= high)
    assert np.mean(hits) >= 0.88
    apart = np.repeat([1.0, 0.0], 10)
    assert bootstrap_ci95(apart, clusters=apart.tolist()) == (0.0, 1.0), (
        "of clusters that differ, it stays that of clusters"
    )


def test_bootstrap_at_the_edges():
    assert bootstrap_ci95(np.array([0.4])) == (0.4, 0.4)
    assert score(np.ones(3)).as_json() == {"value": 1.0, "n": 3, "ci95": [1.0, 1.0]}
    with pytest.raises(ValueError, match="no values"):
        bootstrap_ci95(np.array([]))
    with pytest.raises(ValueError, match="cluster labels"):
        bootstrap_ci95(np.ones(3), clusters=[1])


def test_sign_flips_by_hand():
    assert sign_flip_p(np.array([1.0, 1.0, 1.0])) == 2 / 8
    assert sign_flip_p(np.array([3.0, -1.0])) == 1.0  # the totals are 2, 4, -4 and -2
    assert sign_flip_p(np.array([3.0, 1.0])) == 2 / 4
    assert sign_flip_p(np.zeros(4)) == 1.0
    assert sign_flip_p(np.array([1.0, 1.0]), clusters=["a", "a"]) == 1.0  # one cluster tells nothing


def test_sign_flips_by_brute_force_and_drawn():
    rng = np.random.default_rng(3)
    values, labels = rng.normal(0.4, 1, 24), np.repeat(np.arange(MAX_EXACT), 2).tolist()
    sums = np.array([values[2 * k] + values[2 * k + 1] for k in range(MAX_EXACT)])
    every = [abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-9 for signs in product((1, -1), repeat=MAX_EXACT)]
    assert sign_flip_p(values, labels) == pytest.approx(np.mean(every))
    more = np.concatenate([values, [0.0]])  # a cluster that changes nothing, but makes the flips drawn ones
    assert sign_flip_p(more, [*labels, MAX_EXACT]) == pytest.approx(np.mean(every), abs=0.02)
    assert 0 < sign_flip_p(np.ones(40)) < 0.001


def test_comparisons_are_paired_and_by_cluster():
    rng = np.random.default_rng(0)
    hard = rng.random(40)  # how hard the items are differs more than the models do
    clusters = [f"answer {number // 2}" for number in range(40)]
    base, model = score(hard, clusters), score(hard - 0.05 + rng.normal(0, 0.01, 40), clusters)
    found = compare(model, base)
    assert base.ci95[0] < model.ci95[1]  # the two intervals overlap, and yet
    assert found["distinguishable"]
    assert found["n"] == 40
    assert found["difference"] == pytest.approx(model.value - base.value)
    assert found["ci95"] == list(bootstrap_ci95(model.items - base.items, clusters=clusters))
    assert found["p"] < 0.01


def test_few_clusters_and_equal_models_are_not_distinguishable():
    one, other = score(np.ones(6), ["a"] * 6), score(np.zeros(6), ["a"] * 6)
    found = compare(one, other)
    assert found["ci95"] == [1.0, 1.0]
    assert found["p"] == 1.0
    assert not found["distinguishable"]
    same = compare(one, one)
    assert (same["difference"], same["p"], same["distinguishable"]) == (0.0, 1.0, False)
    with pytest.raises(ValueError, match="same items"):
        compare(one, score(np.ones(6), ["b"] * 6))


def test_models_that_do_not_differ_are_rarely_told_apart():
    rng = np.random.default_rng(1)
    pairs = [(score(rng.random(30), seed=k), score(rng.random(30), seed=k)) for k in range(60)]
    assert np.mean([compare(a, b, seed=k)["distinguishable"] for k, (a, b) in enumerate(pairs)]) <= 0.1


def test_two_intervals_give_that_of_the_difference():
    one, other = ({"value": v, "ci95": ci95, "n": 9} for v, ci95 in ((0.5, [0.2, 0.9]), (0.6, [0.3, 0.7])))
    low, high = unpaired_ci95(one, other)  # by hand: each end from the two ends that lie that way
    assert low == pytest.approx(0.1 - (0.3**2 + 0.4**2) ** 0.5)
    assert high == pytest.approx(0.1 + (0.1**2 + 0.3**2) ** 0.5)
    assert unpaired_ci95(one, one)[0] < 0 < unpaired_ci95(one, one)[1]


def test_two_intervals_hold_the_difference_of_independent_scores():
    """Of 200 pairs of independent samples with true means .3 and .5, at least 90 % of the intervals hold .2."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        one, other = (score(rng.random(40) < share).as_json() for share in (0.3, 0.5))
        low, high = unpaired_ci95(one, other)
        held += low <= 0.2 <= high
    assert held >= 180


def test_what_questions_that_agree_leave_open_is_never_more_than_all():
    def agreeing(value: float, n: int) -> float:
        return upper_end(Score(value, n, (value, value), np.full(n, value), tuple(range(n))))

    assert agreeing(0.0, 14) == pytest.approx(1 - 0.05 ** (1 / 14))
    assert agreeing(0.9, 14) == agreeing(1.0, 14) == 1.0
    assert upper_end(Score(0.5, 3, (0.2, 0.8), np.array([0.2, 0.5, 0.8]), (0, 1, 2))) == 0.8
