"""`duet compare`: DUET against other unlearning methods on the same data and budget; compare.json, compare.html and a table.

Lies in `<run>/compare/`, the two files in the run's directory. Runs stage one where the run has no teacher logits yet; the
students that it trains are its own, one for each learning rate of DUET's grid.
"""

from __future__ import annotations

import functools
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache.errors import EXIT_INTERRUPTED, Interrupted, UserError
from cache.files import publish_json, publishing, read_json
from cache.record import SUBSETS
from pipeline.capture import stores_of_run
from pipeline.commands import exam_of, model_name, set_aside, start_model, store_summary, subjects_of
from pipeline.compare_page import compare_table, render, sentences
from pipeline.config import Config
from pipeline.jobs import THIS_PROGRAM
from pipeline.run import StopSignal, claim_run_dir, environment
from pipeline.sweep import Request
from pipeline.terminal import out, progress_bar, say, say_engine
from stages.settings import StudentSettings

COMPARE_NAME, PAGE_NAME, COMPARE_DIR = "compare.json", "compare.html", "compare"


def compare(request: Request) -> int:
    """Train, choose, ask and report; returns an exit code."""
    config = request.load()
    stop = StopSignal()
    student = _student(config)
    if code := _stage_one(config, request, stop):
        return code
    run_dir, started = claim_run_dir(config), (time.perf_counter(), time.process_time())
    with progress_bar("") as bar:
        results = _results(config, student, run_dir, bar, stop)
    if (run_dir / COMPARE_NAME).is_file() and read_json(run_dir / COMPARE_NAME)["compare"] != results["compare"]:
        set_aside(run_dir, (COMPARE_NAME, PAGE_NAME), "comparison")
    publish_json(run_dir / COMPARE_NAME, results)
    with publishing(run_dir / PAGE_NAME) as temporary:
        temporary.write_text(render(results), encoding="utf-8")
    out.print(compare_table(results))
    for sentence in sentences(results):
        say(sentence)
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    say(
        f"this call took {wall:.0f} s, {cpu:.0f} s of them a processor's; of each method the best model is kept, no other"
    )
    say(f"comparison: {run_dir / COMPARE_NAME}")
    say(f"report: {run_dir / PAGE_NAME}")
    return 0


def _student(config: Config) -> StudentSettings:
    """The first student that starts from the teacher's own model: what DUET's candidates are made of."""
    for student in config.students:
        if start_model(config, student) == config.teacher.model:
            return student
    raise UserError(
        "no student starts from the teacher's model, and methods are compared on one model",
        "add a student without a model of its own: students: [{name: base}]",
    )


def _stage_one(config: Config, request: Request, stop: StopSignal) -> int:
    """Run stage one, in a process of its own, where the run has no teacher logits; its exit code."""
    try:
        stores_of_run(config)
        return 0
    except UserError:
        if stop():
            raise Interrupted("before stage one") from None
    child = subprocess.Popen([*THIS_PROGRAM, "teacher-logits", *request.arguments(students=False)])
    stop.forward_to(child)
    code = child.wait()
    return code if code >= 0 else EXIT_INTERRUPTED


def _results(config: Config, student: StudentSettings, run_dir: Path, bar: Any, stop: StopSignal) -> dict[str, Any]:
    """All that compare.json holds."""
    from stages import compare as stage
    from stages.baseline_methods import METHODS
    from stages.exam import Subject

    report = stage.Report(bar.update, bar.update, functools.cache(say_engine), say, stop)
    plan = _plan(config, student, run_dir)
    subjects, methods = list(plan.references), {}
    for name in (stage.DUET, *config.compare.methods):
        best, grid = stage.best_of(plan, name, report)
        title, paper = (METHODS[name].title, METHODS[name].paper) if name in METHODS else ("DUET", "2601.21283")
        methods[name] = {"title": title, "paper": paper, "setting": best.setting, "grid": grid}
        subjects.append(Subject(name, best.folder / "model", "", "base"))
    oracle_dir, oracle = _oracle(config, plan, report)
    if oracle_dir:
        subjects.append(Subject("oracle", oracle_dir, "", "base"))
    answers = stage.ask(plan.reported, subjects, plan.folder / "answers", report)
    return {
        "format_version": 1,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "compare": config.compare.model_dump(mode="json"),
        "evaluate": config.evaluate.model_dump(mode="json"),
        "train": plan.train.model_dump(mode="json"),
        "start": plan.start_name,
        "methods": methods,
        "oracle": oracle,
        "split": {
            what: {name: len(s.queries) for name, s in exam.sets.items()}
            for what, exam in (("validation", plan.validation), ("reported", plan.reported))
        },
        **stage.results_of(plan.reported, subjects, answers),
        "teacher_stores": {name: store_summary(place) for name, place in stores_of_run(config).items()},
        "environment": environment(),
    }


def _plan(config: Config, student: StudentSettings, run_dir: Path) -> Any:
    """Everything that is the same for all methods."""
    from stages.compare import Comparison
    from stages.exam import part_of, split_by_answer
    from stages.models import resolve_model
    from stages.student import open_stores

    settings = config.compare
    exam = exam_of(config)
    validation, reported = split_by_answer(
        exam, settings.validation_share, settings.seed, "duet compare",
        "give the set more questions, or move compare.validation_share towards 0.5",
    )  # fmt: skip
    unattacked = part_of(exam, validation)
    stores, tokenizer = open_stores(stores_of_run(config), config.store.verify)
    return Comparison(
        settings=settings,
        train=config.train_settings(student),
        model_dir=resolve_model(config.teacher.model, "teacher.model"),
        start_name=model_name(config.teacher.model),
        folder=run_dir / COMPARE_DIR,
        lessons=_lessons(config, tokenizer, next(iter(stores.values()))),
        stores=stores,
        store_tokenizer=tokenizer,
        validation=replace(unattacked, settings=unattacked.settings.model_copy(update={"attacks": ()})),
        reported=part_of(exam, reported),
        references=subjects_of(config.model_copy(update={"students": ()})),
        trust_remote_code=config.teacher.trust_remote_code,
    )


def _lessons(config: Config, tokenizer: Any, store: Any) -> Any:
    """The store's queries, in its order, with the data's answers and the refusals, as token ids."""
    from stages.baselines import Lessons, row_of
    from stages.prompts import render_answer
    from stages.teacher import queries_of

    by_request = queries_of(config.data, config.requests, need_answers=True)
    queries = {s: [query for found in by_request.values() for query in found[s]] for s in SUBSETS}
    counts = {subset: len(found) for subset, found in queries.items()}
    if counts != store.manifest.subsets:
        raise UserError(
            f"the store has {store.manifest.subsets} rows, the data now has {counts}",
            "run `duet teacher-logits` with this config",
        )
    rows = {s: [row_of(tokenizer, query, config.prompt) for query in found] for s, found in queries.items()}
    refusals = config.compare.refusals or (config.evaluate.refusal,)
    return Lessons(**rows, refusals=[render_answer(tokenizer, text, config.prompt) for text in refusals])


def _oracle(config: Config, plan: Any, report: Any) -> tuple[Path | None, dict[str, Any] | None]:
    """The oracle's model directory and what is told of it; None where the config has none."""
    from stages.models import resolve_model
    from stages.oracle import train_oracle

    oracle = config.compare.oracle
    if oracle is None:
        return None, None
    if isinstance(oracle, str):
        return resolve_model(oracle, "compare.oracle"), {"model": model_name(oracle)}
    model_dir, done = train_oracle(plan, oracle, report)
    return model_dir, {key: done[key] for key in ("steps", "train_s", "rows")}
