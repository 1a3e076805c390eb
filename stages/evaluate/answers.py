"""Everything that the models of a run are asked, and their answers, kept on disk.

An interrupted evaluation goes on with the next model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from duet.cache.watch import Watch
from duet.stages.attacks import prompts as attacks
from duet.stages.attacks import run as battery
from duet.stages.evaluate import muse as knowmem
from duet.stages.exam.exam import Exam, Subject, Task, by_directory, references_of, sets_as_tasks
from duet.stages.exam.session import ModelSession
from duet.stages.metrics import refusals


def tasks_of(exam: Exam, subject: Subject) -> dict[str, Task]:
    """All that a subject is asked: each set under its name, each variant of an attack as `attack.<kind>.<variant>.<set>`."""
    tasks = sets_as_tasks(exam, subject)
    for kind in attacks.prompt_kinds(exam):
        for name in exam.attacked:
            for variant, prompts in attacks.prompts_of(exam, kind, name, subject.prefix_of(name)).items():
                tasks[attacks.task(kind, variant, name)] = Task(prompts)
    return tasks | knowmem.tasks_of(exam, subject)


def session_of(model_dir: Path, exam: Exam, subjects: Sequence[Subject]) -> ModelSession:
    """One model directory with all that these subjects are asked."""
    return ModelSession(model_dir, exam, [(subject, tasks_of(exam, subject)) for subject in subjects])


def answer_all(
    subjects: Sequence[Subject],
    exam: Exam,
    answers_dir: Path,
    watch: Watch,
) -> dict[str, dict[str, Any]]:
    """Answers per subject and task, in query order, and what attacks on its weights found.

    Subjects of one model directory share an engine. Under CONTROL comes back what `exam.control` relearns.

    What is on disk from the same model, prefix, questions and settings is not asked again.
    """
    answers: dict[str, dict[str, Any]] = {subject.name: {} for subject in subjects}
    how = battery.How(answers_dir, watch)
    for model_dir, asked in by_directory(subjects).items():
        session = session_of(model_dir, exam, asked)
        try:
            for subject in asked:
                answers[subject.name] |= battery.answered(session, subject, how)
        finally:
            session.close()
        for subject in asked:
            answers[subject.name] |= battery.weights_attacked(session, subject, how)
    return answers | battery.control_attacked(exam, how)


def costs_of(subjects: Sequence[Subject], exam: Exam) -> dict[str, battery.Cost]:
    """What the sets as they are and each attack will take, over all subjects; what is on disk already counts too."""
    made = attacks.chosen(exam)[0]
    total: dict[str, battery.Cost] = {}
    for model_dir, asked in by_directory(subjects).items():
        session = session_of(model_dir, exam, asked)
        for subject in asked:
            for kind in (battery.NO_ATTACK, *made):
                total[kind] = total.get(kind, battery.Cost()) + battery.cost_of(session, subject, kind)
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
