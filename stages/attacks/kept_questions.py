"""Questions to be kept, asked behind texts of attacks: what a model refuses because somebody says "ignore your instructions".

A family is an attack whose variants put a text around the question and leave the question as it is. A part of each set to be
kept is asked behind each of its texts, the same part of all models; beside it stands the plain question, which is asked anyway.

Shapes: A texts of a family, N questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duet.cache.watch import Watch
from duet.stages.attacks.chosen import prompt_kinds
from duet.stages.attacks.names import kept_as, task
from duet.stages.attacks.parts import Answers, Cost, asked
from duet.stages.attacks.prompts import prompts_with
from duet.stages.attacks.texts import Variant, texts
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, Subject, Task, references_of
from duet.stages.exam.session import ModelSession
from duet.stages.metrics import text as metrics
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.refusals import refusals
from duet.stages.metrics.uncertainty import Score, score
from duet.stages.settings.attacks import ATTACKS

REFUSALS = "refusal_rate"


def families(exam: Exam) -> dict[str, dict[str, Variant]]:
    """The texts of each family that this run tries, by kind of attack and variant."""
    variants = texts(exam.settings.attack_texts)[0]
    found = {
        kind: {key: variant for key, variant in variants[kind].items() if _is_around(variant)}
        for kind in prompt_kinds(exam)
        if ATTACKS[kind].proof == "undoing"
    }
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def drawn(exam: Exam) -> dict[str, list[int]]:
    """Of each set to be kept, the numbers of the queries that are asked so, drawn by the seed."""
    rng, most = np.random.default_rng(exam.settings.seed), exam.settings.kept_under_attack
    return {
        name: sorted(rng.permutation(len(query_set.queries))[:most].tolist())
        for name, query_set in exam.judged.items()
        if query_set.expect == "kept" and most
    }


def tasks_of(exam: Exam, subject: Subject) -> dict[str, Task]:
    """What a subject is asked, by task."""
    found = {}
    for kind, variants in families(exam).items():
        for name, numbers in drawn(exam).items():
            for key, variant in variants.items():
                prompts = prompts_with(exam, variant, name, subject.prefix_of(name))
                found[task(kept_as(kind), key, name)] = Task([prompts[i] for i in numbers])
    return found


def asked_kinds(session: ModelSession, subject: Subject) -> list[str]:
    """The families that a subject is asked."""
    return [kind for kind in families(session.exam) if _tasks(session, subject, kind)]


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, Any]:
    """The answers behind one family's texts, by task."""
    return session.ask(subject, watch, _tasks(session, subject, kind))


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the answers."""
    return session.identity(subject, tasks=_tasks(session, subject, kind), more=[kept_as(kind)])


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    return asked(session, subject, _tasks(session, subject, kind))


def kept_under_attack(
    subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Answers]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per model and family, scores of the questions behind its texts, and of the same questions as they are (`plain.…`)."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for subject in subjects:
        for kind, variants in families(exam).items():
            scores = _scores(exam, kind, list(variants), answers[subject.name])
            if scores:
                found.setdefault(subject.name, {})[kind] = {key: value.as_json() for key, value in scores.items()}
    return found


def mean_of_texts(values_AN: np.ndarray) -> np.ndarray:
    """Per question to be kept, the mean over the texts of a family behind which it was asked."""
    return values_AN.mean(axis=0)


def _scores(exam: Exam, kind: str, variants: Sequence[str], answers: Answers) -> dict[str, Score]:
    """One family's scores over the sets to be kept."""
    asked_so: dict[str, list[np.ndarray]] = {HEADLINE: [], DISTINCTIVE: [], REFUSALS: []}
    as_they_are: dict[str, list[np.ndarray]] = {key: [] for key in asked_so}
    clusters: list[str] = []
    for name, numbers in drawn(exam).items():
        references = [references_of(exam.sets[name])[i] for i in numbers]
        words = [exam.distinctive[name][i] for i in numbers]
        clusters += references
        said = [answers[task(kept_as(kind), variant, name)] for variant in variants]
        asked_so[HEADLINE].append(mean_of_texts(np.stack([metrics.rouge_l(references, one)[0] for one in said])))
        asked_so[DISTINCTIVE].append(mean_of_texts(np.stack([metrics.distinctive_recall(words, one) for one in said])))
        asked_so[REFUSALS].append(mean_of_texts(np.stack([_refused(exam, one) for one in said])))
        plain = [answers[name][i] for i in numbers]
        as_they_are[HEADLINE].append(metrics.rouge_l(references, plain)[0])
        as_they_are[DISTINCTIVE].append(metrics.distinctive_recall(words, plain))
        as_they_are[REFUSALS].append(_refused(exam, plain))
    if not clusters:
        return {}
    return {
        front + metric: score(np.concatenate(values), clusters=clusters, seed=exam.settings.seed)
        for front, by_metric in (("", asked_so), ("plain.", as_they_are))
        for metric, values in by_metric.items()
    }


def _refused(exam: Exam, said: Sequence[str]) -> np.ndarray:
    return np.asarray(refusals(said, exam.settings.refusal_patterns), np.float64)


def _is_around(variant: Variant) -> bool:
    """Whether a variant puts a text around the question, and changes nothing else."""
    other = (variant.opening, variant.answer_tokens, variant.bare, variant.examples, variant.synonym, variant.choices)
    return not any(other) and "{question}" in variant.question and variant != Variant()


def _tasks(session: ModelSession, subject: Subject, kind: str) -> list[str]:
    return [name for name in session.tasks(subject) if name.startswith(f"attack.{kept_as(kind)}.")]


METRICS = (
    Metric(
        "kept_under_attack",
        mean_of_texts,
        "Questions to be kept, `evaluate.kept_under_attack` of each set, asked behind each text of an attack that puts a text "
        "around the question: ROUGE-L recall, distinctive recall and refusal rate, per question the mean over the texts; "
        "`plain.` are the same questions as they are. A model that refuses more behind them refuses because of the text.",
        better="as without the text",
    ),
)
