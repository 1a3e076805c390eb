"""Sums over several sets: their value, how sure they are, and whether two can be told apart."""

from __future__ import annotations

import numpy as np
import pytest

from duet.stages.metrics.uncertainty import bootstrap_ci95, compare_sums, weighted_sum

RNG = np.random.default_rng(0)


def test_one_set_has_the_interval_of_a_single_score():
    values, clusters = RNG.random(60), [i // 2 for i in range(60)]
    value, (low, high) = weighted_sum({"a": values}, {"a": clusters}, {"a": 1.0})
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(bootstrap_ci95(values, clusters=clusters), abs=0.02)


def test_the_sum_weighs_the_sets_means_and_draws_equal_answers_together_over_sets():
    values = RNG.random(40)
    shared = {"a": [f"x{i}" for i in range(40)], "b": [f"x{i}" for i in range(40)]}
    apart = {"a": shared["a"], "b": [f"y{i}" for i in range(40)]}
    both = {"a": values, "b": values}
    value, (low, high) = weighted_sum(both, shared, {"a": 1.0, "b": -1.0})
    assert (value, low, high) == pytest.approx((0, 0, 0)), "the same items on both sides cancel in every resample"
    value, (low, high) = weighted_sum(both, apart, {"a": 1.0, "b": -1.0})
    assert value == pytest.approx(0)
    assert low < -0.05 < 0.05 < high


def test_a_small_set_beside_a_large_one_is_in_every_resample():
    values = {"small": np.array([1.0]), "large": np.zeros(500)}
    clusters = {"small": ["s"], "large": list(range(500))}
    assert weighted_sum(values, clusters, {"small": 1.0, "large": 1.0}) == (1.0, (1.0, 1.0))


def test_models_are_told_apart_only_where_they_differ_on_enough_items():
    clusters = {"forget": list(range(20)), "kept": list(range(20, 60))}
    signs = {"forget": -100.0, "kept": 100.0}
    one = {"forget": RNG.random(20), "kept": RNG.random(40)}
    worse = {"forget": one["forget"] + 0.2, "kept": one["kept"] - 0.1}
    found = compare_sums(worse, one, clusters, signs)
    assert found["difference"] == pytest.approx(-30)
    assert found["distinguishable"]
    assert found["n"] == 60
    noisy = {name: values + RNG.normal(0, 0.3, len(values)) for name, values in one.items()}
    same = compare_sums(noisy, one, clusters, signs)
    assert not same["distinguishable"]
    assert same["ci95"][0] < 0 < same["ci95"][1]
    few = compare_sums({"a": np.ones(3)}, {"a": np.zeros(3)}, {"a": [0, 1, 2]}, {"a": 1.0})
    assert few["ci95"] == [1, 1]
    assert not few["distinguishable"], "three pairs cannot show a difference, whatever their interval"
