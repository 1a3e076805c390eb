"""How much comes back while copies are trained: from the answers to curves by number of steps, beside the control's.

Pure functions of what `relearn.py` found. At each number of steps the learning rate counts that brings back most on average,
of each model its own: an attacker tries several.

Shapes: R learning rates, S numbers of steps (0, before any, first), N questions that any draw asks, M those that one asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet.stages.attacks.chosen import chosen
from duet.stages.attacks.names import CONTROL
from duet.stages.attacks.parts import Answers
from duet.stages.attacks.relearn_sets import RelearnSet, relearn_sets, steps_of
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, Subject, references_of
from duet.stages.metrics import text as metrics
from duet.stages.metrics.uncertainty import score


@dataclass(frozen=True)
class Curve:
    """What one model's copies that were trained on one relearn set answer, by metric: float64 [R, S, N]."""

    by_metric: Mapping[str, np.ndarray]

    def strongest(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Per number of steps, the answers' scores at the rate with the highest mean, [S, N], and its number, [S]."""
        values_RSN = self.by_metric[metric]
        best_S = values_RSN.mean(axis=2).argmax(axis=0)
        return values_RSN[best_S, np.arange(len(best_S))], best_S


def curve_of(answers: Answers, name: str, one: RelearnSet) -> Curve:
    """One model's curve, of answers `with_curves`."""
    return answers[f"curves.{name}"][one.name]


def with_curves(answers: Mapping[str, Answers], exam: Exam) -> dict[str, Answers]:
    """All answers by model and beside each model's own, by attacked set, its curves by relearn set: they are scored once."""
    if "relearn" not in chosen(exam)[0]:
        return dict(answers)
    sets = {name: relearn_sets(exam, name)[0] for name in exam.attacked}
    return {
        model: {
            **of_model,
            **{
                f"curves.{name}": {
                    one.name: scored(of_model[f"attack.relearn.{name}"], exam, name, one) for one in of_set
                }
                for name, of_set in sets.items()
            },
        }
        for model, of_model in answers.items()
    }


def scored(kept: Mapping[str, Any], exam: Exam, name: str, one: RelearnSet) -> Curve:
    """The answers before any step and after each number of steps, scored in both metrics; the mean over the draws that ask."""
    references, words = references_of(exam.sets[name]), exam.distinctive[name]

    def rouge(asked: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        return metrics.rouge_l([references[i] for i in asked], texts)[0]

    def facts(asked: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        return metrics.distinctive_recall([words[i] for i in asked], texts)

    return Curve({HEADLINE: _mean_over_draws(kept, one, rouge), DISTINCTIVE: _mean_over_draws(kept, one, facts)})


def _mean_over_draws(
    kept: Mapping[str, Any], one: RelearnSet, measure: Callable[[Sequence[int], Sequence[str]], np.ndarray]
) -> np.ndarray:
    """Scores of the questions `one.asked`, float64 [R, S, N]. `measure` scores texts [M] to the questions of these numbers."""
    at = {number: column for column, number in enumerate(one.asked)}
    draws_DRSN = []
    for number, draw in enumerate(one.draws):
        before_M = measure(draw.asked, [kept["before"][i] for i in draw.asked])
        of_rates = [of_draws[number] for of_draws in kept["after"][one.name].values()]
        scores_RSM = np.stack([[before_M, *(measure(draw.asked, texts) for texts in of_rate)] for of_rate in of_rates])
        spread_RSN = np.full((*scores_RSM.shape[:2], len(at)), np.nan)
        spread_RSN[:, :, [at[i] for i in draw.asked]] = scores_RSM
        draws_DRSN.append(spread_RSN)
    return np.nanmean(draws_DRSN, axis=0)


def relearning(
    subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Answers]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per model and relearn set its curves, as in results.json. Empty if the attack was not made.

    `answers` are those `with_curves`. Half is that of base's own recall on the same questions before any step.
    """
    if "relearn" not in chosen(exam)[0]:
        return {}
    base_of = {subject.name: subject.base for subject in subjects}
    if CONTROL in answers:
        base_of[CONTROL] = "base"
    found: dict[str, dict[str, Any]] = {model: {} for model in base_of}
    for name in exam.attacked:
        for one in relearn_sets(exam, name)[0]:
            curves = {model: curve_of(answers[model], name, one) for model in base_of}
            references = [references_of(exam.sets[name])[i] for i in one.asked]
            for model, base in base_of.items():
                found[model][one.name] = _by_steps(curves[model], curves[base], references, exam)
            for model in [model for model in base_of if model != CONTROL and CONTROL in base_of]:
                found[model][one.name] |= beside(found[model][one.name], found[CONTROL][one.name])
    return found


def _by_steps(curve: Curve, base: Curve, references: Sequence[str], exam: Exam) -> dict[str, Any]:
    settings = exam.settings.relearn
    found: dict[str, Any] = {"steps": list(steps_of(settings)), "n": len(references), "lrs": list(settings.lrs)}
    found["different_answers"] = len(set(references))
    keys = {HEADLINE: ("recall", "ci95", "steps_to_half"), DISTINCTIVE: (DISTINCTIVE, f"{DISTINCTIVE}_ci95", "to_half")}
    for metric, (values, ci95, to_half) in keys.items():
        strongest_SN, best_S = curve.strongest(metric)
        means = [score(values_N, clusters=references, seed=exam.settings.seed) for values_N in strongest_SN]
        half = base.by_metric[metric][0, 0].mean() / 2
        found[values] = [mean.value for mean in means]
        found[ci95] = [list(mean.ci95) for mean in means]
        found[to_half] = next((n for n, m in zip(found["steps"], means, strict=True) if m.value >= half > 0), None)
        if metric == DISTINCTIVE:
            found["best_lr"] = [settings.lrs[i] for i in best_S]
    found["by_lr"] = {
        str(lr): of_lr.mean(axis=1).tolist()
        for lr, of_lr in zip(settings.lrs, curve.by_metric[DISTINCTIVE], strict=True)
    }
    return found


def beside(model: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    """A model's curve of distinctive recall against the control's: the largest difference after any number of steps, and where
    both reach half of base's recall, the ratio of the model's number of steps to the control's.
    """
    differences = [own - other for own, other in zip(model[DISTINCTIVE], control[DISTINCTIVE], strict=True)]
    at = max(range(1, len(differences)), key=lambda i: differences[i])
    own, other = model["to_half"], control["to_half"]
    return {
        "above_control": differences[at],
        "above_control_steps": model["steps"][at],
        "steps_ratio": own / other if own is not None and other else None,
    }
