"""`duet audit-prefix`: settings in, a ranked table, audit.html and audit.json out; and `duet run`'s look at the verdict.

Lies in `<run>/audit/`, which does not claim the run: prefixes are audited to choose the run's. verdicts.json there holds the
verdict on every prefix that was audited, by the hash of all that decides it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from duet.cache.errors import UserError
from duet.cache.files import publish_json, publishing, read_json
from duet.cache.watch import Watch
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.audit import audit_table, render, search_note
from duet.pipeline.pages.tables import refusal_lines
from duet.pipeline.run.directory import StopSignal, environment, set_aside
from duet.pipeline.run.exam import exam_of
from duet.pipeline.run.provenance import without_places
from duet.pipeline.run.terminal import log_to, progress_bar, say, say_engine, show

if TYPE_CHECKING:
    from duet.stages.audit.record import AuditRecord
    from duet.stages.audit.run import Audit


def audit_prefixes(config: Config, prefixes: tuple[str, ...], search: int) -> None:
    """Audit the config's own prefix, these and the bundled ones; with a search, that many variations of the best."""
    from duet.stages.audit.judge import stops_a_run
    from duet.stages.audit.run import run_audit

    stop = StopSignal()
    if config.bare_teachers:
        raise UserError(
            "the teacher has no prefix, so there is none to audit",
            "`duet evaluate` measures the model itself; for a prefix add --set teacher.prefix=… --set evaluate.base=null",
        )
    if config.teachers:
        raise UserError(
            "the audit asks one model, and this config has several teachers",
            "add --set teachers=[] and name their prefixes with --prefix; another model is another --set teacher.model",
        )
    plan = _plan(config, prefixes, search)
    run = config.run
    run.audit.mkdir(parents=True, exist_ok=True)
    log_to(run.audit_log)
    with progress_bar("answers") as bar:
        found, verdicts = run_audit(plan, run.audit_answers, Watch(bar.update, functools.cache(say_engine), stop))
    results: AuditRecord = {
        "format_version": 1,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "audit": config.audit.model_dump(mode="json"),
        "evaluate": without_places(plan.exam.settings.model_dump(mode="json")),
        "top_k": config.teacher.top_k,
        **found,
        "environment": environment(),
    }
    recorded = read_json(run.audit_verdicts) if run.audit_verdicts.is_file() else {}
    publish_json(run.audit_verdicts, recorded | verdicts)
    _keep_earlier(run, results)
    publish_json(run.audit_json, results)
    with publishing(run.audit_page) as temporary:
        temporary.write_text(render(results), encoding="utf-8")
    own = next(candidate for candidate in results["candidates"] if candidate["kind"] == "config")
    _say(results, run, stops_a_run(verdicts[own["key"]], config.teacher.prefix_on))


def _plan(config: Config, prefixes: tuple[str, ...], search: int) -> Audit:
    from duet.stages.audit.prefixes import candidates
    from duet.stages.audit.run import Audit, audit_exam
    from duet.stages.models.directory import resolve_model

    exam = exam_of(config.model_copy(update={"requests": ()}))  # further requests have prefixes of their own
    return Audit(
        candidates=candidates(config.teacher.prefix, prefixes, config.topic),
        model_dir=resolve_model(config.teacher.model, "teacher.model"),
        exam=audit_exam(exam, config.audit, config.teacher.dtype),
        top_k=config.teacher.top_k,
        settings=config.audit,
        search=search,
    )


def refuse_failing(config: Config) -> None:
    """Raise UserError where this run's directory holds a verdict on the config's prefix that stops it, as things are now."""
    run = config.run
    if config.teachers or config.bare_teachers or not run.audit_verdicts.is_file():
        return
    from duet.stages.audit.judge import stops_a_run
    from duet.stages.audit.prefixes import CONFIGS_OWN
    from duet.stages.audit.run import verdict_keys

    plan = _plan(config, (), 0)
    own = replace(plan, candidates=[candidate for candidate in plan.candidates if candidate.name == CONFIGS_OWN])
    found = read_json(run.audit_verdicts).get(verdict_keys(own)[CONFIGS_OWN])
    if found and stops_a_run(found, config.teacher.prefix_on):
        raise UserError(
            f"the config's prefix failed its audit: {found['reason']}",
            f"take a prefix that passes, see {run.audit_page}; or say --force: the teacher bounds the student",
        )


def _keep_earlier(run: RunDir, results: AuditRecord) -> None:
    """Move an audit that holds what this one does not aside: `audit-1.json` and so on."""
    if not run.audit_json.is_file():
        return
    earlier, now = read_json(run.audit_json), results
    keys = [{candidate["key"] for candidate in audit["candidates"]} for audit in (earlier, now)]
    if earlier["search"] == now["search"] and earlier["top_k"] == now["top_k"] and keys[0] <= keys[1]:
        return
    set_aside("audit", run.audit_json, run.audit_page)


def _say(results: AuditRecord, run: RunDir, is_refused: bool) -> None:
    show(audit_table(results))
    best = results["candidates"][0]
    say(f"{_chosen(results)}: {best['name']} ({best['verdict']}): {best['prefix'] or '(none)'}")
    if results["search"]:
        say(f"note: {search_note(results['search'], results['candidates'])}")
    own = next(candidate for candidate in results["candidates"] if candidate["kind"] == "config")
    refused = "; `duet run` refuses it without --force" if is_refused else ""
    say(f"the config's own prefix, on all questions: {own['verdict_on_all']}{refused}")
    for line in refusal_lines(results):
        say(line)
    say(f"audit: {run.audit_json}")
    say(f"report: {run.audit_page}")


def _chosen(results: AuditRecord) -> str:
    return "best on the questions it was chosen on" if results["search"] else "best"
