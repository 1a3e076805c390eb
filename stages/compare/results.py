"""From answers to compare.json: a row for each method, over all seeds that its chosen setting was trained with.

`evaluate/results.py` scores every model alone; here the models of one row become one number with one interval, over seeds and
questions together (`metrics/seeds.py`), and each row is compared with DUET's on the same questions. Pure functions of answers.

Shapes: S seeds, N questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet.stages.evaluate import results as evaluation
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, Subject, references_of
from duet.stages.metrics import seeds
from duet.stages.metrics.text import rouge_l
from duet.stages.metrics.uncertainty import Score

NOTHING_READ = evaluation.Read()
COMPARED = (HEADLINE, DISTINCTIVE)  # of the sets as they are, and of those under attack


@dataclass(frozen=True)
class Row:
    """One row of the table: a model, or one method's models of several seeds."""

    name: str  # base, teacher, npo, duet:deep, oracle
    subjects: Sequence[Subject]  # one for each seed, the one that chose first


def forgotten(exam: Exam) -> set[str]:
    """The sets that are to be forgotten, of those that count."""
    return {name for name, query_set in exam.judged.items() if query_set.expect == "forgotten"}


def recalls(exam: Exam, answers: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    """ROUGE-L recall of every question, by set that counts, float64 [n] each."""
    return {name: rouge_l(references_of(s), answers[name])[0] for name, s in exam.judged.items()}


def points(exam: Exam, answers: Mapping[str, list[str]]) -> dict[str, float]:
    """Mean ROUGE-L recall by set that counts, in points."""
    return {name: 100 * float(values.mean()) for name, values in recalls(exam, answers).items()}


def results_of(
    exam: Exam,
    rows: Sequence[Row],
    answers: Mapping[str, Mapping[str, list[str]]],
    against: str,
    read: evaluation.Read = NOTHING_READ,
) -> dict[str, Any]:
    """The parts of compare.json that come from answers, said and given: those of results.json with rows in the place of models.

    `models` has each row's scores; `trade_off` the mean recall over the sets to be kept, and 1 less that over the sets to be
    forgotten; `comparisons` every row's scores and shift, less those of the row `against` on the same items; `outcomes` the
    verdicts on a row's models, which stand under `of_models` each. The first row is base.
    """
    subjects = [subject for row in rows for subject in row.subjects]
    found = evaluation.results_of(subjects, exam, answers, read)[0]
    curves = evaluation.with_curves(answers, exam)
    scores = {row.name: _scores(row, exam, curves) for row in rows}
    recall = {row.name: _stacked([recalls(exam, answers[s.name]) for s in row.subjects]) for row in rows}
    clusters, seed = {name: references_of(s) for name, s in exam.judged.items()}, exam.settings.seed
    gone = forgotten(exam)
    signs = {
        name: -100.0 if name in gone else 100.0 for name in exam.judged
    }  # points; a fall is good where it is wanted
    base = rows[0].name
    shifts = {
        row.name: {name: values - recall[base][name] for name, values in recall[row.name].items()} for row in rows[1:]
    }
    return found | {
        "models": {
            name: {key: seeds.weighted_sum({key: v}, {key: c}, {key: 1.0}, seed) for key, (v, c) in of_row.items()}
            for name, of_row in scores.items()
        },
        "performance_shift": {name: seeds.weighted_sum(v, clusters, signs, seed) for name, v in shifts.items()},
        "trade_off": {name: _trade_off(values, clusters, gone, seed) for name, values in recall.items()},
        "comparisons": {
            row.name: {
                key: {"against": against, **seeds.difference({key: v}, {key: others[0]}, {key: c}, {key: 1.0}, seed)}
                for key, (v, c) in scores[row.name].items()
                if (others := scores[against].get(key)) is not None
            }
            | {
                "performance_shift": {
                    "against": against,
                    **seeds.difference(recall[row.name], recall[against], clusters, signs, seed),
                }
            }
            for row in rows
            if row.name != against
        },
        "outcomes": _outcomes(rows, found["outcomes"]),
        "of_models": {name: found[name] for name in ("outcomes", "models", "performance_shift")},
        "definitions": found["definitions"] | {"ci95": seeds.DEFINITION},
    }


def scores_of_sets(
    exam: Exam, rows: Sequence[Row], answers: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, dict[str, Any]]:
    """By row, its scores of sets that are asked as they are, over its seeds, as `results_of` has them."""
    seed = exam.settings.seed
    return {
        row.name: {
            key: seeds.weighted_sum({key: v}, {key: c}, {key: 1.0}, seed)
            for key, (v, c) in _scores(row, exam, answers).items()
        }
        for row in rows
    }


def _scores(
    row: Row, exam: Exam, answers: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[np.ndarray, Sequence[object]]]:
    """By score, the items of the row's models, [S, N], and their clusters. Raises ValueError where the models' differ."""
    of_models: list[dict[str, Score]] = [
        evaluation.scores_of(answers[subject.name], {}, exam) for subject in row.subjects
    ]
    found = {}
    for key, first in of_models[0].items():
        if key.endswith(COMPARED) and len(first.items):
            if any(scores[key].clusters != first.clusters for scores in of_models):
                raise ValueError(f"{row.name}: the scores {key} are not of the same items")
            found[key] = (np.stack([scores[key].items for scores in of_models]), first.clusters)
    return found


def _stacked(values: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([of_model[name] for of_model in values]) for name in values[0]}


def _outcomes(rows: Sequence[Row], of_models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By row, how many of its models have which verdict, the most frequent first, and in words: `damaged 2, unclear 1`."""
    found = {}
    for row in rows:
        verdicts = [of_models[subject.name]["verdict"] for subject in row.subjects if subject.name in of_models]
        if not verdicts:
            continue
        counts = dict(Counter(verdicts).most_common())
        words = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{v} {n}" for v, n in counts.items())
        found[row.name] = {"verdict": words, "models": counts}
    return found


def _trade_off(
    recall: Mapping[str, np.ndarray], clusters: Mapping[str, Sequence[str]], gone: set[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Means over the sets of either kind, 0..1, with intervals."""
    sides = {
        "forgotten": {name: 1 - values for name, values in recall.items() if name in gone},
        "kept": {name: values for name, values in recall.items() if name not in gone},
    }
    return {
        side: seeds.weighted_sum(values, clusters, dict.fromkeys(values, 1 / len(values)), seed)
        for side, values in sides.items()
    }
