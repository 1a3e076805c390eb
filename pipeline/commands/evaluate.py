"""Stage three as a user calls it: settings in, files in the run directory and lines in the terminal out.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from duet.cache.errors import note
from duet.cache.files import publish_json, read_json
from duet.cache.watch import Watch
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.tables import WIDTH, attacks_table, costs_table, outcome_lines, refusal_lines, results_table
from duet.pipeline.run.directory import (
    PDF_NAME,
    REPORT_NAME,
    RESULTS_NAME,
    StopSignal,
    claim_run_dir,
    environment,
    set_aside,
)
from duet.pipeline.run.exam import exam_of, subjects_of
from duet.pipeline.run.named_models import model_name, start_model
from duet.pipeline.run.stores import store_summary, stores_of_run
from duet.pipeline.run.terminal import is_verbose, log, progress_bar, say, say_engine, show
from duet.stages.settings.student import StudentSettings
from duet.stages.student.summary import read_summary


def evaluate(config: Config, dry_run: bool = False, only_models: bool = False) -> None:
    """Stage three: results.json, the table and the report.

    A dry run says what it will cost and starts nothing. `only_models` leaves out the run's students, and needs no stage before:
    base, teachers and `evaluate.models` are asked.
    """
    from duet.pipeline.pages.report import write_report
    from duet.pipeline.run.provenance import provenance, without_places
    from duet.stages.evaluate import results as stage
    from duet.stages.evaluate.answers import answer_all, costs_of
    from duet.stages.evaluate.harness import ask_harness
    from duet.stages.evaluate.tofu import read_reference
    from duet.stages.exam.given_answers import check
    from duet.stages.exam.reading import read_all
    from duet.stages.models.tokenizers import load_tokenizer
    from duet.stages.questions.proof import cut_references

    stop = StopSignal()
    reference = read_reference(config.evaluate.tofu)
    students = () if only_models else config.students
    subjects = subjects_of(config, students)
    stores = {} if only_models else stores_of_run(config)
    run_dir = None if dry_run else claim_run_dir(config)
    exam = exam_of(config)
    remarks = cut_references(load_tokenizer(subjects[0].model_dir), exam.queries, exam.settings.max_new_tokens)
    for text in remarks:
        note(text)
    costs = costs_of(subjects, exam)
    if dry_run or len(costs) > 2:  # the plain questions and one attack are not worth a table
        show(costs_table(costs, len(subjects)), result=dry_run, width=WIDTH)
    if run_dir is None:
        return
    if config.evaluate.likelihood:
        check(subjects, exam)
    with progress_bar("answers") as bar:
        watch = Watch(bar.update, functools.cache(say_engine), stop)
        answers = answer_all(subjects, exam, run_dir / "answers", watch)
        given, readings = read_all(subjects, exam, run_dir / "likelihoods", run_dir / "answers", watch)
        harness = {}
        if config.evaluate.lm_eval:
            harness = ask_harness(subjects, exam, run_dir / "lm_eval", watch)
    results = {
        "format_version": 1,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "evaluate": without_places(config.evaluate.model_dump(mode="json")),
        **stage.results_of(subjects, exam, answers, stage.Read(given, readings), reference),
        "attack_costs": {kind: asdict(cost) for kind, cost in costs.items()},
        "teacher_stores": {name: store_summary(place) for name, place in stores.items()},
        "students": {student.name: _student_summary(config, student) for student in students},
        "remarks": remarks,
        "environment": environment(),
        "provenance": provenance(config, subjects, exam),
    }
    for name, scores in harness.items():
        results["models"][name] |= scores
    _keep_earlier(run_dir, results)
    (run_dir / PDF_NAME).unlink(missing_ok=True)  # it shows the results that are replaced now
    publish_json(run_dir / RESULTS_NAME, results)
    if config.evaluate.tofu:
        _write_tofu_logs(run_dir / "open-unlearning", exam, given, answers, results)
    write_report(results, run_dir / REPORT_NAME)
    _show_results(results, run_dir, with_attacks=len(costs) > 2)


def _show_results(results: dict[str, Any], run_dir: Path, with_attacks: bool) -> None:
    """Tables and files; the verdicts' reasons with -v, and in the run's log anyway."""
    verbose = is_verbose()
    width = None if verbose else WIDTH
    say(f"results: {run_dir / RESULTS_NAME}")
    if with_attacks:
        show(attacks_table(results, verbose), width=width)
    show(results_table(results, verbose), width=width)
    for line in outcome_lines(results):
        (say if verbose else log.info)(line)
    for line in refusal_lines(results):
        say(line)
    say(f"report: {run_dir / REPORT_NAME}")


def _write_tofu_logs(folder: Path, exam: Any, given: Any, answers: Any, results: Mapping[str, Any]) -> None:
    """Each model's TOFU scores as open-unlearning writes them."""
    from duet.stages.evaluate.open_unlearning import tofu_logs
    from duet.stages.exam.exam import stem_of
    from duet.stages.exam.given_answers import finite

    for model, of_sets in finite(given)[0].items():
        logs = tofu_logs(exam, of_sets, answers[model], results["models"][model])
        of_model = folder / stem_of(model)
        of_model.mkdir(parents=True, exist_ok=True)
        for name, content in zip(("TOFU_EVAL.json", "TOFU_SUMMARY.json"), logs, strict=True):
            publish_json(of_model / name, content)
    say(f"for open-unlearning: {folder}")


def _keep_earlier(run_dir: Path, results: dict[str, Any]) -> None:
    """Move the results of an evaluation with other settings or students aside: `results-1.json` and so on."""
    path = run_dir / RESULTS_NAME
    if not path.is_file():
        return
    earlier = read_json(path)
    if earlier["evaluate"] == results["evaluate"] and set(earlier["models"]) <= set(results["models"]):
        return
    set_aside(run_dir, (RESULTS_NAME, REPORT_NAME, PDF_NAME), "evaluation")


def _student_summary(config: Config, student: StudentSettings) -> dict[str, Any]:
    return {
        "model": model_name(start_model(config, student)),
        **read_summary(config.run_dir / student.name).as_json(),
    }
