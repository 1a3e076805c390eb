"""What the judge says of the answers, as results.json has it: a score per model and set, and how far metrics agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, Subject, references_of
from duet.stages.exam.judge import Judge, Judged, asked_of, prompt_sha256, verdict_of
from duet.stages.metrics.membership import auc_score
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score, score

ID = "judged_right"
COMPARED = (HEADLINE, DISTINCTIVE, "exact_match")


def right(replies: Sequence[str]) -> np.ndarray:
    """Per answer 1 where the judge says yes, 0 where it says no, NaN where its reply is neither, float64 [N]."""
    verdicts = [verdict_of(reply) for reply in replies]
    return np.array([np.nan if verdict is None else float(verdict) for verdict in verdicts])


def scores_of(replies: Mapping[str, Sequence[str]], exam: Exam) -> dict[str, Score]:
    """One model's scores by metric id, over the answers with a reply that can be read; a set without one has none."""
    found = {}
    for name, of_set in replies.items():
        values, references = right(of_set), references_of(exam.sets[name])
        readable = np.flatnonzero(~np.isnan(values))
        if len(readable):
            clusters = [references[number] for number in readable]
            found[f"{name}.{ID}"] = score(values[readable], clusters, exam.settings.seed)
    return found


def as_json(judged: Judged | None, exam: Exam, models: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    """The entry `judge`: who judged, how many replies could not be read, and how far metrics agree; empty without a judge."""
    if judged is None:
        return {}
    values = {
        (model, name): right(of_set) for model, of_sets in judged.replies.items() for name, of_set in of_sets.items()
    }
    return {
        "model": judged.judge.settings.model,
        "prompt_sha256": prompt_sha256(judged.judge),
        "answers": sum(map(len, values.values())),
        "unreadable": {
            model: sum(int(np.isnan(of).sum()) for (whose, _), of in values.items() if whose == model)
            for model in judged.replies
        },
        "agreement": _agreement(values, exam, models),
    }


def _agreement(
    values: Mapping[tuple[str, str], np.ndarray], exam: Exam, models: Mapping[str, Mapping[str, Score]]
) -> dict[str, Any]:
    """By metric, the AUC by which it tells answers that the judge calls right from the others, over all models and sets."""
    said = np.concatenate([np.empty(0), *values.values()])
    references = [reference for _, name in values for reference in references_of(exam.sets[name])]
    sides = (np.flatnonzero(said == 1), np.flatnonzero(said == 0))
    if not all(map(len, sides)):
        return {}
    found = {}
    for metric in COMPARED:
        items = np.concatenate([models[model][f"{name}.{metric}"].items for model, name in values])
        clusters = ([references[number] for number in sides[0]], [references[number] for number in sides[1]])
        found[metric] = auc_score(items[sides[0]], items[sides[1]], clusters, exam.settings.seed).as_json()
    return found


def cost_of(judge: Judge, subjects: Sequence[Subject], exam: Exam) -> tuple[int, int]:
    """Requests, at most, since equal answers are judged once; and the characters of their prompts where a model answers as the
    references do."""
    triples = [
        triple for s in exam.judged.values() for triple in asked_of(s, [query.answer or "" for query in s.queries])
    ]
    characters = sum(len(message["content"]) for triple in triples for message in judge.messages(*triple))
    return len(subjects) * len(triples), len(subjects) * characters


METRICS = (
    Metric(
        ID,
        right,
        "Share of answers that the judge (evaluate.judge) says state the fact of the reference answer. A judge is a "
        "language model at temperature 0, and errs: `judge.agreement` in results.json has the AUC by which ROUGE-L "
        "recall, distinctive recall and exact match tell the answers that it calls right from the others, over all models "
        "and sets. Replies that are neither yes nor no are left out and counted.",
    ),
)
