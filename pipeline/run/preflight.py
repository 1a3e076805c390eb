"""What any stage of a run would refuse, found before the first: rendered and checked as each stage will, without an engine.

`duet run` and `duet submit` stop at the first fault, `duet doctor` shows them all. Of models, config and tokenizer are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from duet.cache.errors import note
from duet.pipeline.config.schema import Config

Check = tuple[str, Callable[[], str]]  # what is checked; a call says what was found, or raises UserError


def preflight(config: Config) -> None:
    """Raise UserError for the first fault; note what no stage refuses and the numbers should be read with."""
    for _, check in checks_of(config):
        check()


def checks_of(config: Config) -> Iterator[Check]:
    """The checks, cheap ones first."""
    for name in config.teacher_settings():
        yield f"prompts of {name}", lambda name=name: _teacher(config, name)
    yield "students", lambda: _students(config)
    yield "evaluation", lambda: _evaluation(config)


def _teacher(config: Config, name: str) -> str:
    from duet.stages.models.directory import small_files
    from duet.stages.teacher.prepare import render_rows

    settings = config.teacher_settings()[name]
    folder = small_files(settings.model, "teacher.model")
    found = render_rows(folder, settings, config.prompt, config.data, config.topic, config.requests)
    longest = max(len(row.teacher_ids) for row in found.rows)
    day = f"; the chat template is told the day {config.prompt.date}" if _asks_the_clock(found.renderer) else ""
    return f"{len(found.rows)}, the longest of {longest} tokens{day}"


def _students(config: Config) -> str:
    from duet.pipeline.run.before import check_students_before

    for text in check_students_before(config, must_be_here=False):
        note(text)
    return ", ".join(student.name for student in config.students)


def _asks_the_clock(renderer: object) -> bool:
    chat = getattr(renderer, "chat", None)
    return chat is not None and chat.asks_the_clock


def _evaluation(config: Config) -> str:
    """Stage three's questions to base and teachers, given answers too where they are scored."""
    from duet.pipeline.run.exam import base_and_teachers, exam_of
    from duet.stages.evaluate.answers import session_of
    from duet.stages.exam import given_answers
    from duet.stages.exam.exam import by_directory
    from duet.stages.models.directory import small_files
    from duet.stages.questions.proof import cut_references

    exam = exam_of(config)
    subjects = base_and_teachers(config, small_files, lambda one, other: one.resolve() == other.resolve())
    tasks, remarks = 0, {}
    for model_dir, of_model in by_directory(subjects).items():
        session = session_of(model_dir, exam, of_model)
        tasks += sum(len(session.tasks(subject)) for subject in of_model)
        if exam.settings.likelihood:
            given_answers.check(of_model, exam)
        remarks |= dict.fromkeys(cut_references(session.tokenizer, exam.queries, exam.settings.max_new_tokens))
    for text in remarks:
        note(text)
    return f"{len(exam.sets)} sets of questions, {tasks} lists of prompts"
