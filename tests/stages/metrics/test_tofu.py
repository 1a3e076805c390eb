"""TOFU's metrics: hand-computed cases, and every value of the authors' own logs in both variants."""

from __future__ import annotations

import json
from math import log

import numpy as np
import pytest
from support import SHARED

from duet.stages.metrics.tofu import (
    VARIANTS,
    choice_probability,
    forget_quality,
    model_utility,
    probability,
    truth_ratio_score,
    truth_ratios,
)

LOGS = SHARED / "data/tofu_official_logs"
FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "ra": "eval_real_author_wo_options.json",
    "wf": "eval_real_world_wo_options.json",
}


def test_by_hand():
    right = np.log([0.5, 0.2])
    wrong = [np.log([0.1, 0.4]), np.log([0.4, 0.4])]
    assert probability(right) == pytest.approx([0.5, 0.2])
    assert choice_probability(right, wrong) == pytest.approx([0.5, 0.2])
    geo, arith = (truth_ratios(variant, right, wrong) for variant in VARIANTS)
    assert geo == pytest.approx([0.4, 2.0])  # sqrt(0.1 * 0.4) = 0.2
    assert arith == pytest.approx([0.5, 2.0])
    assert truth_ratio_score(geo, "forgotten") == pytest.approx([0.4, 0.5])
    assert truth_ratio_score(geo, "kept") == pytest.approx([0.6, 0.0])
    assert truth_ratio_score(np.array([0.0]), "forgotten").tolist() == [0.0]


def test_utility_is_a_harmonic_mean():
    assert model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert model_utility([1.0, 0.0]) == 0.0


def test_forget_quality_by_hand():
    apart = forget_quality(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))
    assert (apart.ks, apart.p, apart.n, apart.n_reference) == (1.0, pytest.approx(2 / 20), 3, 3)  # of 6 choose 3 orders
    same = forget_quality(np.arange(50.0), np.arange(40.0) + 5.5)
    assert same.ks == pytest.approx(0.12)  # the six items up to 5 lie below all of the reference
    assert same.p > 0.5
    for found in (apart, same):
        assert found.ks_ci95[0] <= found.ks <= found.ks_ci95[1]
        assert found.p_ci95[0] <= found.p <= found.p_ci95[1]


def test_the_interval_of_the_statistic_covers_the_true_distance():
    """Uniform on [0, 1] against uniform on [0.3, 1.3]: the distribution functions are 0.3 apart."""
    rng = np.random.default_rng(0)
    found = [forget_quality(rng.random(60), 0.3 + rng.random(60)).ks_ci95 for _ in range(100)]
    assert np.mean([low <= 0.3 <= high for low, high in found]) >= 0.95


def items(log_of: dict, name: str) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray]:
    """(log-probability of the answer, of the wrong answers, of the paraphrase, ROUGE-L recall) per item of a log."""
    raw = log_of[FILES[name]]
    keys = list(raw["avg_gt_loss"])
    answer, paraphrased, recall = (
        np.array([raw[field][key] for key in keys])
        for field in ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall")
    )
    return -answer, [-np.array(raw["average_perturb_loss"][key]) for key in keys], -paraphrased, recall


def ratios(log_of: dict, name: str, variant: str) -> np.ndarray:
    _, wrong, paraphrased, _ = items(log_of, name)
    return truth_ratios(variant, paraphrased, wrong)


def components(log_of: dict, variant: str) -> dict[str, float]:
    found = {}
    for name in ("retain", "ra", "wf"):
        answer, wrong, _, recall = items(log_of, name)
        likely = probability(answer) if name == "retain" else choice_probability(answer, wrong)
        found[f"{name}_prob"] = float(likely.mean())
        found[f"{name}_rougeL_recall"] = float(recall.mean())
        found[f"{name}_tr"] = float(truth_ratio_score(ratios(log_of, name, variant), "kept").mean())
    return found


@pytest.mark.skipif(not LOGS.is_dir(), reason="needs ../shared/data/tofu_official_logs")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["phi", "llama2-7b"])
def test_the_authors_logs_are_reproduced(model, variant):
    """Every value of expected.json; its components are rounded to four digits there."""
    logs = json.loads((LOGS / "per_item_stats_wd0.01.json").read_text())
    expected = json.loads((LOGS / "expected.json").read_text())[model][variant]
    full, retain = logs[f"{model}_full"], logs[f"{model}_retain90"]
    of_forget = ratios(full, "forget", variant), ratios(retain, "forget", variant)
    exact, asymptotic = (forget_quality(*of_forget, method=method) for method in ("exact", "asymp"))
    found = {
        "ks_statistic": exact.ks,
        "ks_pvalue_exact": exact.p,
        "ks_pvalue_asymp": asymptotic.p,
        "forget_tr_closer_to_1_full": truth_ratio_score(of_forget[0], "forgotten").mean(),
        "forget_tr_closer_to_1_retain90": truth_ratio_score(of_forget[1], "forgotten").mean(),
        "model_utility_full": model_utility(components(full, variant).values()),
        "model_utility_retain90": model_utility(components(retain, variant).values()),
    }
    assert forget_quality(*of_forget).p == exact.p
    assert components(full, variant) == pytest.approx(expected.pop("components_full"), abs=5.1e-5)
    assert found == pytest.approx(expected, rel=1e-6, abs=0)
    assert log(found["ks_pvalue_exact"]) < -30  # so that the comparison of p is not one of zeros
