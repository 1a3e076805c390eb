"""Stage three: answers are turned into scores, verdicts and comparisons.

Every score carries n and an interval, every text score two floors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from duet.stages.attacks import quantize
from duet.stages.attacks import scores as attack_scores
from duet.stages.attacks.above import above_control
from duet.stages.attacks.names import CONTROL
from duet.stages.attacks.relearn_curves import with_curves
from duet.stages.evaluate import depth, judged, muse
from duet.stages.evaluate.answers import refusals_of
from duet.stages.evaluate.attacked import Shown
from duet.stages.evaluate.collapse import ModelAnswers
from duet.stages.evaluate.definitions import all_metrics, definitions, versions
from duet.stages.evaluate.distance import by_distance
from duet.stages.evaluate.tofu import Reference, tofu_results
from duet.stages.evaluate.verdict import outcomes_of
from duet.stages.exam import given_beside, given_texts
from duet.stages.exam.depth import Depth
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, QuerySet, Subject, references_of
from duet.stages.exam.given_answers import Given, finite, score_given
from duet.stages.exam.judge import Judged
from duet.stages.metrics import text as metrics
from duet.stages.metrics import uncertainty
from duet.stages.metrics.uncertainty import Score

NUM_SAMPLES = 40


@dataclass(frozen=True)
class Read:
    """What models made of texts that they were given."""

    given: Mapping[str, Mapping[str, Given]] = field(default_factory=dict)  # by subject and set; empty: no likelihoods
    readings: Mapping[str, given_texts.Readings] = field(default_factory=dict)  # by subject
    control: Mapping[str, Given] = field(default_factory=dict)  # by attacked set; empty: no control, or no likelihoods
    exchanged: Mapping[str, Given] = field(
        default_factory=dict
    )  # base on answers behind other questions, by attacked set
    depth: Depth | None = None
    judged: Judged | None = None


def results_of(
    subjects: Sequence[Subject],
    exam: Exam,
    answers: Mapping[str, Mapping[str, Any]],
    read: Read = Read(),
    reference: Reference | None = None,
    against: str | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Score]]]:
    """The parts of results.json that come from what models said and made of texts: scores, verdicts, comparisons, floors,
    samples, and what the numbers mean; and the scores by model, with their items.

    A model of which some likelihoods are not finite has no scores of them: its verdict says that it is broken. `reference` is
    that of TOFU's forget quality. Every subject is compared with its own base, or all with the one that `against` names.
    """
    answers, (given, not_finite) = with_curves(answers, exam), finite(read.given)
    models = {s.name: scores_of(answers[s.name], given.get(s.name, {}), exam) for s in subjects}
    for name in models:
        models[name] |= muse.scores_of(answers[name], exam)
    for name, readings in read.readings.items():
        bad = given_texts.not_finite(readings)
        models[name] |= {} if bad else given_texts.scores_of(readings, exam)
        if readings:
            not_finite[name] = not_finite.get(name) or bad
    if read.depth:
        for subject in subjects:
            models[subject.name] |= depth.scores_of(read.depth, subject, exam)
    for name, replies in read.judged.replies.items() if read.judged else ():
        models[name] |= judged.scores_of(replies, exam)
    floors = _floors(exam) | muse.floors_of(exam) | given_texts.floors_of(exam) | given_beside.floors_of(read.exchanged)
    aggregates, tofu = tofu_results(exam, given, models, reference)
    attacked, above = attack_scores.results_of(subjects, exam, answers, models), above_control(subjects, exam, answers)
    works = {kind: facts["works"] for kind, facts in attacked["attacks_work"].items()}
    control = _control(read.control, answers.get(CONTROL, {}), exam)
    shown = {
        s.name: Shown(
            {kind: ok and kind not in quantize.untouched(answers[s.name]) for kind, ok in works.items()},
            above[s.name] if above is not None else None,
            s.trained_on,
        )
        for s in subjects
    }
    evidence = {s.name: ModelAnswers(answers[s.name], models[s.name], not_finite.get(s.name)) for s in subjects}
    results = {
        "models": {
            name: {key: score.as_json() for key, score in scores.items()} | aggregates.get(name, {})
            for name, scores in models.items()
        },
        **({"tofu": tofu} if tofu else {}),
        "sets": {name: {"n": len(s.queries), "expect": s.expect} for name, s in exam.sets.items()},
        "floors": floors,
        "outcomes": outcomes_of(subjects, exam, evidence, floors, shown, control),
        "performance_shift": _shifts(subjects, exam, models),
        "samples": _samples(subjects, exam, answers),
        "comparisons": _comparisons({s.name: against or s.base for s in subjects}, exam, models),
        "refusals": refusals_of(exam, {subject.name: answers[subject.name] for subject in subjects}),
        "definitions": definitions(all_metrics()),
        "versions": versions(all_metrics()),
        "trained_on": {s.name: list(s.trained_on) for s in subjects if s.trained_on},
        "above_control": attack_scores.above_as_json(above),
        **attacked,
        "control": attacked["control"] | {key: score.as_json() for key, score in control.items()},
        "depth": depth.as_json(read.depth, exam),
        "by_distance": by_distance(subjects, exam, models, floors),
        "judge": judged.as_json(read.judged, exam, models),
    }
    return results, models


def scores_of(answers: Mapping[str, Any], given: Mapping[str, Given], exam: Exam) -> dict[str, Score]:
    """Scores of one model: `<set>.<metric>`, then those of the attacks."""
    seed, extra = exam.settings.seed, exam.settings.refusal_patterns
    scores: dict[str, Score] = {}
    for name, query_set in exam.sets.items():
        references = references_of(query_set)
        items = metrics.score_texts(references, answers[name], extra)
        items[DISTINCTIVE] = metrics.distinctive_recall(exam.distinctive[name], answers[name])
        if name in given:
            items |= score_given(given[name], query_set.expect)
        for metric, values in items.items():
            scores[f"{name}.{metric}"] = uncertainty.score(values, clusters=references, seed=seed)
    scores |= attack_scores.scores_of(answers, exam)
    return scores


def _control(given: Mapping[str, Given], answers: Mapping[str, Any], exam: Exam) -> dict[str, Score]:
    """What the control scores on the attacked sets, of what it says and of memorisation; empty where there is none."""
    items = {
        f"{name}.{metric}": values
        for name, of_set in given.items()
        for metric, values in given_beside.memorised(of_set).items()
    }
    for name in exam.attacked if answers else ():
        items[f"{name}.{DISTINCTIVE}"] = metrics.distinctive_recall(exam.distinctive[name], answers[name])
    return {
        key: uncertainty.score(values, references_of(exam.sets[key.rsplit(".", 1)[0]]), exam.settings.seed)
        for key, values in items.items()
    }


def _questions_of(query_set: QuerySet) -> list[str]:
    return [query.question for query in query_set.queries]


def _floors(exam: Exam) -> dict[str, dict[str, float]]:
    found, refusal = {}, exam.settings.refusal
    for name, query_set in exam.sets.items():
        questions, words = _questions_of(query_set), exam.distinctive[name]
        found[f"{name}.{DISTINCTIVE}"] = {
            "refusal": float(metrics.distinctive_recall(words, [refusal] * len(questions)).mean()),
            "echo": float(metrics.distinctive_recall(words, questions).mean()),
        }
        for metric, floor in metrics.floors(questions, references_of(query_set), exam.settings.refusal).items():
            found[f"{name}.{metric}"] = floor
    return found


def _shifts(
    subjects: Sequence[Subject], exam: Exam, models: Mapping[str, Mapping[str, Score]]
) -> dict[str, dict[str, Any]]:
    """Performance shift in points (100 * score) of every subject that has a base, over the sets' headline metric."""
    keys = {name: f"{name}.{HEADLINE}" for name in exam.judged}
    forgotten = {key for name, key in keys.items() if exam.sets[name].expect == "forgotten"}
    points = {model: {key: 100 * scores[key].value for key in keys.values()} for model, scores in models.items()}
    shifts = {}
    for subject in subjects:
        if subject.base != subject.name:
            total, terms = metrics.performance_shift(points[subject.base], points[subject.name], forgotten)
            shifts[subject.name] = {"value": total, "terms": terms}
    return shifts


def _comparisons(
    against: Mapping[str, str], exam: Exam, models: Mapping[str, Mapping[str, Score]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Of every model, each score less that of the one it is compared with, on the same items; nothing of one and itself.

    Left out: a score that is not a mean over items, as an AUC; and one that the two have of different items, as of the answers
    on which a judge's reply can be read.
    """
    return {
        name: {
            key: {"against": other, **uncertainty.compare(found, models[other][key], exam.settings.seed)}
            for key, found in models[name].items()
            if key in models[other] and len(found.items) and found.clusters == models[other][key].clusters
        }
        for name, other in against.items()
        if other != name
    }


def _samples(subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Up to NUM_SAMPLES questions drawn evenly from the sets, by seed and not by how they turned out."""
    rng = np.random.default_rng(exam.settings.seed)
    shuffled = {name: iter(rng.permutation(len(s.queries)).tolist()) for name, s in exam.sets.items()}
    drawn: list[tuple[str, int]] = []
    while len(drawn) < NUM_SAMPLES and shuffled:
        for name in list(shuffled):
            number = next(shuffled[name], None)
            if number is None:
                del shuffled[name]
            elif len(drawn) < NUM_SAMPLES:
                drawn.append((name, number))
    drawn.sort(key=lambda pair: list(exam.sets).index(pair[0]))
    return [
        {
            "set": name,
            "id": exam.sets[name].queries[number].row_id,
            "question": exam.sets[name].queries[number].question,
            "answer": exam.sets[name].queries[number].answer,
            "outputs": {subject.name: answers[subject.name][name][number] for subject in subjects},
        }
        for name, number in drawn
    ]
