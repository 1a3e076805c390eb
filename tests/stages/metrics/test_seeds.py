"""Intervals over seeds and questions together: each source of spread counts, and both together more."""

from __future__ import annotations

import numpy as np
import pytest

from duet.stages.metrics import seeds
from duet.stages.metrics.uncertainty import bootstrap_ci95


def interval_of(values_SN: np.ndarray, clusters: list | None = None) -> tuple[float, float]:
    labels = clusters or list(range(values_SN.shape[1]))
    low, high = seeds.weighted_sum({"a": values_SN}, {"a": labels}, {"a": 1.0})["ci95"]
    return low, high


def test_value_and_seeds_are_means_over_the_questions():
    found = seeds.weighted_sum(
        {"a": np.array([[0.0, 1.0], [1.0, 1.0]]), "b": np.array([[0.5], [0.0]])},
        {"a": [0, 1], "b": [2]},
        {"a": 1.0, "b": -2.0},
    )
    assert found["seeds"] == pytest.approx([0.5 - 1.0, 1.0 - 0.0])
    assert found["value"] == pytest.approx(0.25)
    assert found["n"] == 3


def test_one_seed_has_the_interval_of_its_questions():
    values_N = np.random.default_rng(0).random(200)
    ours, plain = interval_of(values_N[None]), bootstrap_ci95(values_N)
    assert ours == pytest.approx(plain, abs=0.005)


def test_few_answers_leave_at_least_what_single_questions_leave():
    values_N = np.array(([1.0] * 7 + [0.0] * 3) * 2)
    assert interval_of(np.stack([values_N] * 2), ["yes"] * 10 + ["no"] * 10) == (0.5, 0.9)


def test_seeds_that_agree_add_nothing():
    values_N = np.random.default_rng(0).random(50)
    assert interval_of(np.stack([values_N] * 3)) == pytest.approx(interval_of(values_N[None]))


def test_questions_that_agree_leave_the_range_of_three_seeds():
    """Of 3 seeds 2 are drawn: with a chance of 1/9 both times the lowest, which is more than 2.5 %."""
    values_SN = np.array([[0.2], [0.5], [0.9]]) * np.ones(40)
    assert interval_of(values_SN) == pytest.approx((0.2, 0.9))


def test_the_spread_of_seeds_is_that_of_a_mean_of_them():
    """The variance over the resamples is s^2 / S, with s^2 the unbiased variance between seeds."""
    values_SR = np.array([[0.0], [3.0], [7.0], [8.0]]) * np.ones(200_000)
    drawn_R = seeds._drawn(values_SR.T, np.random.default_rng(0))
    assert drawn_R.var() == pytest.approx(np.var([0, 3, 7, 8], ddof=1) / 4, rel=0.02)


def test_clusters_are_drawn_together():
    values_SN = np.tile(np.repeat([0.0, 1.0, 0.0, 1.0], 25), (3, 1))
    low, high = interval_of(values_SN, [n // 25 for n in range(100)])
    single = interval_of(values_SN)
    assert high - low > 2 * (single[1] - single[0])


def test_a_difference_is_on_the_same_questions_whatever_the_number_of_seeds():
    """Questions differ widely, models by a constant: nothing of the questions' spread is left."""
    rng = np.random.default_rng(0)
    sets = {"a": rng.random(300), "b": rng.random(7)}
    clusters = {"a": list(range(300)), "b": ["x", "y", *range(5)]}
    one = {name: values_N[None] for name, values_N in sets.items()}
    three = {name: np.stack([values_N + 0.25] * 3) for name, values_N in sets.items()}
    found = seeds.difference(three, one, clusters, {"a": 1.0, "b": -0.5})
    assert found["difference"] == pytest.approx(0.125)
    assert found["ci95"] == pytest.approx([0.125, 0.125])


def test_a_difference_between_seeds_alone_is_not_distinguishable():
    values_N = np.random.default_rng(0).random(100)
    model = {"a": np.stack([values_N - 0.3, values_N, values_N + 0.3])}
    found = seeds.difference(model, {"a": values_N[None]}, {"a": list(range(100))}, {"a": 1.0})
    low, high = found["ci95"]
    assert low == pytest.approx(-0.3)
    assert high == pytest.approx(0.3)
    assert not found["distinguishable"]
