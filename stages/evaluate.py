"""Stage three: what base, teacher and students answer, with and without attacks, and how that is scored.

`answer_all` asks one model everything and keeps the answers on disk, so that an interrupted evaluation goes on with the
next model; `results_of` turns answers into scores. Every score carries n and an interval, every text score two floors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from stages import attack_scores, attacks, battery, knowmem, metrics, outcome, reading, refusals, uncertainty
from stages.definitions import all_metrics, definitions, versions
from stages.exam import HEADLINE, Exam, QuerySet, Subject, Task, references_of, sets_as_tasks
from stages.examinee import Examinee
from stages.given import Given, finite, score_given
from stages.tofu_run import Reference, tofu_results
from stages.uncertainty import Score

NUM_SAMPLES = 40
DISTINCTIVE = "distinctive_recall"
DistinctiveWords = Mapping[str, Sequence[frozenset[str]]]  # of every reference, by set


def tasks_of(exam: Exam, subject: Subject) -> dict[str, Task]:
    """All that a subject is asked: each set under its name, each variant of an attack as `attack.<kind>.<variant>.<set>`."""
    tasks = sets_as_tasks(exam, subject)
    for kind in attacks.prompt_kinds(exam):
        for name in exam.attacked:
            for variant, prompts in attacks.prompts_of(exam, kind, name, subject.prefix_of(name)).items():
                tasks[attacks.task(kind, variant, name)] = Task(prompts)
    return tasks | knowmem.tasks_of(exam, subject)


def session_of(model_dir: Path, exam: Exam, subjects: Sequence[Subject]) -> Examinee:
    """One model directory with all that these subjects are asked."""
    return Examinee(model_dir, exam, [(subject, tasks_of(exam, subject)) for subject in subjects])


def answer_all(
    subjects: Sequence[Subject],
    exam: Exam,
    answers_dir: Path,
    on_progress: Callable[[str, int, int], None],
    on_engine: Callable[[str, str], None],
    should_stop: Callable[[], bool],
) -> dict[str, dict[str, Any]]:
    """Answers per subject and task, in query order, and what attacks on its weights found.

    Subjects of one model directory share an engine. Under CONTROL comes back what `exam.control` relearns.

    What is on disk from the same model, prefix, questions and settings is not asked again.
    """
    answers: dict[str, dict[str, Any]] = {subject.name: {} for subject in subjects}
    how = battery.How(answers_dir, on_progress, on_engine, should_stop)
    for model_dir in dict.fromkeys(subject.model_dir for subject in subjects):
        asked = [subject for subject in subjects if subject.model_dir == model_dir]
        examinee = session_of(model_dir, exam, asked)
        try:
            for subject in asked:
                answers[subject.name] |= battery.answered(examinee, subject, how)
        finally:
            examinee.close()
        for subject in asked:
            answers[subject.name] |= battery.weights_attacked(examinee, subject, how)
    return answers | battery.control_attacked(exam, how)


def costs(subjects: Sequence[Subject], exam: Exam) -> dict[str, battery.Cost]:
    """What the sets as they are and each attack will take, over all subjects; what is on disk already counts too."""
    made = attacks.chosen(exam)[0]
    total: dict[str, battery.Cost] = {}
    for model_dir in dict.fromkeys(subject.model_dir for subject in subjects):
        asked = [subject for subject in subjects if subject.model_dir == model_dir]
        examinee = session_of(model_dir, exam, asked)
        for subject in asked:
            for kind in (battery.NO_ATTACK, *made):
                total[kind] = total.get(kind, battery.Cost()) + battery.cost_of(examinee, subject, kind)
    if exam.control is not None and "relearn" in made:
        total["relearn"] += battery.cost_of(*battery.control_of(exam, exam.control), "relearn")
    return total


def refusals_of(exam: Exam, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What refusals are counted with, and the sets whose answers, given or not, are in no language that the patterns know.

    `answers` are by model and set, whatever else they hold.
    """
    texts = {
        name: references_of(query_set) + [text for of_model in answers.values() for text in of_model[name]]
        for name, query_set in exam.sets.items()
    }
    return {
        "languages": list(refusals.languages()),
        "patterns_sha256": sha256(refusals.PATTERNS_PATH.read_bytes()).hexdigest(),
        "own_patterns": list(exam.settings.refusal_patterns),
        "unknown_sets": refusals.unknown_sets(texts),
    }


def results_of(
    subjects: Sequence[Subject],
    exam: Exam,
    answers: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Mapping[str, Given]],
    reference: Reference | None = None,
    readings: Mapping[str, reading.Readings] | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """The parts of results.json that come from what models said and made of texts: scores, verdicts, comparisons, floors,
    samples, and what the numbers mean.

    `given` is empty where likelihoods are not asked for, and a model of which some are not finite has no scores of them: it is
    broken, its verdict says. `reference` is that of TOFU's forget quality; `readings` are those
    of `reading.py`, by subject. Every subject is compared with its own base, or all with the one that `against` names.
    """
    given, not_finite = finite(given)
    words = _distinctive_words(exam)
    models = {s.name: _scores(answers[s.name], given.get(s.name, {}), exam, words) for s in subjects}
    for name in models:
        models[name] |= knowmem.scores_of(answers[name], exam) | reading.scores_of((readings or {}).get(name, {}), exam)
    floors = _floors(exam, words) | knowmem.floors_of(exam) | reading.floors_of(exam)
    aggregates, tofu = tofu_results(exam, given, models, reference)
    return {
        "models": {
            name: {key: score.as_json() for key, score in scores.items()} | aggregates.get(name, {})
            for name, scores in models.items()
        },
        **({"tofu": tofu} if tofu else {}),
        "sets": {name: {"n": len(s.queries), "expect": s.expect} for name, s in exam.sets.items()},
        "floors": floors,
        "outcomes": outcome.outcomes_of(subjects, exam, answers, models, floors, not_finite),
        "performance_shift": _shifts(subjects, exam, models),
        "samples": _samples(subjects, exam, answers),
        "comparisons": _comparisons({s.name: against or s.base for s in subjects}, exam, models),
        "refusals": refusals_of(exam, {subject.name: answers[subject.name] for subject in subjects}),
        "definitions": definitions(all_metrics()),
        "versions": versions(all_metrics()),
        **attack_scores.results_of(subjects, exam, answers, models),
    }


def _scores(
    answers: Mapping[str, Any], given: Mapping[str, Given], exam: Exam, words: DistinctiveWords
) -> dict[str, Score]:
    """Scores of one model: `<set>.<metric>`, then those of the attacks."""
    seed, extra = exam.settings.seed, exam.settings.refusal_patterns
    scores: dict[str, Score] = {}
    for name, query_set in exam.sets.items():
        references = references_of(query_set)
        items = metrics.score_texts(references, answers[name], extra)
        items[DISTINCTIVE] = metrics.distinctive_recall(words[name], answers[name])
        if name in given:
            items |= score_given(given[name], query_set.expect)
        for metric, values in items.items():
            scores[f"{name}.{metric}"] = uncertainty.score(values, clusters=references, seed=seed)
    scores |= attack_scores.scores_of(answers, exam)
    return scores


def _questions_of(query_set: QuerySet) -> list[str]:
    return [query.question for query in query_set.queries]


def _distinctive_words(exam: Exam) -> DistinctiveWords:
    """Of every reference, by set; which words are common is counted over all sets."""
    questions = {name: _questions_of(query_set) for name, query_set in exam.sets.items()}
    return metrics.distinctive_words(questions, {name: references_of(s) for name, s in exam.sets.items()})


def _floors(exam: Exam, words: DistinctiveWords) -> dict[str, dict[str, float]]:
    found, refusal = {}, exam.settings.refusal
    for name, query_set in exam.sets.items():
        questions = _questions_of(query_set)
        found[f"{name}.{DISTINCTIVE}"] = {
            "refusal": float(metrics.distinctive_recall(words[name], [refusal] * len(questions)).mean()),
            "echo": float(metrics.distinctive_recall(words[name], questions).mean()),
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
    """Of every model, each score less that of the one it is compared with, on the same items; nothing of one and itself."""
    return {
        name: {
            key: {"against": other, **uncertainty.compare(found, models[other][key], exam.settings.seed)}
            for key, found in models[name].items()
            if key in models[other] and len(found.items)  # an AUC and a perplexity are no means over items
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
