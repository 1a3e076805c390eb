"""What is kept by distance from the topic, by hand and on SUITE's rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, SHARED

from duet.pipeline.config.load import load_config
from duet.pipeline.run.exam import query_sets
from duet.stages.evaluate.distance import by_distance
from duet.stages.evaluate.results import results_of
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.metrics.uncertainty import score
from duet.stages.questions.queries import Query
from duet.stages.settings.data import EvaluationSet, PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

SUITE = SHARED / "data/suite/challenger_disaster"
SUBJECTS = [Subject(name, Path(name), "", "base") for name in ("base", "student:a")]


def test_shares_from_near_to_far_by_hand():
    sets = {
        name: QuerySet([Query(str(i), f"q{i}", f"a{i}") for i in range(4)], "kept", distance=distance)
        for name, distance in (("far", 12), ("near", 0), ("nowhere", None), ("unknown", 3))
    }
    exam = Exam(sets, "t", PromptSettings(), EvaluateSettings(attacks=()), "cpu")
    values = {
        "base": {"far": [1, 1, 1, 1], "near": [1, 0.5, 0.5, 1], "unknown": [0, 0, 0, 0]},
        "student:a": {"far": [1, 1, 1, 1], "near": [1, 0.5, 0, 0], "unknown": [0, 0, 0, 0]},
    }
    models = {
        name: {f"{of}.distinctive_recall": score(np.array(items, float)) for of, items in of_sets.items()}
        for name, of_sets in values.items()
    }
    found = by_distance(SUBJECTS, exam, models, {})
    assert list(found["sets"].items()) == [("near", 0), ("unknown", 3), ("far", 12)]
    assert list(found["kept"]) == ["student:a"]
    kept = found["kept"]["student:a"]
    assert list(kept) == ["near", "far"], "of what base does not know nothing is kept"
    assert (kept["near"]["value"], kept["near"]["n"]) == (0.5, 4)
    assert kept["near"]["ci95"][0] < 0.5 < kept["near"]["ci95"][1]
    assert (kept["far"]["value"], kept["far"]["ci95"]) == (1, [1, 1])


def test_a_distance_of_what_is_to_be_forgotten_is_refused():
    with pytest.raises(ValueError, match="distance is of sets to be kept"):
        EvaluationSet(path="x.jsonl", expect="forgotten", distance=0)


@pytest.mark.skipif(not SUITE.is_dir(), reason="needs ../shared/data/suite")
def test_suites_rows_by_distance():
    """The pack's sets are the tiers that the rows name; a made-up student that loses what is nearest shows as such."""
    config = load_config(str(ROOT / "configs/suite.yaml"), (f"data_dir={SUITE}",))
    sets = query_sets(config)
    sizes = Counter({name: len(of.queries) for name, of in sets.items()})
    assert (sizes["forget"], sizes["retain"], sizes["adversarial"], sizes["rephrased"]) == (450, 450, 250, 300)
    tiers = {name: of.distance for name, of in sets.items() if of.distance is not None}
    assert tiers == {f"s{n:02}": n for n in range(16)}
    assert all(sizes[name] == 25 for name in tiers)
    rows = [json.loads(line) for line in (SUITE / "retain_eval.jsonl").read_text(encoding="utf-8").splitlines()]
    tier_of = {row["question"]: row["tier"] for row in rows}
    for name, distance in tiers.items():
        assert {tier_of[query.question] for query in sets[name].queries} == {f"s{distance}"}
    few = {name: sets[name] for name in ("s00", "s01", "s15")}
    exam = Exam(few, config.topic, PromptSettings(), EvaluateSettings(attacks=()), "cpu")
    right = {name: [query.answer or "" for query in of.queries] for name, of in few.items()}
    lost = {**right, "s00": ["I do not know."] * 25, "s01": ["I do not know."] * 10 + right["s01"][10:]}
    found = results_of(SUBJECTS, exam, {"base": right, "student:a": lost})[0]["by_distance"]
    assert list(found["sets"].values()) == [0, 1, 15]
    kept = {name: round(of["value"], 6) for name, of in found["kept"]["student:a"].items()}
    assert kept == {"s00": 0.0, "s01": 0.6, "s15": 1.0}
