"""`duet compare`: DUET against other unlearning methods on the same data and budget; compare.json, compare.html and a table.

Works in `<run>/compare/` and writes the two files into the run's directory. Runs stage one where the run has no teacher logits
yet; the students that it trains are its own. Where DUET is trained with another preset of `harden` than the config's, that
preset's teacher logits are those of a run in `<run>/compare/harden/`.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet.cache.errors import IncompleteStore, Interrupted
from duet.cache.files import publish_json, publishing, read_json
from duet.cache.watch import Watch
from duet.pipeline.commands.compare_plan import plan_of, student_of, with_preset
from duet.pipeline.commands.distill import unasked_line
from duet.pipeline.commands.run import run_stage
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.pages.comparison import compare_table, render, sentences
from duet.pipeline.run.children import THIS_PROGRAM, environments_of_children, run_jobs, visible_gpus
from duet.pipeline.run.directory import StopSignal, claim_run_dir, environment, set_aside
from duet.pipeline.run.named_models import model_name
from duet.pipeline.run.provenance import without_places
from duet.pipeline.run.stores import store_summary, stores_of_run
from duet.pipeline.run.terminal import progress_bar, say, say_engine, show
from duet.stages.settings.compare import OracleSettings

if TYPE_CHECKING:
    from duet.pipeline.run.terminal import ProgressBar
    from duet.stages.compare.grid import Comparison
    from duet.stages.compare.results import Row

REFERENCES, ORACLE = "references", "oracle"  # parts that are not a method
CPU_JOBS = 2  # parts at a time without a GPU, where --jobs is not given: each holds up to two models


def compare(request: Selection, num_jobs: int | None = None, part: str | None = None) -> int:
    """Train, choose, ask and report, `num_jobs` parts at a time; returns an exit code.

    A part is one method, the oracle, or base and teacher together. With `part`, in a child process, that one only: the parent
    finds its results on disk.
    """
    from duet.stages.compare.repselect import check_matrices
    from duet.stages.models.directory import resolve_model

    config = request.load()
    stop = StopSignal()
    requests = {preset: with_preset(request, config, preset) for preset in config.compare.harden}
    students = {preset: student_of(one.load(), preset) for preset, one in requests.items()}
    if isinstance(config.compare.oracle, str):
        resolve_model(config.compare.oracle, "compare.oracle")  # a wrong name should not be found after hours
    if "repselect" in config.compare.methods:
        check_matrices(resolve_model(config.teacher.model, "teacher.model"), config.teacher.trust_remote_code)
    if part is None:
        for one in requests.values():
            if code := _stage_one(one.load(), one, stop):
                return code
    run, started = config.run, time.perf_counter()
    claim_run_dir(config)
    plan = plan_of(config, {preset: (one.load(), students[preset]) for preset, one in requests.items()})
    if part is None:
        for row, mode in plan.modes.items():
            if warning := unasked_line(replace(mode.job, name=row), mode.stores):
                say(warning)
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
    say(
        f"this call took {time.perf_counter() - started:.0f} s; of each method the models of the chosen setting are kept"
    )
    say(f"comparison: {run.compare_json}")
    say(f"report: {run.compare_page}")
    return 0


@dataclass(frozen=True)
class Part:
    """The result of one part: its rows, and facts on how their models were made."""

    rows: list[Row]
    method: tuple[str, dict[str, Any]] | None = None  # name, and its entry in compare.json
    oracle: dict[str, Any] | None = None


def _parts(config: Config) -> list[str]:
    """The names of the parts in the order of the table."""
    from duet.stages.compare.grid import duet_row

    oracle = [ORACLE] if config.compare.oracle is not None else []
    return [REFERENCES, *map(duet_row, config.compare.harden), *config.compare.methods, *oracle]


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
    from duet.stages.compare.results import Row
    from duet.stages.evaluate.answers import answer_all
    from duet.stages.exam.exam import Subject
    from duet.stages.exam.reading import read_given
    from duet.stages.student.summary import read_summary

    if name == REFERENCES:
        part = Part([Row(subject.name, [subject]) for subject in plan.references])
    elif name == ORACLE:
        model_dir, facts = _oracle(config, plan, watch)
        part = Part([Row(ORACLE, [Subject(ORACLE, model_dir, "", "base")])], oracle=facts)
    else:
        trials, grid = best_of(plan, name, watch, say)
        seen = (read_summary(trials[0].folder).trained_on or ()) if name in plan.modes else ()
        subjects = [
            Subject(_of_seed(name, one.repeat), one.folder / "model", "", "base", trained_on=seen) for one in trials
        ]
        title, paper = (METHODS[name].title, METHODS[name].paper) if name in METHODS else _mode_title(plan, name)
        facts = {"title": title, "paper": paper, "setting": trials[0].setting, "seeds": len(trials), "grid": grid}
        facts |= {"trained_on": list(seen)} if seen else {}
        part = Part([Row(name, subjects)], method=(name, facts))
    subjects = [subject for row in part.rows for subject in row.subjects]
    answer_all(subjects, plan.reported, config.run.compare_answers, watch)
    read_given(subjects, plan.reported, config.run.compare_likelihoods, watch)
    return part


def _of_seed(name: str, repeat: int) -> str:
    """The name of a row's model: `npo`, then `npo:seed1`."""
    return f"{name}:seed{repeat}" if repeat else name


def _mode_title(plan: Comparison, name: str) -> tuple[str, str]:
    harden = plan.modes[name].harden
    return "DUET" if harden == "none" else f"DUET, harden: {harden}", "2601.21283"


def _results(config: Config, plan: Comparison, parts: list[Part], watch: Watch) -> dict[str, Any]:
    """The content of compare.json."""
    from duet.stages.compare.results import results_of
    from duet.stages.evaluate.answers import answer_all
    from duet.stages.evaluate.results import Read
    from duet.stages.exam.given_beside import read_beside
    from duet.stages.exam.reading import read_given

    rows = [row for part in parts for row in part.rows]
    subjects = [subject for row in rows for subject in row.subjects]
    answers = answer_all(subjects, plan.reported, config.run.compare_answers, watch)  # all of them are there
    folder = config.run.compare_likelihoods
    given = read_given(subjects, plan.reported, folder, watch)
    beside = read_beside(subjects[0], plan.reported, folder, watch) if given else ({}, {})
    return {
        "format_version": 2,
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
        "against": next(iter(plan.modes)),
        **results_of(plan.reported, rows, answers, next(iter(plan.modes)), Read(given, {}, *beside)),
        "teacher_stores": {
            row: {name: store_summary(store.location) for name, store in mode.stores.items()}
            for row, mode in plan.modes.items()
        },
        "environment": environment(),
    }


def _oracle(config: Config, plan: Comparison, watch: Watch) -> tuple[Path, dict[str, Any]]:
    """The oracle's model directory and its entry in compare.json."""
    from duet.stages.compare.oracle import train_oracle
    from duet.stages.models.directory import resolve_model

    oracle = config.compare.oracle
    if not isinstance(oracle, OracleSettings):
        return resolve_model(str(oracle), "compare.oracle"), {"model": model_name(str(oracle))}
    model_dir, done = train_oracle(plan, oracle, watch, say)
    return model_dir, {key: done[key] for key in ("steps", "train_s", "rows")}
