"""`duet compare`: DUET against other unlearning methods on the same data and budget; compare.json, compare.html and a table.

Works in `<run>/compare/` and writes the two files into the run's directory. Runs stage one where the run has no teacher logits
yet; the students that it trains are its own, one for each learning rate of DUET's grid.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet.cache.errors import IncompleteStore, Interrupted, UserError
from duet.cache.files import publish_json, publishing, read_json
from duet.cache.record import MAIN_SUBSETS
from duet.cache.watch import Watch
from duet.pipeline.commands.run import run_stage
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.pages.comparison import compare_table, render, sentences
from duet.pipeline.run.children import THIS_PROGRAM, environments_of_children, run_jobs, visible_gpus
from duet.pipeline.run.directory import StopSignal, claim_run_dir, environment, set_aside
from duet.pipeline.run.exam import exam_of, subjects_of
from duet.pipeline.run.named_models import model_name, start_model
from duet.pipeline.run.provenance import without_places
from duet.pipeline.run.stores import store_summary, stores_of_run
from duet.pipeline.run.terminal import progress_bar, say, say_engine, show
from duet.stages.settings.compare import OracleSettings
from duet.stages.settings.student import StudentSettings

if TYPE_CHECKING:
    from duet.cache.reader import Store
    from duet.pipeline.run.terminal import ProgressBar
    from duet.stages.compare.grid import Comparison
    from duet.stages.compare.train import TrainingRows
    from duet.stages.exam.exam import Subject

REFERENCES, ORACLE = "references", "oracle"  # parts that are not a method
CPU_JOBS = 2  # parts at a time without a GPU, where --jobs is not given: each holds up to two models


def compare(request: Selection, num_jobs: int | None = None, part: str | None = None) -> int:
    """Train, choose, ask and report, `num_jobs` parts at a time; returns an exit code.

    A part is one method, the oracle, or base and teacher together. With `part`, in a child process, that one only: the parent
    finds its results on disk.
    """
    from duet.stages.models.directory import resolve_model

    config = request.load()
    stop = StopSignal()
    student = _student(config)
    if isinstance(config.compare.oracle, str):
        resolve_model(config.compare.oracle, "compare.oracle")  # a wrong name should not be found after hours
    if part is None and (code := _stage_one(config, request, stop)):
        return code
    run, started = config.run, time.perf_counter()
    claim_run_dir(config)
    plan = _plan(config, student)
    parts = _parts(config)
    if part is None and (code := _in_children(request, config, parts, num_jobs, plan, stop)):
        return code
    with progress_bar("") as bar:
        watch = _watch(bar, stop)
        found = [_part(config, plan, name, watch) for name in ([part] if part else parts)]
        if part:
            return 0
        results = _results(config, plan, found, watch)
    if run.compare_json.is_file() and read_json(run.compare_json)["compare"] != results["compare"]:
        set_aside("comparison", run.compare_json, run.compare_page)
    publish_json(run.compare_json, results)
    with publishing(run.compare_page) as temporary:
        temporary.write_text(render(results), encoding="utf-8")
    show(compare_table(results))
    for sentence in sentences(results):
        say(sentence)
    say(f"this call took {time.perf_counter() - started:.0f} s; of each method the best model is kept, no other")
    say(f"comparison: {run.compare_json}")
    say(f"report: {run.compare_page}")
    return 0


@dataclass(frozen=True)
class Part:
    """The result of one part: the models to be asked, and facts on how they were made."""

    subjects: list[Subject]
    method: tuple[str, dict[str, Any]] | None = None  # name, and its entry in compare.json
    oracle: dict[str, Any] | None = None


def _parts(config: Config) -> list[str]:
    """The names of the parts in the order of the table."""
    return [REFERENCES, "duet", *config.compare.methods, *([ORACLE] if config.compare.oracle is not None else [])]


def _in_children(
    request: Selection, config: Config, parts: list[str], num_jobs: int | None, plan: Comparison, stop: StopSignal
) -> int:
    """Every part in a process of its own, several at a time; the first exit code that is not 0. One at a time needs none."""
    from duet.stages.compare.grid import ANSWERS_TO_CHOOSE
    from duet.stages.evaluate.answers import answer_all

    devices = visible_gpus(plan.reported.device)
    num_jobs = min(num_jobs or len(devices) or CPU_JOBS, len(parts))
    if num_jobs == 1:
        return 0
    with progress_bar("") as bar:  # all of them need it
        answer_all(plan.references[:1], plan.validation, plan.folder / ANSWERS_TO_CHOOSE, _watch(bar, stop))
    commands = {
        name: [*THIS_PROGRAM, "compare", *request.arguments(students=False), "--part", name] for name in reversed(parts)
    }
    return run_jobs(commands, environments_of_children(num_jobs, devices, os.environ), stop, lambda running: None)


def _watch(bar: ProgressBar, stop: StopSignal) -> Watch:
    return Watch(bar.update, functools.cache(say_engine), stop)


def _student(config: Config) -> StudentSettings:
    """The first student that starts from the teacher's own model: DUET's trials are trained with its settings."""
    if config.bare_teachers:
        raise UserError(
            "the teacher has no prefix: other methods would start from a model that is silent already",
            "compare with the config of the run that has the prefix",
        )
    for student in config.students:
        if start_model(config, student) == config.teacher.model and not student.start_noise:
            return student
    raise UserError(
        "no student starts from the teacher's own weights, and methods are compared on one start",
        "add a student without a model and start_noise of its own: students: [{name: base}]",
    )


def _stage_one(config: Config, request: Selection, stop: StopSignal) -> int:
    """Run stage one, in a process of its own, where the run has no teacher logits; its exit code."""
    try:
        stores_of_run(config)
        return 0
    except IncompleteStore:
        if stop():
            raise Interrupted("before stage one") from None
    return run_stage("teacher-logits", request, stop)


def _part(config: Config, plan: Comparison, name: str, watch: Watch) -> Part:
    """Bring one part to the end: train and choose its models, and ask them the questions that are reported."""
    from duet.stages.compare.grid import best_of
    from duet.stages.compare.methods import METHODS
    from duet.stages.evaluate.answers import answer_all
    from duet.stages.exam.exam import Subject

    if name == REFERENCES:
        part = Part(list(plan.references))
    elif name == ORACLE:
        model_dir, facts = _oracle(config, plan, watch)
        part = Part([Subject(ORACLE, model_dir, "", "base")], oracle=facts)
    else:
        best, grid = best_of(plan, name, watch, say)
        title, paper = (METHODS[name].title, METHODS[name].paper) if name in METHODS else ("DUET", "2601.21283")
        facts = {"title": title, "paper": paper, "setting": best.setting, "grid": grid}
        part = Part([Subject(name, best.folder / "model", "", "base")], method=(name, facts))
    answer_all(part.subjects, plan.reported, config.run.compare_answers, watch)
    return part


def _results(config: Config, plan: Comparison, parts: list[Part], watch: Watch) -> dict[str, Any]:
    """The content of compare.json."""
    from duet.stages.compare.grid import results_of
    from duet.stages.evaluate.answers import answer_all

    subjects = [subject for part in parts for subject in part.subjects]
    answers = answer_all(subjects, plan.reported, config.run.compare_answers, watch)  # all of them are there
    return {
        "format_version": 1,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "compare": without_places(config.compare.model_dump(mode="json")),
        "evaluate": without_places(config.evaluate.model_dump(mode="json")),
        "train": plan.train.model_dump(mode="json"),
        "start": plan.start_name,
        "methods": dict(part.method for part in parts if part.method),
        "oracle": next((part.oracle for part in parts if part.oracle), None),
        "split": {
            what: {name: len(s.queries) for name, s in exam.sets.items()}
            for what, exam in (("validation", plan.validation), ("reported", plan.reported))
        },
        **results_of(plan.reported, subjects, answers),
        "teacher_stores": {name: store_summary(location) for name, location in stores_of_run(config).items()},
        "environment": environment(),
    }


def _plan(config: Config, student: StudentSettings) -> Comparison:
    """Everything that is the same for all methods."""
    from duet.stages.compare.grid import Comparison
    from duet.stages.exam.exam import QuerySet, part_of, split_by_answer
    from duet.stages.models.directory import resolve_model
    from duet.stages.student.train import open_stores

    settings = config.compare
    exam = exam_of(config)
    validation, reported = split_by_answer(
        exam, settings.validation_share, settings.seed, "duet compare",
        "give the set more questions, or move compare.validation_share towards 0.5",
    )  # fmt: skip
    plain = part_of(exam, validation)  # as it is: no attacks, and no shots in front
    plain = replace(
        plain,
        sets={name: QuerySet(s.queries, s.expect) for name, s in plain.judged.items()},
        settings=plain.settings.model_copy(update={"attacks": (), "membership": None}),
    )
    stores, tokenizer = open_stores(stores_of_run(config), config.store.verify)
    model_dir = resolve_model(config.teacher.model, "teacher.model")
    return Comparison(
        settings=settings,
        train=config.train_settings(student),
        model_dir=model_dir,
        start_name=model_name(config.teacher.model),
        folder=config.run.compare,
        training_rows=_training_rows(config, model_dir, next(iter(stores.values()))),
        stores=stores,
        tokenizer=tokenizer,
        validation=plain,
        reported=part_of(exam, reported),
        references=subjects_of(config, ()),
        trust_remote_code=config.teacher.trust_remote_code,
    )


def _training_rows(config: Config, model_dir: Path, store: Store) -> TrainingRows:
    """The store's queries, in its order, with the data's answers and the refusals, as token ids."""
    from duet.stages.compare.train import TrainingRows, row_of
    from duet.stages.questions.prompts import open_renderer
    from duet.stages.questions.requests import queries_of

    by_request = queries_of(config.data, config.requests, need_answers=True)
    queries = {s: [query for found in by_request.values() for query in found[s]] for s in MAIN_SUBSETS}
    counts = {subset: len(found) for subset, found in queries.items()}
    if counts != {subset: store.manifest.subsets[subset] for subset in MAIN_SUBSETS}:
        raise UserError(
            f"the store has {store.manifest.subsets} rows, the data now has {counts}",
            "run `duet teacher-logits` with this config",
        )
    renderer = open_renderer(model_dir, config.prompt, config.teacher.trust_remote_code)
    rows = {s: [row_of(renderer, query) for query in found] for s, found in queries.items()}
    refusals = config.compare.refusals or (config.evaluate.refusal,)
    refused = [[row_of(renderer, query, text) for text in refusals] for query in queries["forget"]]
    return TrainingRows(**rows, refusals=refused)


def _oracle(config: Config, plan: Comparison, watch: Watch) -> tuple[Path, dict[str, Any]]:
    """The oracle's model directory and its entry in compare.json."""
    from duet.stages.compare.oracle import train_oracle
    from duet.stages.models.directory import resolve_model

    oracle = config.compare.oracle
    if not isinstance(oracle, OracleSettings):
        return resolve_model(str(oracle), "compare.oracle"), {"model": model_name(str(oracle))}
    model_dir, done = train_oracle(plan, oracle, watch, say)
    return model_dir, {key: done[key] for key in ("steps", "train_s", "rows")}
