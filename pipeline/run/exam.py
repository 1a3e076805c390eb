"""What a config has every model asked: its subjects, its query sets, and the exam that they make.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from duet.cache.errors import UserError
from duet.cache.record import MAIN_SUBSETS
from duet.pipeline.config.schema import Config
from duet.pipeline.run.named_models import start_model
from duet.stages.settings.attacks import ALL
from duet.stages.settings.student import StudentSettings
from duet.stages.settings.teacher import Model, TeacherSettings
from duet.stages.student.summary import seen_by

if TYPE_CHECKING:
    from duet.stages.exam.exam import Exam, QuerySet, Subject


def base_and_teachers(
    config: Config, find: Callable[[Model, str], Path], same: Callable[[Path, Path], bool]
) -> list[Subject]:
    """Base and teachers, each teacher after its own base where that is another model; base is that of a teacher without prefix.

    `find` is `resolve_model`, or `small_files` where no weights are needed; `same` says whether two directories hold one model.
    """
    from duet.stages.exam.exam import Subject

    base_dir = find(config.base_model, "evaluate.base" if config.evaluate.base else "teacher.model")
    subjects = [Subject("base", base_dir, "", "base")]
    for name, settings in config.teacher_settings().items():
        model_dir = find(settings.model, "teacher.model")
        prefix, set_prefixes = _prefixes(config, settings)
        called = f"teacher:{name}" if len(config.teachers) > 1 else "teacher"
        base = "base" if name in config.silent_teachers else _base_of(subjects, name, model_dir, same)
        subjects.append(Subject(called, model_dir, prefix, base, set_prefixes))
    return _with_what_they_saw(subjects)


def _with_what_they_saw(subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects, each with the attacks of whose kind it saw texts in training, in this run or another."""
    return [replace(subject, trained_on=seen_by(subject.model_dir)) for subject in subjects]


def _base_of(subjects: list[Subject], name: str, model_dir: Path, same: Callable[[Path, Path], bool]) -> str:
    """The base of a model that started as this one: the first of the subjects, or another that is put behind them."""
    from duet.stages.exam.exam import Subject

    if same(model_dir, subjects[0].model_dir):
        return "base"
    subjects.append(Subject(f"base:{name}", model_dir, "", f"base:{name}"))
    return f"base:{name}"


def subjects_of(config: Config, students: Sequence[StudentSettings]) -> list[Subject]:
    """Base, teachers, then students, each after its own base where that is another model; then models that were made elsewhere,
    measured against the run's base."""
    from duet.stages.exam.exam import Subject
    from duet.stages.models.directory import resolve_model
    from duet.stages.models.identity import same_model

    same = functools.partial(same_model, trust_remote_code=config.teacher.trust_remote_code)
    subjects = base_and_teachers(config, resolve_model, same)
    silent = [resolve_model(teacher.model, "teacher.model") for teacher in config.silent_teachers.values()]
    for student in students:
        files = config.run.student(student.name)
        if not files.is_done:
            raise UserError(
                f"student {student.name!r} is not trained: {files.path}", "run `duet distill` with this config"
            )
        start_dir = resolve_model(start_model(config, student), f"students.{student.name}.model")
        from_silent = any(same(start_dir, silent_dir) for silent_dir in silent)  # it began where its silent teacher is
        base = "base" if from_silent else _base_of(subjects, student.name, start_dir, same)
        subjects.append(Subject(f"student:{student.name}", files.model, "", base))
    for name, model in config.evaluate.models.items():
        subjects.append(Subject(f"model:{name}", resolve_model(model, f"evaluate.models.{name}"), "", "base"))
    return _with_what_they_saw(subjects)


def exam_of(config: Config) -> Exam:
    """The questions that every model of the run is asked."""
    from duet.stages.exam.exam import Exam
    from duet.stages.models.directory import resolve_model
    from duet.stages.models.loading import pick_device

    check_texts_apart(config, config.students)
    control = config.evaluate.control_model
    return Exam(
        sets=query_sets(config),
        topic=config.topic,
        prompt=config.prompt,
        settings=config.evaluate,
        device=pick_device(config.device),
        trust_remote_code=config.teacher.trust_remote_code,
        further_topics={f"{request.name}.forget": request.topic for request in config.requests},
        control=resolve_model(control, "evaluate.control_model") if control else None,
    )


def check_texts_apart(config: Config, students: Sequence[StudentSettings]) -> None:
    """Refuse attacks with texts that one of these students, or another model of the evaluation, is trained on: it would pass
    only what it has seen.
    """
    from duet.stages.attacks.texts import texts
    from duet.stages.questions.contexts import trained_text_in

    wide = [f"student {student.name!r}" for student in students if config.train_settings(student).contexts != "none"]
    here = {name: Path(model) for name, model in config.evaluate.models.items() if isinstance(model, str)}
    wide += [f"model {name!r}" for name, folder in here.items() if seen_by(folder)]
    wanted = config.evaluate.attacks
    for kind, variants in texts(config.evaluate.attack_texts)[0].items() if wide else ():
        for name, variant in variants.items() if wanted == ALL or kind in wanted else ():
            if known := trained_text_in(variant.in_front) or trained_text_in(variant.question):
                raise UserError(
                    f"attack {kind}, {name}: {wide[0]} is trained on its text: {known!r}",
                    "write another one, or leave it out of evaluate.attack_texts",
                )


def _prefixes(config: Config, settings: TeacherSettings) -> tuple[str, dict[str, str]]:
    """A teacher's prefix, and those of the further requests' sets."""
    from duet.stages.questions.requests import MAIN, prefixes_of

    prefixes = prefixes_of(settings.prefix, config.topic, config.requests)
    main = prefixes.pop(MAIN)
    return main, {f"{request}.{subset}": prefix for request, prefix in prefixes.items() for subset in MAIN_SUBSETS}


def query_sets(config: Config) -> dict[str, QuerySet]:
    """The training sets of all requests and those of the evaluation, with answers."""
    from duet.stages.evaluate.muse import load_shots
    from duet.stages.exam.exam import QuerySet
    from duet.stages.questions.queries import load_queries
    from duet.stages.questions.requests import MAIN, queries_of

    expect = {"forget": "forgotten", "retain": "kept"}
    sets = {
        subset if request == MAIN else f"{request}.{subset}": QuerySet(queries, expect[subset])
        for request, by_subset in queries_of(config.data, config.requests, need_answers=True).items()
        for subset, queries in by_subset.items()
        if queries
    }
    for name, settings in config.evaluate.sets.items():
        where = f"evaluate.sets.{name}"
        sets[name] = QuerySet(
            load_queries(settings, where, need_answers=True),
            settings.expect,
            load_shots(settings, where),
            settings.translates,
            settings.distance,
        )
    for name, query_set in sets.items():
        if query_set.translates is not None and query_set.translates not in sets:
            raise UserError(
                f"evaluate.sets.{name}.translates: no set {query_set.translates!r}", f"the sets are {', '.join(sets)}"
            )
    _check_apart(sets)
    order = sorted(sets, key=lambda name: sets[name].expect != "forgotten")
    return {name: sets[name] for name in order}


def broad_questions(config: Config) -> set[str]:
    """What the broad rows ask, read from their files, which may be large."""
    from duet.stages.questions.requests import broad_of

    return {query.asked for queries in broad_of(config.data).values() for query in queries}


def trained_on(config: Config, sets: Mapping[str, QuerySet], broad: set[str]) -> list[str]:
    """Of each evaluation set with questions that students are trained on, sentences that say so."""
    own = config.evaluate.sets
    trained = {name: {query.asked for query in of.queries} for name, of in sets.items() if name not in own}
    trained["data.broad"] = broad
    return [
        f"{count} of {len(sets[name].queries)} questions of {name} are in {place}: students are trained on them"
        for name in own
        for place, known in trained.items()
        if (count := sum(query.asked in known for query in sets[name].queries))
    ]


def check_not_taught(config: Config, sets: Mapping[str, QuerySet], broad: set[str]) -> None:
    """Refuse broad questions that are to be forgotten and are answered by a teacher without its prefix: it would teach them."""
    plain = [name for name, s in config.teacher_settings().items() if s.prefix and s.prefix_on == "forget"]
    for name, of in sets.items():
        both = [query.asked for query in of.queries if query.asked in broad]
        if both and of.expect == "forgotten" and plain:
            raise UserError(
                f"{len(both)} questions of the set {name!r} are to be forgotten, and data.broad has them answered without the "
                f"prefix: {both[0]!r}",
                "take them out of data.broad, or set teacher.prefix_on: all",
            )


def _check_apart(sets: Mapping[str, QuerySet]) -> None:
    """Refuse a question that is to be forgotten in one set and to be kept in another."""
    forgotten = {q.asked: name for name, of in sets.items() if of.expect == "forgotten" for q in of.queries}
    for name, of in sets.items():
        both = [q.asked for q in of.queries if q.asked in forgotten] if of.expect == "kept" else []
        if both:
            raise UserError(
                f"{len(both)} questions of the set {name!r} are to be kept, and those of {forgotten[both[0]]!r} are to be "
                f"forgotten: {both[0]!r}",
                "take them out of one of the two, or leave the set out of evaluate.sets",
            )
