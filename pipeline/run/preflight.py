"""What any stage of a run would refuse, found before the first: rendered and checked as each stage will, without an engine.

`duet run` and `duet submit` stop at the first fault, `duet doctor` shows them all; stage one makes the checks of models and
students before it asks the teacher. Configs and tokenizers of models are read, never weights.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from duet.cache.errors import UserError, note
from duet.cache.record import MAIN_SUBSETS, subset_counts
from duet.pipeline.config.chain import as_if_first, steps_of
from duet.pipeline.config.schema import Config
from duet.pipeline.run.named_models import is_here, start_folder, start_model
from duet.pipeline.run.stores import questions_of
from duet.stages.settings.data import DocumentSettings
from duet.stages.settings.student import teacher_weights
from duet.stages.settings.teacher import ids_provenance

if TYPE_CHECKING:
    from duet.stages.questions.prompts import Renderer
    from duet.stages.student.checks import Expected
    from duet.stages.teacher.plan import RenderedQuery

Check = tuple[str, Callable[[], str]]  # what is checked; a call says what was found, or raises UserError


def preflight(config: Config, all_here: bool = False) -> None:
    """Raise UserError for the first fault; note what no stage refuses but a reader of the numbers should know.

    `all_here`: all stages follow on this machine, so that every model must be on it.
    """
    if all_here:
        check_models(config, all_here=True)
    for _, check in checks_of(config):
        check()
    for student in config.students if all_here else ():
        start_folder(config, student)


def checks_of(config: Config) -> Iterator[Check]:
    """The checks, cheap ones first."""
    for name in config.teacher_settings():
        yield f"prompts of {name}", lambda name=name: _teacher(config, name)
    yield "students", lambda: _students(config)
    yield "evaluation", lambda: _evaluation(config)
    if config.chain:
        yield "chain", lambda: _chain(config)


def check_models(config: Config, all_here: bool = False) -> None:
    """Refuse quantised models that cannot run here, and those that no student can start from.

    Looks at local directories only: other models may be on the machines of other stages. `all_here`: stage three follows
    here, which loads all models through transformers.
    """
    from duet.stages.engines.choose import engine_order
    from duet.stages.models.directory import check_quantisation, check_trainable_start, resolve_model

    trusted = config.teacher.trust_remote_code
    for settings in config.teacher_settings().values():
        if is_here(settings.model) and (all_here or engine_order(settings.usable_engine) == ["transformers"]):
            folder = resolve_model(settings.model, "teacher.model")
            check_quantisation(folder, f"teacher.model: {settings.model}", trusted)
    for student in config.students:
        model, where = start_model(config, student), f"students.{student.name}.model"
        if is_here(model):
            check_trainable_start(resolve_model(model, where), where)
    for name, model in config.evaluate.models.items():
        if all_here and is_here(model):
            where = f"evaluate.models.{name}"
            check_quantisation(resolve_model(model, where), f"{where}: {model}", trusted)


def check_students(config: Config, rows: Sequence[RenderedQuery] | None = None, must_be_here: bool = True) -> list[str]:
    """Refuse what stage two would refuse of the config's students, as far as it is known before stage one.

    `rows` are a teacher's, to be checked too where they are known. Returns lines worth saying: what an export will leave
    out, and without `must_be_here` which student's model is not on this machine and so was not checked.
    """
    from duet.stages.models.directory import small_files
    from duet.stages.models.tokenizers import load_tokenizer
    from duet.stages.questions.contexts import Contexts
    from duet.stages.questions.prompts import Renderer
    from duet.stages.questions.requests import asked_about
    from duet.stages.student.checks import Start, check_settings, loss_by_store

    teachers, lines = config.teacher_settings(), []
    trust = config.teacher.trust_remote_code
    tokenizer = load_tokenizer(small_files(next(iter(teachers.values())).model, "teacher.model"), trust)
    stores = _expected_stores(config, rows)
    for student in config.students:
        if config.run.student(student.name).is_done:
            continue
        settings = config.train_settings(student)
        used = teacher_weights(settings, list(teachers))
        combine = (settings.combine or "mix") if len(used) > 1 else None
        expected = [stores[name] for name in used]
        by_store = loss_by_store(expected, student.start_noise, combine) if settings.loss == "auto" else None
        loss = by_store[0] if by_store else settings.loss
        check_settings(settings, loss, expected, combine, None)
        try:
            folder = start_folder(config, student)
        except UserError as error:
            if must_be_here:
                raise
            lines.append(f"student {student.name}: not checked before stage one: {error.what}")
            continue
        start = Start.of(folder, student.name, settings, tokenizer, config.prompt, trust)
        for row in rows or ():
            follow = 0 if row.given_ids else config.teacher.max_positions
            start.check_row(row.row_id, row.student_ids, row.given_ids or (), follow)
        if settings.contexts != "none":
            contexts = Contexts(
                Renderer(tokenizer, config.prompt), asked_about(config.data, config.topic, config.requests)
            )
            start.check_contexts(contexts, settings, config.teacher.max_positions)
        if start.left_out:
            lines.append(left_out_line(student.name, start.left_out))
    return lines


def _expected_stores(config: Config, rows: Sequence[RenderedQuery] | None) -> dict[str, Expected]:
    """What is known of the stores before stage one, by teacher."""
    from duet.stages.student.checks import Expected

    known = [*MAIN_SUBSETS, *(["broad"] if config.data.broad else [])] if rows is None else [r.subset for r in rows]
    subsets, longest = subset_counts(known), max((len(row.given_ids or ()) for row in rows or ()), default=1)
    if rows is None and any(isinstance(source, DocumentSettings) for source in config.data.broad.values()):
        longest = 2  # at least, as a document has
    return {
        name: Expected(
            top_k=one.top_k,
            logsumexp=one.logsumexp,
            rows=1,
            positions=max(one.max_positions, longest),
            subsets=subsets,
            provenance={"engine": one.engine, "prompt": config.prompt, "responses": one.responses}
            | ids_provenance(one),
        )
        for name, one in config.teacher_settings().items()
    }


def left_out_line(name: str, flags: Sequence[str]) -> str:
    return (
        f"student {name}: generation_config.json is written without {', '.join(flags)}: generation does not read "
        "such a flag here, and transformers does not save it"
    )


def _teacher(config: Config, name: str) -> str:
    from duet.stages.models.directory import small_files
    from duet.stages.teacher.prepare import render_rows

    settings = config.teacher_settings()[name]
    found = render_rows(small_files(settings.model, "teacher.model"), settings, questions_of(config))
    longest = max(len(row.teacher_ids) for row in found.rows)
    day = f"; the chat template is told the day {config.prompt.date}" if _asks_the_clock(found.renderer) else ""
    return f"{len(found.rows)}, the longest of {longest} tokens{day}"


def _students(config: Config) -> str:
    for text in check_students(config, must_be_here=False):
        note(text)
    return ", ".join(student.name for student in config.students)


def _chain(config: Config) -> str:
    """Each later request as if it were the first: what can be checked before those before it are forgotten."""
    steps = [as_if_first(config, step) for step in steps_of(config)]
    for step in steps:
        for _, check in checks_of(step):
            check()
    return ", ".join(step.name for step in steps)


def _asks_the_clock(renderer: Renderer) -> bool:
    return renderer.chat is not None and renderer.chat.asks_the_clock


def _evaluation(config: Config) -> str:
    """Stage three's questions to base and teachers, given answers too where they are scored, and the files that it names."""
    from duet.pipeline.run.exam import base_and_teachers, broad_questions, check_not_taught, exam_of, trained_on
    from duet.stages.evaluate.answers import session_of
    from duet.stages.evaluate.tofu import check_reference, read_reference
    from duet.stages.exam import given_answers, given_texts
    from duet.stages.exam.exam import by_directory
    from duet.stages.models.directory import small_files
    from duet.stages.questions.proof import cut_references

    exam = exam_of(config)
    subjects = base_and_teachers(config, small_files, lambda one, other: one.resolve() == other.resolve())
    students = [f"student:{student.name}" for student in config.students]
    names = [*(subject.name for subject in subjects), *students, *(f"model:{name}" for name in config.evaluate.models)]
    check_reference(read_reference(config.evaluate.tofu), exam, names)
    given_texts.texts_of(exam)
    given_texts.retrained_auc(exam)
    broad = broad_questions(config)
    check_not_taught(config, exam.sets, broad)
    tasks, remarks = 0, dict.fromkeys(trained_on(config, exam.sets, broad))
    for model_dir, of_model in by_directory(subjects).items():
        session = session_of(model_dir, exam, of_model)
        tasks += sum(len(session.tasks(subject)) for subject in of_model)
        if exam.settings.likelihood:
            given_answers.check(of_model, exam)
        remarks |= dict.fromkeys(cut_references(session.tokenizer, exam.queries, exam.settings.max_new_tokens))
    for text in remarks:
        note(text)
    return f"{len(exam.sets)} sets of questions, {tasks} lists of prompts"
