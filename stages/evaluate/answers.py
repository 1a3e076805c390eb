"""Everything that the models of a run are asked, and their answers, kept on disk.

An interrupted evaluation goes on with the next model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from duet.cache.watch import Watch
from duet.stages.attacks import kept_questions, run
from duet.stages.attacks.chosen import chosen, prompt_kinds
from duet.stages.attacks.names import CONTROL, task
from duet.stages.attacks.parts import Cost
from duet.stages.attacks.prompts import prompts_of
from duet.stages.evaluate import muse
from duet.stages.exam.exam import Exam, Subject, Task, by_directory, references_of, sets_as_tasks
from duet.stages.exam.session import ModelSession
from duet.stages.metrics import refusals


def tasks_of(exam: Exam, subject: Subject) -> dict[str, Task]:
    """All that a subject is asked: each set under its name, each variant of an attack as `attack.<kind>.<variant>.<set>`."""
    tasks = sets_as_tasks(exam, subject)
    for kind in prompt_kinds(exam):
        for name in exam.attacked:
            for variant, prompts in prompts_of(exam, kind, name, subject.prefix_of(name)).items():
                tasks[task(kind, variant, name)] = Task(prompts)
    kept = {} if subject.name == CONTROL else kept_questions.tasks_of(exam, subject)
    return tasks | kept | muse.tasks_of(exam, subject)


def session_of(model_dir: Path, exam: Exam, subjects: Sequence[Subject]) -> ModelSession:
    """One model directory with all that these subjects are asked."""
    return ModelSession(model_dir, exam, [(subject, tasks_of(exam, subject)) for subject in subjects])


def models_asked(subjects: Sequence[Subject], exam: Exam) -> dict[Path, list[Subject]]:
    """The model directories that `answer_all` opens, one after the other, and whom it asks in each.

    Where attacks are made and there is a control, it is among them as CONTROL.
    """
    return by_directory(_everyone(subjects, exam))


def answer_all(
    subjects: Sequence[Subject], exam: Exam, answers_dir: Path, watch: Watch, only: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Answers per subject and task, in query order, and what attacks on its weights found.

    Of all `models_asked`, or of `only` one. Subjects of one model directory share an engine. What is on disk from the same
    model, prefix, questions and settings is not asked again.
    """
    answers: dict[str, dict[str, Any]] = {}
    for session, asked in _sessions(subjects, exam, only):
        answers |= {subject.name: {} for subject in asked}
        try:
            for subject in asked:
                answers[subject.name] |= run.answered(session, subject, answers_dir, watch)
        finally:
            session.close()
        for subject in asked:
            answers[subject.name] |= run.weights_attacked(session, subject, answers_dir, watch)
    return {subject.name: answers[subject.name] for subject in _everyone(subjects, exam) if subject.name in answers}


def costs_of(subjects: Sequence[Subject], exam: Exam) -> dict[str, Cost]:
    """What the sets as they are and each attack will take, over all subjects and the control.

    What is on disk already counts too.
    """
    found = [run.costs(session, subject) for session, asked in _sessions(subjects, exam) for subject in asked]
    total: dict[str, Cost] = {}
    for costs in found:
        for kind, cost in costs.items():
            total[kind] = total.get(kind, Cost()) + cost
    return total


def _everyone(subjects: Sequence[Subject], exam: Exam) -> list[Subject]:
    """The subjects and the model that never knew, where there is one and attacks are made."""
    return [*subjects, *([Subject(CONTROL, exam.control, "", "base")] if exam.control and chosen(exam)[0] else [])]


def _sessions(
    subjects: Sequence[Subject], exam: Exam, only: Path | None = None
) -> Iterator[tuple[ModelSession, list[Subject]]]:
    """Each model directory once, with the subjects that are asked of it."""
    for model_dir, asked in models_asked(subjects, exam).items():
        if only in (None, model_dir):
            yield session_of(model_dir, exam, asked), asked


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
