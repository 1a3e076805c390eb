"""Texts that a model reads beside given answers: choices, membership inference's two sets, neutral text.

`texts_of` collects what the settings ask for, `reading.py` has a model read it; `scores_of` and `floors_of` turn the numbers
per item into scores. What is not configured is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.cache.files import read_json
from duet.stages.exam.exam import Exam, references_of, rows_sha256
from duet.stages.metrics import choices, membership, perplexity, uncertainty
from duet.stages.metrics.uncertainty import Score
from duet.stages.models.token_scores import LOWEST
from duet.stages.questions.documents import load_documents
from duet.stages.settings.evaluate import MembershipSettings

SIDES = ("members", "nonmembers")

# {"choices": {set: {metric: [0..1]}}, "membership": {side: {attack: [x]}}, "neutral": {"losses": [x], "tokens": [n]}}; None is
# a number that is not finite
Readings = Mapping[str, Any]


@dataclass(frozen=True)
class Texts:
    """What is to be read, beside the exam's questions."""

    documents: list[str] = field(default_factory=list)
    with_choices: tuple[str, ...] = ()  # sets
    membership: MembershipSettings | None = None

    def __bool__(self) -> bool:
        return bool(self.documents or self.with_choices or self.membership)


def texts_of(exam: Exam) -> Texts:
    """What the settings ask for; names of sets that do not exist are UserErrors."""
    settings = exam.settings.membership
    for side in SIDES if settings else ():
        if (name := getattr(settings, side)) not in exam.sets:
            raise UserError(f"evaluate.membership.{side}: no set {name!r}", f"the sets are {', '.join(exam.sets)}")
    neutral = exam.settings.neutral_text
    return Texts(
        documents=load_documents(neutral, "evaluate.neutral_text") if neutral else [],
        with_choices=tuple(name for name, query_set in exam.sets.items() if query_set.queries[0].choices),
        membership=settings,
    )


def not_finite(readings: Readings) -> int:
    """Number of questions and documents of which some number is not finite, or a likelihood below LOWEST; most of one set."""
    columns = [*readings.get("choices", {}).values(), *readings.get("membership", {}).values()]
    counts = [int((~np.isfinite(_stacked(by_metric))).any(axis=0).sum()) for by_metric in columns]
    if neutral := readings.get("neutral"):
        losses, tokens = _stacked(neutral)
        counts.append(int((~(losses <= -LOWEST * tokens)).sum()))
    return max(counts, default=0)


def _stacked(columns: Mapping[str, list[float | None]]) -> np.ndarray:
    """The columns as rows of float64, NaN for None."""
    return np.array(list(columns.values()), np.float64)


def scores_of(readings: Readings, exam: Exam) -> dict[str, Score]:
    """Scores of one model, whose numbers are all finite, by metric id."""
    seed = exam.settings.seed
    scores = {
        f"{name}.{metric}": uncertainty.score(np.array(values), clusters=references_of(exam.sets[name]), seed=seed)
        for name, by_metric in readings.get("choices", {}).items()
        for metric, values in by_metric.items()
    }
    if "membership" in readings and (settings := exam.settings.membership):
        sets = [exam.sets[getattr(settings, side)] for side in SIDES]
        clusters = (references_of(sets[0]), references_of(sets[1]))
        members, nonmembers = (readings["membership"][side] for side in SIDES)
        for attack in members:
            values = (np.array(members[attack]), np.array(nonmembers[attack]))
            scores[f"mia.{attack}.{settings.members}"] = membership.auc_score(*values, clusters, seed)
        if (retrained := retrained_auc(exam)) is not None:
            min_k = scores[f"mia.min_k.{settings.members}"]
            scores[f"mia.privleak.{settings.members}"] = membership.privleak(min_k, retrained)
    if "neutral" in readings:
        losses, tokens = (np.array(readings["neutral"][name], np.float64) for name in ("losses", "tokens"))
        read = tokens > 0  # of a document of one token, nothing is predicted where nothing stands in front
        if read.any():
            scores[perplexity.METRIC] = perplexity.perplexity(losses[read], tokens[read], seed)
    return scores


def retrained_auc(exam: Exam) -> float | None:
    """Min-k's AUC of the retrained model that `evaluate.membership.retrained` names; None where it names none.

    UserError where it cannot be one that PrivLeak is measured from.
    """
    settings, where = exam.settings.membership, "evaluate.membership.retrained"
    if settings is None or not settings.retrained:
        return None
    path, key = Path(settings.retrained), f"mia.min_k.{settings.members}"
    if not path.is_file():
        raise UserError(
            f"{where}: no such file: {path}", "name the results.json of an evaluation of the retrained model"
        )
    content = read_json(path)
    models = content.get("models", {})
    score = models.get(settings.retrained_name, {}).get(key)
    if score is None:
        raise UserError(
            f"{where}: {path} has no {key} of {settings.retrained_name!r}",
            f"evaluate that model with the same evaluate.membership; its models are {', '.join(models) or 'none'}",
        )
    if score["value"] >= 1:
        raise UserError(
            f"{where}: the AUC {key} is 1, so the model knows the members", "name a model that never saw them"
        )
    _check_alike(content, settings, exam, f"{where}: {path}")
    return float(score["value"])


def _check_alike(content: Mapping[str, Any], settings: MembershipSettings, exam: Exam, where: str) -> None:
    """UserError where a results.json says that its AUC was found with another min_k, or on other rows."""
    theirs, data = content.get("evaluate", {}).get("membership") or {}, content.get("provenance", {}).get("data", {})
    if (min_k := theirs.get("min_k", settings.min_k)) != settings.min_k:
        raise UserError(
            f"{where}: its AUC is of evaluate.membership.min_k {min_k}, this run's of {settings.min_k}",
            "evaluate the retrained model with the same evaluate.membership",
        )
    for side in SIDES:
        name = getattr(settings, side)
        of_side = data.get(theirs.get(side, name))
        if of_side and of_side["sha256"] != rows_sha256(exam.sets[name]):
            raise UserError(
                f"{where}: its AUC is of other {side} than the rows of the set {name!r}",
                "evaluate the retrained model on the same rows of the same data, with the same id_field",
            )


def floors_of(exam: Exam) -> dict[str, dict[str, float]]:
    """Chance on the sets with choices."""
    return {
        f"{name}.{metric}": {"chance": choices.chance(query_set.queries)}
        for name, query_set in exam.sets.items()
        if query_set.queries[0].choices
        for metric in (choices.LETTER, choices.CLOZE)
    }
