"""TOFU scores of a model in the form that open-unlearning (locuslab) writes: its TOFU_EVAL.json and TOFU_SUMMARY.json.

So that its tables, plots and `retain_logs_path` can read what was evaluated here; `tofu.read_reference` reads the other
way. Names and layout are open-unlearning's. Where its code differs, the number is Duet's: extraction strength is 0 where
nothing is extracted, and neither it nor exact memorisation counts the end of the sequence; ROUGE splits words of any script;
question and answer are rendered as the run's prompt says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duet.stages.exam.exam import Exam, references_of
from duet.stages.exam.given_answers import Given
from duet.stages.metrics import tofu
from duet.stages.metrics.memorisation import exact_memorisation, extraction_strength
from duet.stages.metrics.text import rouge_l

ROLES = {"retain": "retain", "real_authors": "ra", "world_facts": "wf"}  # of evaluate.tofu, and what names begin with

Entry = dict[str, Any]


def tofu_logs(
    exam: Exam, given: Mapping[str, Given], answers: Mapping[str, list[str]], aggregates: Mapping[str, Any]
) -> tuple[dict[str, Entry], dict[str, float]]:
    """One model's TOFU_EVAL and TOFU_SUMMARY. `given` and `answers` are by set, `aggregates` its entries of results.json.

    Items are numbered as they were asked. What `evaluate.tofu` does not name is left out.
    """
    settings = exam.settings.tofu
    if settings is None:
        raise ValueError("evaluate.tofu names no sets")
    found: dict[str, Entry] = {}
    for role, name in {"forget": settings.forget or "forget", **settings.utility_sets}.items():
        if name in given:
            rouge = rouge_l(references_of(exam.sets[name]), answers[name])
            found |= _of_set("forget" if role == "forget" else ROLES[role], given[name], *rouge)
    for theirs, ours in (("forget_quality", "tofu.forget_quality"), ("model_utility", "tofu.model_utility")):
        if ours in aggregates:
            found[theirs] = {"agg_value": aggregates[ours]["value"]}
    found = dict(sorted(found.items()))
    return found, {key: entry["agg_value"] for key, entry in found.items() if "agg_value" in entry}


def _of_set(begins: str, given: Given, recall: np.ndarray, f1: np.ndarray) -> dict[str, Entry]:
    is_choice = begins in ("ra", "wf")
    found = {
        f"{begins}_Q_A_Prob": _likely(given.answer),
        f"{begins}_Q_A_ROUGE": _entry({"rougeL_recall": recall, "rougeL_f1": f1}, recall),
    }
    if given.paraphrased is not None:
        found[f"{begins}_Q_A_PARA_Prob"] = _likely(given.paraphrased)
    if given.perturbed is not None:
        found[f"{begins}_Q_A_PERT_Prob"] = {
            "value_by_index": {
                str(i): {"prob": np.exp(options).tolist(), "avg_loss": (-options).tolist()}
                for i, options in enumerate(given.perturbed)
            },
            "agg_value": float(np.mean([np.exp(options).mean() for options in given.perturbed])),
        }
        if is_choice:
            share = tofu.choice_probability(given.answer, given.perturbed)
            found[f"{begins}_Q_A_Prob_normalised"] = _entry({"prob": share}, share)
        ratio = tofu.truth_ratio_geo(given.right, given.perturbed)
        worth = tofu.truth_ratio_score(ratio, "forgotten" if begins == "forget" else "kept")
        found["forget_truth_ratio" if begins == "forget" else f"{begins}_Truth_Ratio"] = _entry({"score": ratio}, worth)
    if begins == "forget":
        flags = given.answer_flags()
        for key, function in (("exact_memorization", exact_memorisation), ("extraction_strength", extraction_strength)):
            values = np.array([function(of_item) for of_item in flags])
            found[key] = _entry({"score": values}, values)
    return found


def _likely(answer_N: np.ndarray) -> Entry:
    likely = tofu.probability(answer_N)
    return _entry({"prob": likely, "avg_loss": -answer_N}, likely)


def _entry(columns: Mapping[str, Sequence[float] | np.ndarray], values: np.ndarray) -> Entry:
    """`value_by_index` from one array per field; `agg_value` is the mean of `values`."""
    by_index = {str(i): {field: float(column[i]) for field, column in columns.items()} for i in range(len(values))}
    return {"value_by_index": by_index, "agg_value": float(np.mean(values))}
