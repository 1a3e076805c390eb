"""TOFU's two aggregates of a run, model utility and forget quality, from per-item scores and likelihoods.

`evaluate.tofu` says which query sets they are made of, and `Reference` holds the truth ratios of a model that never saw the
forget set: from an earlier run's results.json, from open-unlearning's TOFU_EVAL.json, or from a model of this run. Truth ratios
are kept in results.json so that a run can be another's reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.cache.files import read_json, sha256_json
from duet.stages.exam.exam import HEADLINE, Exam
from duet.stages.exam.given_answers import Given
from duet.stages.metrics import tofu
from duet.stages.metrics.uncertainty import Score, bootstrap_means, interval
from duet.stages.settings.evaluate import TofuSettings

NAMES = {variant: "" if variant == "geo" else f"/{variant}" for variant in tofu.VARIANTS}  # ends of metric ids

Scores = Mapping[str, Score]
BySet = Mapping[str, Given]


@dataclass(frozen=True)
class Reference:
    """The forget set's truth ratios of a model that never saw it, by variant."""

    where: str  # for messages
    ratios: dict[str, np.ndarray]
    questions: str | None  # hash of the questions they are of; None where the file does not tell


def read_reference(settings: TofuSettings | None) -> Reference | None:
    """What `evaluate.tofu.reference` names; None where it names nothing."""
    if settings is None or settings.reference is None:
        return None
    path, where = Path(settings.reference), f"evaluate.tofu.reference: {settings.reference}"
    if not path.is_file():
        raise UserError(f"{where}: no such file", "name a results.json of `duet evaluate`, or a TOFU_EVAL.json")
    content = read_json(path)
    try:
        if "forget_truth_ratio" in content:  # open-unlearning's, which averages losses
            entries = content["forget_truth_ratio"]["value_by_index"]
            ratios = [float(entries[key]["score"]) for key in sorted(entries, key=int)]
            return Reference(where, {"geo": np.array(ratios)}, None)
        by_model, questions = content["tofu"]["truth_ratios"], content["tofu"]["questions"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{where} holds no truth ratios of a forget set",
            "a results.json has them where its run had evaluate.tofu.forget; a TOFU_EVAL.json under forget_truth_ratio",
        ) from None
    found = _of_model(by_model, settings, where)
    return Reference(where, {variant: np.array(values) for variant, values in found.items()}, questions)


def _of_model(by_model: Mapping[str, Any], settings: TofuSettings, where: str) -> Any:
    model = settings.reference_model or "base"
    if model not in by_model:
        raise UserError(
            f"{where} has no model {model!r}", f"set evaluate.tofu.reference_model to one of {', '.join(by_model)}"
        )
    return by_model[model]


def check_reference(reference: Reference | None, exam: Exam, models: Sequence[str]) -> None:
    """Refuse, before anything is asked, a reference that is none of the run's models or is of other questions."""
    settings = exam.settings.tofu
    if settings is None or settings.forget is None:
        return
    if reference is None:
        _of_model(dict.fromkeys(models), settings, "evaluate.tofu: this run")
    else:
        count = len(exam.sets[settings.forget].queries)
        _check_same_items(reference, _questions_of(exam, settings.forget), count, settings.forget)


def tofu_results(
    exam: Exam,
    given: Mapping[str, BySet],
    scores: Mapping[str, Scores],
    reference: Reference | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The aggregates as results.json has them, by model and metric id; and its `tofu`: the forget set's truth ratios.

    Where the settings name a file and its `reference` is not given, as in a comparison, which asks a part of the questions,
    there is no forget quality: base must not stand in for a model that never saw them.
    """
    settings = exam.settings.tofu
    models: dict[str, dict[str, Any]] = {name: {} for name in given}
    if settings is None:
        return models, {}
    if settings.utility_sets:
        for name, found in models.items():
            for variant, suffix in NAMES.items():
                found[f"tofu.model_utility{suffix}"] = _utility(
                    settings.utility_sets, exam.settings.seed, given[name], scores[name], variant
                )
    if settings.forget is None or (settings.reference is not None and reference is None):
        return models, {}
    forget = settings.forget
    ratios = {
        name: {variant: tofu.truth_ratios(variant, of[forget].right, of[forget].perturbed or []) for variant in NAMES}
        for name, of in given.items()
    }
    questions = _questions_of(exam, forget)
    reference = reference or Reference("this run", _of_model(ratios, settings, "evaluate.tofu: this run"), questions)
    _check_same_items(reference, questions, len(exam.sets[forget].queries), forget)
    for name, found in models.items():
        for variant in reference.ratios:
            quality = tofu.forget_quality(ratios[name][variant], reference.ratios[variant])
            found[f"tofu.forget_quality{NAMES[variant]}"] = _quality_json(quality)
    plain = {name: {variant: values.tolist() for variant, values in of.items()} for name, of in ratios.items()}
    return models, {"questions": questions, "truth_ratios": plain}


def _utility(utility_sets: Mapping[str, str], seed: int, given: BySet, scores: Scores, variant: str) -> dict[str, Any]:
    """Model utility with its interval, for which the items of each set are resampled, each with its three scores."""
    means: list[float] = []
    resampled, count = [], 0
    for number, (role, name) in enumerate(utility_sets.items()):
        of, recall = given[name], scores[f"{name}.{HEADLINE}"]
        wrong = of.perturbed or []
        likely = tofu.probability(of.answer) if role == "retain" else tofu.choice_probability(of.answer, wrong)
        worth = tofu.truth_ratio_score(tofu.truth_ratios(variant, of.right, wrong), "kept")
        values_N3 = np.stack([likely, recall.items, worth], axis=1)
        means += values_N3.mean(axis=0).tolist()
        rng = np.random.default_rng([seed, number])
        resampled.append(bootstrap_means(values_N3, rng, clusters=recall.clusters))
        count += len(values_N3)
    utilities = [tofu.model_utility(row) for row in np.concatenate(resampled, axis=1)]
    return {"value": tofu.model_utility(means), "n": count, "ci95": list(interval(np.array(utilities)))}


def _questions_of(exam: Exam, forget: str) -> str:
    """Hash of all that the truth ratios of a set are of: its questions and the answers that they compare."""
    queries = exam.sets[forget].queries
    return sha256_json([[q.asked, q.answer if q.paraphrased is None else q.paraphrased, q.perturbed] for q in queries])


def _check_same_items(reference: Reference, questions: str, count: int, forget: str) -> None:
    """Refuse a test between truth ratios of different questions."""
    other = reference.questions not in (None, questions)
    sizes = {len(values) for values in reference.ratios.values()} | {count}
    if other or len(sizes) > 1:
        raise UserError(
            f"{reference.where}: its truth ratios are of other questions or given answers than the set {forget}",
            "evaluate the reference model on the same rows, with the same paraphrased_field and perturbed_field",
        )


def _quality_json(quality: tofu.ForgetQuality) -> dict[str, Any]:
    return {
        "value": quality.p,
        "n": quality.n,
        "ci95": list(quality.p_ci95),
        "p": quality.p,
        "ks": quality.ks,
        "ks_ci95": list(quality.ks_ci95),
        "n_reference": quality.n_reference,
    }
