"""What open-unlearning reads of us, and that we read the same back as a reference."""

from __future__ import annotations

import json

import numpy as np
import pytest

from duet.stages.evaluate.open_unlearning import tofu_logs
from duet.stages.evaluate.tofu import read_reference
from duet.stages.exam.exam import Exam, QuerySet
from duet.stages.exam.given_answers import Given
from duet.stages.models.token_scores import TokenScores
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings, TofuSettings

SETS = {"forget": "forgotten", "retain": "kept", "authors": "kept", "facts": "kept"}
UTILITY = {"retain": "retain", "real_authors": "authors", "world_facts": "facts"}
# Names that open-unlearning's TOFU configuration gives to these scores.
EXPECTED = {
    "forget_Q_A_Prob", "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio",
    "exact_memorization", "extraction_strength",
    "retain_Q_A_Prob", "retain_Q_A_PARA_Prob", "retain_Q_A_PERT_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio",
    *(f"{role}_{score}" for role in ("ra", "wf") for score in (
        "Q_A_Prob", "Q_A_PERT_Prob", "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")),
    "forget_quality", "model_utility",
}  # fmt: skip


def given(seed: int, paraphrased: bool) -> Given:
    rng = np.random.default_rng(seed)
    tokens = [TokenScores(-rng.random(4), np.array([1.0, 1, 1, 1]), np.zeros(4), np.zeros(4)) for _ in range(3)]
    return Given(tokens, [1] * len(tokens), -rng.random(3) if paraphrased else None, [-rng.random(5) for _ in range(3)])


@pytest.fixture
def logs():
    queries = [Query(str(i), "who", "a b c d", "a b", ("x", "y")) for i in range(3)]
    exam = Exam(
        {name: QuerySet(queries, expect) for name, expect in SETS.items()}, "x", PromptSettings(),
        EvaluateSettings(tofu=TofuSettings(**UTILITY)), "cpu",
    )  # fmt: skip
    of_sets = {name: given(i, name in ("forget", "retain")) for i, name in enumerate(SETS)}
    aggregates = {"tofu.forget_quality": {"value": 0.25}, "tofu.model_utility": {"value": 0.5}}
    answers = {name: ["a b x", "a b c d", ""] for name in SETS}
    return of_sets, tofu_logs(exam, of_sets, answers, aggregates)


def test_names_items_and_means_are_open_unlearnings(logs):
    of_sets, (full, summary) = logs
    assert set(full) == EXPECTED == set(summary)
    assert (summary["forget_quality"], summary["model_utility"]) == (0.25, 0.5)
    loss = [entry["avg_loss"] for entry in full["forget_Q_A_Prob"]["value_by_index"].values()]
    assert loss == pytest.approx([-one.logprob.mean() for one in of_sets["forget"].tokens])
    assert summary["forget_Q_A_Prob"] == pytest.approx(np.exp(-np.array(loss)).mean())
    assert summary["forget_Q_A_ROUGE"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert len(full["forget_Q_A_PERT_Prob"]["value_by_index"]["2"]["prob"]) == 5
    ratios = [entry["score"] for entry in full["retain_Truth_Ratio"]["value_by_index"].values()]
    wrong, right = of_sets["retain"].perturbed, of_sets["retain"].paraphrased
    assert ratios == pytest.approx([np.exp(w.mean() - r) for w, r in zip(wrong, right, strict=True)])
    assert summary["retain_Truth_Ratio"] == pytest.approx(np.maximum(0, 1 - np.array(ratios)).mean())
    assert summary["extraction_strength"] == summary["exact_memorization"] == 1


def test_what_we_write_is_read_back_as_a_reference(logs, tmp_path):
    of_sets, (full, _) = logs
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(full))
    reference = read_reference(TofuSettings(forget="forget", reference=str(tmp_path / "TOFU_EVAL.json")))
    wrong, right = of_sets["forget"].perturbed, of_sets["forget"].paraphrased
    assert reference.ratios["geo"] == pytest.approx([np.exp(w.mean() - r) for w, r in zip(wrong, right, strict=True)])
