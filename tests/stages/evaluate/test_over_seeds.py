"""Students of several seeds as one row: the means and intervals of `metrics/seeds.py`, of scores that all of them have."""

from __future__ import annotations

import numpy as np
import pytest

from duet.stages.evaluate.over_seeds import rows_of
from duet.stages.metrics.uncertainty import Score, score

REFERENCES = [f"answer {number // 2}" for number in range(30)]


def test_a_row_is_the_mean_over_seeds_and_questions():
    rng = np.random.default_rng(0)
    values = rng.random((3, 30)) * 0.1 + np.array([[0.1], [0.4], [0.7]])
    names = [f"student:base-seed{seed}" for seed in range(3)]
    models = {
        name: {
            "forget.rougeL_recall": score(of_model, REFERENCES),
            "forget.unlearning_depth": score(of_model[: 30 - number], REFERENCES[: 30 - number]),  # others were counted
            "mia": Score(0.5, 30, (0.4, 0.6)),  # not a mean over items
        }
        for number, (name, of_model) in enumerate(zip(names, values, strict=True))
    }
    verdicts = ["damaged", "unclear", "damaged"]
    outcomes = {name: {"verdict": verdict} for name, verdict in zip(names, verdicts, strict=True)}
    row = rows_of({"student:base": names}, models, outcomes, seed=0)["student:base"]
    assert row["models"] == names
    assert row["verdicts"] == {"damaged": 2, "unclear": 1}
    assert set(row["scores"]) == {"forget.rougeL_recall"}
    found = row["scores"]["forget.rougeL_recall"]
    assert found["seeds"] == pytest.approx(values.mean(axis=1))
    assert found["value"] == pytest.approx(values.mean())
    assert found["n"] == 30
    low, high = found["ci95"]  # reaches over the seeds, where one seed's own interval is narrow
    assert low < found["seeds"][0] + 0.05
    assert high > found["seeds"][2] - 0.05
    assert rows_of({}, models, outcomes, seed=0) == {}
