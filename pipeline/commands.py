"""Stage three, and all stages, as a user calls them: settings in, files in the run directory and lines in the terminal out.
Stage one is `capture.py`, stage two `distill.py`.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache.errors import EXIT_INTERRUPTED, Interrupted, UserError
from cache.files import publish_json, read_json
from cache.manifest import read_manifest
from cache.places import Place
from cache.record import SUBSETS
from pipeline.before import start_folder
from pipeline.capture import stores_of_run
from pipeline.config import Config
from pipeline.jobs import THIS_PROGRAM
from pipeline.named_models import check_before_stage_one, model_name, start_model
from pipeline.run import StopSignal, claim_run_dir, environment
from pipeline.sweep import Request
from pipeline.terminal import (
    attacks_table,
    costs_table,
    log,
    outcome_lines,
    progress_bar,
    refusal_lines,
    results_table,
    say,
    say_engine,
    say_for_children,
    show,
)
from stages.notes import note
from stages.settings import TRAINING_NAME, StudentSettings, TeacherSettings

RESULTS_NAME = "results.json"
REPORT_NAME, PDF_NAME = "report.html", "report.pdf"
STAGES = ("teacher-logits", "distill", "evaluate")


def evaluate(config: Config, dry_run: bool = False, only_models: bool = False) -> None:
    """Stage three: results.json, the table and the report.

    A dry run says what it will cost and starts nothing. `only_models` leaves out the run's students, and needs no stage before:
    base, teachers and `evaluate.models` are asked.
    """
    from pipeline.provenance import provenance, without_places
    from pipeline.report import write_report
    from stages import evaluate as stage
    from stages import given as of_given
    from stages import reading
    from stages.harness import ask_harness
    from stages.models import load_tokenizer
    from stages.proof import cut_references
    from stages.tofu_run import read_reference

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
    costs = stage.costs(subjects, exam)
    if dry_run or len(costs) > 2:  # the plain questions and one attack are not worth a table
        show(costs_table(costs, len(subjects)), result=dry_run)
    if run_dir is None:
        return
    if config.evaluate.likelihood:
        of_given.check(subjects, exam)
    with progress_bar("answers") as bar:
        answers = stage.answer_all(subjects, exam, run_dir / "answers", bar.update, functools.cache(say_engine), stop)
        readings = reading.read_all(subjects, exam, run_dir / "answers", bar.update, stop)
        given = {}
        if config.evaluate.likelihood:
            given = of_given.read_all(subjects, exam, run_dir / "likelihoods", bar.update, stop)
        harness = {}
        if config.evaluate.lm_eval:
            harness = ask_harness(subjects, exam, run_dir / "lm_eval", bar.update, stop)
    results = {
        "format_version": 1,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "evaluate": without_places(config.evaluate.model_dump(mode="json")),
        **stage.results_of(subjects, exam, answers, given, reference, readings),
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
    show(results_table(results))
    if len(costs) > 2:
        show(attacks_table(results))
    for line in outcome_lines(results) + refusal_lines(results):
        say(line)
    say(f"results: {run_dir / RESULTS_NAME}")
    say(f"report: {run_dir / REPORT_NAME}")


def _write_tofu_logs(folder: Path, exam: Any, given: Any, answers: Any, results: Mapping[str, Any]) -> None:
    """Each model's TOFU scores as open-unlearning writes them."""
    from stages.exam import stem_of
    from stages.given import finite
    from stages.open_unlearning import tofu_logs

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


def set_aside(folder: Path, names: tuple[str, ...], what: str) -> None:
    """Give earlier files the first free number: `results.json` becomes `results-1.json`."""
    number = 1 + len(list(folder.glob(names[0].replace(".", "-*."))))
    for name in filter(lambda name: (folder / name).is_file(), names):
        kept = folder / name.replace(".", f"-{number}.")
        (folder / name).rename(kept)
        say(f"kept the earlier {what}: {kept}")


def base_and_teachers(
    config: Config, find: Callable[[Any, str], Path], same: Callable[[Path, Path], bool]
) -> list[Any]:
    """Base and teachers, each teacher after its own base where that is another model.

    `find` is `resolve_model`, or `small_files` where no weights are needed; `same` says whether two directories hold one model.
    """
    from stages.exam import Subject

    base_dir = find(config.teacher.model, "teacher.model")
    subjects = [Subject("base", base_dir, "", "base")]
    for name, settings in config.teacher_settings().items():
        model_dir = find(settings.model, "teacher.model")
        prefix, set_prefixes = _prefixes(config, settings)
        called = f"teacher:{name}" if len(config.teachers) > 1 else "teacher"
        base = _base_of(subjects, name, model_dir, same)
        subjects.append(Subject(called, model_dir, prefix, base, set_prefixes))
    return subjects


def _base_of(subjects: list[Any], name: str, model_dir: Path, same: Callable[[Path, Path], bool]) -> str:
    """The base of a model that started as this one: the first of the subjects, or another that is put behind them."""
    from stages.exam import Subject

    if same(model_dir, subjects[0].model_dir):
        return "base"
    subjects.append(Subject(f"base:{name}", model_dir, "", f"base:{name}"))
    return f"base:{name}"


def subjects_of(config: Config, students: Sequence[StudentSettings]) -> list[Any]:
    """Base, teachers, then students, each after its own base where that is another model; then models that were made elsewhere,
    measured against the run's base."""
    from stages.exam import Subject
    from stages.models import resolve_model, same_model

    same = functools.partial(same_model, trust_remote_code=config.teacher.trust_remote_code)
    subjects = base_and_teachers(config, resolve_model, same)
    for student in students:
        student_dir = config.run_dir / student.name
        if not (student_dir / TRAINING_NAME).is_file():
            raise UserError(
                f"student {student.name!r} is not trained: {student_dir}", "run `duet distill` with this config"
            )
        start_dir = resolve_model(start_model(config, student), f"students.{student.name}.model")
        base = _base_of(subjects, student.name, start_dir, same)
        subjects.append(Subject(f"student:{student.name}", student_dir / "model", "", base))
    for name, model in config.evaluate.models.items():
        subjects.append(Subject(f"model:{name}", resolve_model(model, f"evaluate.models.{name}"), "", "base"))
    return subjects


def exam_of(config: Config) -> Any:
    """What every model of the run is asked."""
    from stages.exam import Exam
    from stages.models import pick_device, resolve_model

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


def _prefixes(config: Config, settings: TeacherSettings) -> tuple[str, dict[str, str]]:
    """A teacher's prefix, and those of the further requests' sets."""
    from stages.teacher import MAIN, prefixes_of

    prefixes = prefixes_of(settings.prefix, config.topic, config.requests)
    main = prefixes.pop(MAIN)
    return main, {f"{request}.{subset}": prefix for request, prefix in prefixes.items() for subset in SUBSETS}


def query_sets(config: Config) -> dict[str, Any]:
    """The training sets of all requests and those of the evaluation, with answers."""
    from stages.data import load_queries
    from stages.exam import QuerySet
    from stages.knowmem import load_shots
    from stages.teacher import MAIN, queries_of

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
        )
    for name, query_set in sets.items():
        if query_set.translates is not None and query_set.translates not in sets:
            raise UserError(
                f"evaluate.sets.{name}.translates: no set {query_set.translates!r}", f"the sets are {', '.join(sets)}"
            )
    _check_apart(sets)
    order = sorted(sets, key=lambda name: sets[name].expect != "forgotten")
    return {name: sets[name] for name in order}


def _check_apart(sets: Mapping[str, Any]) -> None:
    """Refuse a question that is to be forgotten in one set and to be kept in another."""
    forgotten = {q.question: name for name, of in sets.items() if of.expect == "forgotten" for q in of.queries}
    for name, of in sets.items():
        both = [q.question for q in of.queries if q.question in forgotten] if of.expect == "kept" else []
        if both:
            raise UserError(
                f"{len(both)} questions of the set {name!r} are to be kept, and those of {forgotten[both[0]]!r} are to be "
                f"forgotten: {both[0]!r}",
                "take them out of one of the two, or leave the set out of evaluate.sets",
            )


def store_summary(place: Place) -> dict[str, Any]:
    manifest = read_manifest(place)
    return {
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "positions": manifest.positions,
        "top_k": manifest.top_k,
        "vocab_size": manifest.vocab_size,
        "engine": manifest.provenance["engine"],
        "dtype": manifest.provenance["dtype"],
        "bytes": manifest.shard_bytes,
        "prefix": manifest.provenance["prefix"],
        **{f"prefix of {name}": r["prefix"] for name, r in manifest.provenance.get("requests", {}).items()},
    }


def _student_summary(config: Config, student: StudentSettings) -> dict[str, Any]:
    return {
        "model": model_name(start_model(config, student)),
        **read_json(config.run_dir / student.name / TRAINING_NAME),
    }


def run_all(request: Request) -> int:
    """All stages, each in a process of its own: what one leaves in memory, on the GPU above all, is gone before the next.

    Returns the first exit code that is not 0. A signal to this process is handed to the stage that runs.
    """
    from pipeline.preflight import preflight

    stop = StopSignal()
    config = request.load()
    check_before_stage_one(config, whole_run=True)
    preflight(config)
    for student in config.students:
        start_folder(config, student)  # the rest of what stage two would refuse, stage one asks
    for stage in STAGES:
        if stop():
            raise Interrupted(f"before {stage}")
        if code := run_stage(stage, request, stop):
            return code
    say_for_children(f"report: {config.run_dir / REPORT_NAME}")
    return 0


def run_stage(stage: str, request: Request, stop: StopSignal) -> int:
    """One stage in a process of its own, which gets our signals; its exit code, or an interruption's if it was killed."""
    arguments = request.arguments()
    log.debug("starting %s %s", stage, arguments)
    child = subprocess.Popen([*THIS_PROGRAM, stage, *arguments])
    stop.forward_to(child)
    code = child.wait()
    return code if code >= 0 else EXIT_INTERRUPTED
