"""TOFU's aggregates of a run: utility by hand, and forget quality against the three kinds of reference."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from duet.cache.errors import UserError
from duet.cache.files import sha256_json
from duet.stages.evaluate.tofu import check_reference, read_reference, tofu_results
from duet.stages.exam.exam import Exam, QuerySet
from duet.stages.exam.given_answers import Given
from duet.stages.metrics.uncertainty import score
from duet.stages.models.token_scores import TokenScores
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings, TofuSettings

SETS = {"forget": 3, "kept": 2, "authors": 2, "facts": 2}
UTILITY = {"retain": "kept", "real_authors": "authors", "world_facts": "facts"}


def exam(**tofu: str) -> Exam:
    sets = {
        name: QuerySet([Query(str(i), f"{name} {i}?", f"{name} {i}", None, ("wrong",)) for i in range(count)], "kept")
        for name, count in SETS.items()
    }
    settings = EvaluateSettings(tofu=TofuSettings(**tofu))
    return Exam(sets, "topic", PromptSettings(), settings, "cpu")


def given_of(right: list[float], wrong: list[list[float]]) -> Given:
    """Probabilities of answers of one token each."""
    ones = [TokenScores(np.log([p]), np.ones(1), np.zeros(1), np.zeros(1)) for p in right]
    return Given(ones, False, None, [np.log(options) for options in wrong])


def model() -> dict[str, Given]:
    return {
        "forget": given_of([0.5, 0.25, 0.1], [[0.25], [0.5], [0.4]]),
        "kept": given_of([0.8, 0.4], [[0.4], [0.1]]),
        "authors": given_of([0.6, 0.2], [[0.2], [0.2]]),
        "facts": given_of([0.3, 0.3], [[0.1], [0.3]]),
    }


def test_utility_by_hand():
    recall = {f"{name}.rougeL_recall": score(np.full(count, 0.5), list(range(count))) for name, count in SETS.items()}
    found, kept = tofu_results(exam(**UTILITY), {"base": model()}, {"base": recall}, None)
    parts = [
        (0.8 + 0.4) / 2, 0.5, (0.5 + 0.75) / 2,
        (0.75 + 0.5) / 2, 0.5, (2 / 3 + 0) / 2,
        (0.75 + 0.5) / 2, 0.5, (2 / 3 + 0) / 2,
    ]  # fmt: skip
    utility = found["base"]["tofu.model_utility"]
    assert utility["value"] == pytest.approx(9 / sum(1 / part for part in parts))
    assert utility["n"] == 6
    assert utility["ci95"][0] <= utility["value"] <= utility["ci95"][1]
    assert found["base"]["tofu.model_utility/arith"]["value"] == pytest.approx(
        utility["value"]
    )  # one wrong answer each
    assert kept == {}


def test_forget_quality_against_a_model_of_this_run():
    other = model() | {"forget": given_of([0.1, 0.1, 0.1], [[0.9], [0.8], [0.7]])}
    asked = exam(forget="forget", reference_model="oracle")
    found, kept = tofu_results(asked, {"base": model(), "oracle": other}, {"base": {}, "oracle": {}}, None)
    assert found["oracle"]["tofu.forget_quality"]["p"] == 1.0
    quality = found["base"]["tofu.forget_quality"]
    assert (quality["ks"], quality["value"]) == (1.0, pytest.approx(0.1))  # all of 9, 8 and 7 lie above 0.5, 2 and 4
    assert kept["truth_ratios"]["base"]["geo"] == pytest.approx([0.5, 2.0, 4.0])
    with pytest.raises(UserError, match="this run has no model 'retrained'") as caught:
        tofu_results(exam(forget="forget", reference_model="retrained"), {"base": model()}, {"base": {}}, None)
    assert "base" in caught.value.hint


def test_a_reference_that_cannot_be_one_is_refused_before_anything_is_asked(tmp_path):
    asked = exam(forget="forget", reference_model="model:never")
    check_reference(None, asked, ["base", "model:never"])
    with pytest.raises(UserError, match="this run has no model 'model:never'"):
        check_reference(None, asked, ["base", "teacher"])
    ratios = {"questions": sha256_json(["another"]), "truth_ratios": {"base": {"geo": [1.0] * 3}}}
    settings = TofuSettings(forget="forget", reference=write(tmp_path / "results.json", {"tofu": ratios}))
    with pytest.raises(UserError, match="of other questions"):
        check_reference(read_reference(settings), exam(**settings.model_dump()), ["base"])


def test_base_does_not_stand_in_for_a_file_that_was_not_read():
    asked = exam(forget="forget", reference="retrained/results.json", **UTILITY)
    recall = {f"{name}.rougeL_recall": score(np.full(count, 0.5), list(range(count))) for name, count in SETS.items()}
    found, kept = tofu_results(asked, {"base": model()}, {"base": recall}, None)
    assert set(found["base"]) == {"tofu.model_utility", "tofu.model_utility/arith"}
    assert kept == {}


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_reference_from_an_earlier_run(tmp_path):
    _, kept = tofu_results(exam(forget="forget", reference_model="base"), {"base": model()}, {"base": {}}, None)
    path = write(tmp_path / "results.json", {"tofu": kept})
    settings = TofuSettings(forget="forget", reference=path)
    found, _ = tofu_results(exam(**settings.model_dump()), {"base": model()}, {"base": {}}, read_reference(settings))
    assert found["base"]["tofu.forget_quality"]["ks"] == 0.0
    assert found["base"]["tofu.forget_quality/arith"]["n_reference"] == 3
    other = kept | {"questions": sha256_json(["another question"])}
    write(tmp_path / "results.json", {"tofu": other})
    with pytest.raises(UserError, match="of other questions"):
        tofu_results(exam(**settings.model_dump()), {"base": model()}, {"base": {}}, read_reference(settings))
    with pytest.raises(UserError, match="has no model 'oracle'"):
        read_reference(TofuSettings(forget="forget", reference=path, reference_model="oracle"))


def test_a_reference_whose_ratios_are_of_other_answers_is_refused(tmp_path):
    """The same questions, with paraphrases in one run and without in the other: the ratios are of different things."""
    _, kept = tofu_results(exam(forget="forget", reference_model="base"), {"base": model()}, {"base": {}}, None)
    settings = TofuSettings(forget="forget", reference=write(tmp_path / "results.json", {"tofu": kept}))
    asked = exam(**settings.model_dump())
    check_reference(read_reference(settings), asked, ["base"])
    queries = asked.sets["forget"].queries
    for other in ({"paraphrased": "in other words"}, {"perturbed": ("wrong", "wrong too")}):
        asked.sets["forget"] = QuerySet([replace(query, **other) for query in queries], "kept")
        with pytest.raises(UserError, match="of other questions or given answers"):
            check_reference(read_reference(settings), asked, ["base"])


def test_a_reference_from_open_unlearning(tmp_path):
    entries = {str(i): {"score": value} for i, value in enumerate([0.4, 1.9, 4.1])}
    path = write(tmp_path / "TOFU_EVAL.json", {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": entries}})
    settings = TofuSettings(forget="forget", reference=path)
    reference = read_reference(settings)
    assert reference is not None
    assert reference.ratios["geo"].tolist() == [0.4, 1.9, 4.1]
    found, _ = tofu_results(exam(**settings.model_dump()), {"base": model()}, {"base": {}}, reference)
    assert found["base"]["tofu.forget_quality"]["ks"] == pytest.approx(1 / 3)
    assert "tofu.forget_quality/arith" not in found["base"]  # the file has one variant


@pytest.mark.parametrize("content", [{"models": {}}, {"forget_truth_ratio": {"value_by_index": {"0": None}}}, []])
def test_files_without_truth_ratios_are_refused(tmp_path, content):
    settings = TofuSettings(forget="forget", reference=write(tmp_path / "a.json", content))
    with pytest.raises(UserError, match="holds no truth ratios"):
        read_reference(settings)
    with pytest.raises(UserError, match="no such file"):
        read_reference(TofuSettings(forget="forget", reference=str(tmp_path / "b.json")))
