"""Stage three as a user calls it: settings in, files in the run directory and lines in the terminal out.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet.cache.errors import note
from duet.cache.files import publish_json, read_json
from duet.cache.watch import Watch
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.tables import (
    WIDTH,
    attacks_table,
    costs_table,
    kept_lines,
    outcome_lines,
    refusal_lines,
    results_table,
)
from duet.pipeline.run.children import THIS_PROGRAM, run_quietly, visible_gpus
from duet.pipeline.run.directory import StopSignal, claim_run_dir, environment, set_aside
from duet.pipeline.run.exam import broad_questions, exam_of, subjects_of, trained_on
from duet.pipeline.run.named_models import model_name, start_model
from duet.pipeline.run.provenance import provenance, without_places
from duet.pipeline.run.stores import check_trained_on, store_summary, stores_of_run
from duet.pipeline.run.terminal import is_verbose, log, progress_bar, say, say_engine, show
from duet.stages.settings.attacks import ATTACKS
from duet.stages.settings.student import StudentSettings
from duet.stages.student.summary import read_summary

if TYPE_CHECKING:
    from duet.stages.evaluate.results import Read
    from duet.stages.exam.exam import Exam, Subject
    from duet.stages.exam.judge import Judge


@dataclass(frozen=True)
class Jobs:
    """How many models are asked at the same time, each in a process of its own; None: as many as there are GPUs."""

    count: int | None
    arguments: Sequence[str]  # of this command, which such a process gets too
    part: int | None = None  # in such a process: which model directory it asks


ONE_AT_A_TIME = Jobs(1, ())


@dataclass(frozen=True)
class Found:
    """All that the models answered, by model."""

    answers: Mapping[str, Mapping[str, Any]]
    read: Read
    harness: Mapping[str, Mapping[str, Any]]


def evaluate(config: Config, jobs: Jobs = ONE_AT_A_TIME, dry_run: bool = False, only_models: bool = False) -> int:
    """Stage three: results.json, the table and the report; returns an exit code.

    A dry run says what it will cost and starts nothing. `only_models` leaves out the run's students, and needs no stage before:
    base, teachers and `evaluate.models` are asked. A process that asks one model of several leaves its answers on disk.
    """
    from duet.stages.evaluate import items, over_seeds
    from duet.stages.evaluate.answers import costs_of
    from duet.stages.evaluate.results import results_of
    from duet.stages.evaluate.tofu import check_reference, read_reference
    from duet.stages.exam.given_texts import retrained_auc
    from duet.stages.models.tokenizers import load_tokenizer
    from duet.stages.questions.proof import cut_references

    stop = StopSignal()
    reference = read_reference(config.evaluate.tofu)
    students = () if only_models else config.students
    subjects = subjects_of(config, students)
    stores = {} if only_models else stores_of_run(config)
    check_trained_on(config, students, stores)
    judge = _judge_of(config, is_asked=not dry_run and jobs.part is None)
    if not dry_run:
        claim_run_dir(config)
    exam = exam_of(config)
    check_reference(reference, exam, [subject.name for subject in subjects])
    retrained_auc(exam)
    if jobs.part is not None:
        _ask_one(config.run, subjects, exam, jobs.part, stop)
        return 0
    tokenizer = load_tokenizer(subjects[0].model_dir)
    remarks = trained_on(config, exam.sets, broad_questions(config))
    remarks += cut_references(tokenizer, exam.queries, exam.settings.max_new_tokens)
    for text in remarks:
        note(text)
    costs = costs_of(subjects, exam)
    if dry_run or len(costs.keys() & ATTACKS.keys()) > 1:  # one attack is not worth a table
        show(costs_table(costs, len(subjects)), result=dry_run, width=WIDTH)
    if judge:
        _say_what_it_costs(judge, subjects, exam)
    if dry_run:
        return 0
    if code := _ask_in_children(subjects, exam, jobs, stop):
        return code
    found = _ask(config.run, subjects, exam, judge, stop)
    scored, scores = results_of(subjects, exam, found.answers, found.read, reference)
    results = {
        "format_version": 1,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "evaluate": without_places(config.evaluate.model_dump(mode="json")),
        **scored,
        "over_seeds": over_seeds.rows_of(_seed_rows(config, students), scores, scored["outcomes"], exam.settings.seed),
        "attack_costs": {kind: asdict(cost) for kind, cost in costs.items()},
        "teacher_stores": {name: store_summary(location) for name, location in stores.items()},
        "students": {student.name: _student_summary(config, student) for student in students},
        "remarks": remarks,
        "environment": environment(),
        "provenance": provenance(config, subjects, exam),
    }
    for name, of_harness in found.harness.items():
        results["models"][name] |= of_harness
    _publish(config.run, results, items.as_json(scores), exam, found)
    return 0


def _judge_of(config: Config, is_asked: bool) -> Judge | None:
    """The judge that the config names, shown to judge where it will be asked."""
    from duet.stages.exam.judge import KEY_VARIABLE, check_judge, judge_of

    if config.evaluate.judge is None:
        return None
    judge = judge_of(config.evaluate.judge, os.environ.get(KEY_VARIABLE))
    if is_asked:
        check_judge(judge)
    return judge


def _say_what_it_costs(judge: Judge, subjects: Sequence[Subject], exam: Exam) -> None:
    from duet.stages.evaluate.judged import cost_of

    requests, characters = cost_of(judge, subjects, exam)
    say(
        f"judge {judge.settings.model}: up to {requests:,} requests with {characters:,} characters, if answers are as long as "
        "the references, and one word each in reply"
    )


def _seed_rows(config: Config, students: Sequence[StudentSettings]) -> dict[str, list[str]]:
    """The models of each row over seeds."""
    rows = config.seed_rows(students)
    return {f"student:{row}": [f"student:{name}" for name in names] for row, names in rows.items()}


def _ask_in_children(subjects: Sequence[Subject], exam: Exam, jobs: Jobs, stop: StopSignal) -> int:
    """Every model in a process of its own, several at a time; the first exit code that is not 0. One at a time needs none."""
    from duet.stages.evaluate.answers import models_asked

    devices, models = visible_gpus(exam.device), models_asked(subjects, exam)
    num_jobs = min(jobs.count or len(devices) or 1, len(models))
    if num_jobs == 1:
        return 0
    say(f"asking {len(models)} models, {num_jobs} at a time")
    commands = {
        ", ".join(subject.name for subject in asked): [*THIS_PROGRAM, "evaluate", *jobs.arguments, "--part", str(part)]
        for part, asked in enumerate(models.values())
    }
    return run_quietly(commands, num_jobs, devices, stop)


def _ask_one(run: RunDir, subjects: Sequence[Subject], exam: Exam, part: int, stop: StopSignal) -> None:
    """Ask all subjects of one model directory."""
    from duet.stages.evaluate.answers import answer_all, models_asked
    from duet.stages.exam.reading import read_all

    model_dir, asked = list(models_asked(subjects, exam).items())[part]
    with progress_bar("answers") as bar:
        watch = Watch(bar.update, functools.cache(say_engine), stop)
        answer_all(subjects, exam, run.answers, watch, only=model_dir)
        read_all([subject for subject in asked if subject in subjects], exam, run.likelihoods, run.answers, watch)


def _ask(run: RunDir, subjects: Sequence[Subject], exam: Exam, judge: Judge | None, stop: StopSignal) -> Found:
    """Ask every model all that the settings ask for; what is on disk already is not asked again."""
    from duet.stages.evaluate.answers import answer_all
    from duet.stages.evaluate.harness import ask_harness
    from duet.stages.evaluate.results import Read
    from duet.stages.exam.depth import check as check_depth
    from duet.stages.exam.depth import read_depth
    from duet.stages.exam.given_answers import check
    from duet.stages.exam.given_beside import read_beside
    from duet.stages.exam.judge import read_judge
    from duet.stages.exam.reading import read_all

    if exam.settings.likelihood:
        check(subjects, exam)
    if exam.settings.depth:
        check_depth(subjects, exam)
    with progress_bar("answers") as bar:
        watch = Watch(bar.update, functools.cache(say_engine), stop)
        answers = answer_all(subjects, exam, run.answers, watch)
        given, readings = read_all(subjects, exam, run.likelihoods, run.answers, watch)
        beside = read_beside(subjects[0], exam, run.likelihoods, watch) if given else ({}, {})
        depth = read_depth(subjects, exam, run.likelihoods, watch) if exam.settings.depth else None
        judged = read_judge(judge, subjects, exam, answers, run.judged, watch) if judge else None
        return Found(
            answers=answers,
            read=Read(given, readings, *beside, depth, judged),
            harness=ask_harness(subjects, exam, run.lm_eval, watch) if exam.settings.lm_eval else {},
        )


def _publish(run: RunDir, results: dict[str, Any], of_questions: Mapping[str, Any], exam: Exam, found: Found) -> None:
    """Write scores of questions, report and, the sign of the end, results, earlier ones kept aside; say what came out."""
    from duet.pipeline.pages.report import write_report

    _keep_earlier(run, results)
    run.pdf.unlink(missing_ok=True)  # it shows the results that are replaced now
    publish_json(run.items, of_questions)
    if exam.settings.tofu:
        _write_tofu_logs(run.open_unlearning, exam, found, results)
    write_report(results, run.report)
    publish_json(run.results, results)
    _show_results(results, run)


def _show_results(results: dict[str, Any], run: RunDir) -> None:
    """Tables and files; the verdicts' reasons with -v, and in the run's log anyway."""
    verbose = is_verbose()
    width = None if verbose else WIDTH
    say(f"results: {run.results}")
    if results["attacks_work"]:
        show(attacks_table(results, verbose), width=width)
    show(results_table(results, verbose), width=width)
    for line in outcome_lines(results) + kept_lines(results):
        (say if verbose else log.info)(line)
    for line in refusal_lines(results):
        say(line)
    say(f"report: {run.report}")


def _write_tofu_logs(folder: Path, exam: Exam, found: Found, results: Mapping[str, Any]) -> None:
    """Each model's TOFU scores as open-unlearning writes them."""
    from duet.stages.evaluate.open_unlearning import tofu_logs
    from duet.stages.exam.exam import stem_of
    from duet.stages.exam.given_answers import finite

    for model, of_sets in finite(found.read.given)[0].items():
        logs = tofu_logs(exam, of_sets, found.answers[model], results["models"][model])
        of_model = folder / stem_of(model)
        of_model.mkdir(parents=True, exist_ok=True)
        for name, content in zip(("TOFU_EVAL.json", "TOFU_SUMMARY.json"), logs, strict=True):
            publish_json(of_model / name, content)
    say(f"for open-unlearning: {folder}")


def _keep_earlier(run: RunDir, results: dict[str, Any]) -> None:
    """Move the results of an evaluation with other settings, questions or models aside: `results-1.json` and so on."""
    if not run.results.is_file():
        return
    earlier = read_json(run.results)
    before, now = earlier["provenance"], results["provenance"]
    others = [n for part in ("data", "models") for n, found in before[part].items() if now[part].get(n) != found]
    if earlier["evaluate"] == results["evaluate"] and not others:
        return
    set_aside("evaluation", run.results, run.items, run.report, run.pdf)


def _student_summary(config: Config, student: StudentSettings) -> dict[str, Any]:
    return {
        "model": model_name(start_model(config, student)),
        **read_summary(config.run.student(student.name).path).as_json(),
    }
