"""`duet audit-prefix`: settings in, a ranked table, audit.html and audit.json out; and `duet run`'s look at the verdict.

Lies in `<run>/audit/`, which does not claim the run: prefixes are audited to choose the run's. verdicts.json there holds the
verdict on every prefix that was audited, by the hash of all that decides it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from cache.errors import UserError
from cache.files import publish_json, publishing, read_json
from pipeline.charts import Dot, scatter
from pipeline.commands import exam_of, set_aside
from pipeline.config import Config
from pipeline.page import cell, definition_list, legend, page
from pipeline.run import AUDIT_DIR, LOG_NAME, StopSignal, environment
from pipeline.terminal import interval, log_to, progress_bar, refusal_lines, say, say_engine, show

AUDIT_NAME, PAGE_NAME, VERDICTS_NAME = "audit.json", "audit.html", "verdicts.json"
VERDICT_COLOURS = {"passes": "#009e73", "unclear": "#e69f00", "fails": "#d55e00"}  # Okabe and Ito's, as in charts.py
Results = Mapping[str, Any]


def audit_prefixes(config: Config, prefixes: tuple[str, ...], search: int) -> None:
    """Audit the config's own prefix, these and the bundled ones; with a search, so many variations of the best."""
    from stages.audit import run_audit

    stop = StopSignal()
    if config.teachers:
        raise UserError(
            "the audit asks one model, and this config has several teachers",
            "add --set teachers=[] and name their prefixes with --prefix; another model is another --set teacher.model",
        )
    plan = _plan(config, prefixes, search)
    audit_dir = config.run_dir / AUDIT_DIR
    audit_dir.mkdir(parents=True, exist_ok=True)
    log_to(audit_dir / LOG_NAME)
    with progress_bar("answers") as bar:
        found = run_audit(plan, audit_dir / "answers", bar.update, functools.cache(say_engine), stop)
    verdicts = found.pop("verdicts")
    results = {
        "format_version": 1,
        "run": config.name,
        "topic": config.topic,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "audit": config.audit.model_dump(mode="json"),
        "evaluate": plan.exam.settings.model_dump(mode="json"),
        "top_k": config.teacher.top_k,
        **found,
        "environment": environment(),
    }
    recorded = read_json(audit_dir / VERDICTS_NAME) if (audit_dir / VERDICTS_NAME).is_file() else {}
    publish_json(audit_dir / VERDICTS_NAME, recorded | verdicts)
    _keep_earlier(audit_dir, results)
    publish_json(audit_dir / AUDIT_NAME, results)
    with publishing(audit_dir / PAGE_NAME) as temporary:
        temporary.write_text(render(results), encoding="utf-8")
    _tell(results, audit_dir)


def _plan(config: Config, prefixes: tuple[str, ...], search: int) -> Any:
    from stages.audit import Audit, audit_exam
    from stages.models import resolve_model
    from stages.prefixes import candidates

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
    """Raise UserError where this run's directory holds a failing verdict on the config's own prefix, as things are now."""
    path = config.run_dir / AUDIT_DIR / VERDICTS_NAME
    if config.teachers or not path.is_file():
        return
    from stages.audit import verdict_keys
    from stages.prefixes import CONFIGS_OWN
    from stages.verdict import FAILS

    plan = _plan(config, (), 0)
    own = replace(plan, candidates=[candidate for candidate in plan.candidates if candidate.name == CONFIGS_OWN])
    found = read_json(path).get(verdict_keys(own)[CONFIGS_OWN])
    if found and found["verdict"] == FAILS:
        raise UserError(
            f"the config's prefix failed its audit: {found['reason']}",
            f"take a prefix that passes, see {path.with_name(PAGE_NAME)}; or say --force: the teacher bounds the student",
        )


def _keep_earlier(audit_dir: Path, results: Results) -> None:
    """Move an audit that holds what this one does not aside: `audit-1.json` and so on."""
    path = audit_dir / AUDIT_NAME
    if not path.is_file():
        return
    earlier, now = read_json(path), results
    keys = [{candidate["key"] for candidate in audit["candidates"]} for audit in (earlier, now)]
    if earlier["search"] == now["search"] and earlier["top_k"] == now["top_k"] and keys[0] <= keys[1]:
        return
    set_aside(audit_dir, (AUDIT_NAME, PAGE_NAME), "audit")


def _tell(results: Results, audit_dir: Path) -> None:
    show(audit_table(results))
    best = results["candidates"][0]
    say(f"{_chosen(results)}: {best['name']} ({best['verdict']}): {best['prefix'] or '(none)'}")
    if results["search"]:
        say(f"note: {_search_note(results)}")
    own = next(candidate for candidate in results["candidates"] if candidate["kind"] == "config")
    refused = "; `duet run` refuses it without --force" if own["verdict_on_all"] == "fails" else ""
    say(f"the config's own prefix, on all questions: {own['verdict_on_all']}{refused}")
    for line in refusal_lines(results):
        say(line)
    say(f"audit: {audit_dir / AUDIT_NAME}")
    say(f"report: {audit_dir / PAGE_NAME}")


def _chosen(results: Results) -> str:
    return "best on the questions it was chosen on" if results["search"] else "best"


def _search_note(results: Results) -> str:
    """What a search's numbers are worth."""
    search, ranked = results["search"], results["candidates"]
    chosen, held_out = (sum(search["n"][part].values()) for part in ("choosing", "held_out"))
    of_search = [candidate for candidate in ranked if candidate["kind"] == "search"]
    others = [candidate for candidate in ranked if candidate["kind"] != "search"]
    told = ", ".join(
        f"{best['name']} has {100 * best['ranked_by']:.1f} there and {100 * best['score']:.1f} on the others"
        for best in (*of_search[:1], *others[:1])
    )
    return (
        f"{search['made']} variations of {', '.join(search['parents'])} were tried. The ranks come from {chosen} questions, "
        f"on which the best of {len(ranked)} tends to look better than it is; on the other {held_out} nothing was chosen. "
        f"The best that the search made, and the best other: {told}. All other numbers shown are of the others."
    )


def _asked_for(results: Results) -> str:
    """The thresholds of the verdicts."""
    return ", ".join(
        f"{share} at least {100 * results['audit'][f'min_{share}']:g} %" for share in ("forgotten", "kept")
    )


def _name(candidate: Results) -> str:
    return candidate["name"] + (" (control)" if candidate["kind"] == "control" else "")


def _worst(candidate: Results, results: Results, share: str) -> dict[str, Any]:
    """The candidate's share forgotten or kept on the set where its interval begins lowest."""
    names = [name for name, info in results["sets"].items() if info["expect"] == share]
    return min((candidate["scores"][f"{name}.{share}"] for name in names), key=lambda score: score["ci95"][0])


def heads(results: Results) -> tuple[str, ...]:
    """The columns of the ranking."""
    scores = ("score where\nchosen", "score\nheld out") if results["search"] else ("score",)
    return (
        "rank",
        "prefix",
        *scores,
        "forgotten, %\nworst set",
        "kept, %\nworst set",
        "refuses, %\nforget / retain",
        "first token\noverlap, % / drift",
        "verdict",
    )


def cells(candidate: Results, results: Results) -> list[str]:
    """One row under `heads`."""
    scores = candidate["scores"]
    drift = scores.get("retain.offset_drift")
    refuses = " / ".join(f"{100 * scores[f'{name}.refusal_rate']['value']:.1f}" for name in ("forget", "retain"))
    return [
        str(candidate["rank"]),
        _name(candidate),
        *(f"{100 * candidate[key]:.1f}" for key in (("ranked_by", "score") if results["search"] else ("score",))),
        interval(_worst(candidate, results, "forgotten")),
        interval(_worst(candidate, results, "kept")),
        refuses,
        f"{100 * scores['retain.topk_overlap']['value']:.1f} / {format(drift['value'], '+.2f') if drift else '-'}",
        candidate["verdict"] if candidate["verdict"] == "passes" else f"{candidate['verdict']}: {candidate['reason']}",
    ]


def audit_table(results: Results) -> Table:
    """One row per prefix, best first."""
    n = ", ".join(f"{name} {info['n']}" for name, info in results["sets"].items())
    title = f"Prefixes before the base model [95 % interval]; {_asked_for(results)}; n: {n}"
    table = Table(title=title, title_justify="left")
    for head in heads(results):
        is_text = head in ("prefix", "verdict")
        table.add_column(head, justify="left" if is_text else "right", no_wrap=head != "verdict", overflow="fold")
    for candidate in results["candidates"]:
        table.add_row(*cells(candidate, results))
    return table


def render(results: Results) -> str:
    """The whole page as HTML text, a pure function of audit.json."""
    body = "".join(
        (
            f'<p class="lead">{_summary(results)}</p>',
            _ranking(results),
            _plot(results),
            *(_set_table(name, info, results) for name, info in results["sets"].items()),
            _first_token_table(results),
            *(f'<p class="note">{escape(line)}</p>' for line in refusal_lines(results)),
            f"<h2>The texts</h2>{definition_list({c['name']: c['prefix'] or '(none)' for c in results['candidates']})}",
            f"<h2>What the numbers mean</h2>{definition_list(results['definitions'])}",
            f"<h2>Provenance</h2><h3>Audit</h3>{definition_list(results['audit'] | {'top_k': results['top_k']})}",
            f"<h3>Environment</h3>{definition_list(results['environment'])}",
        )
    )
    return page(f"Prefixes to forget {results['topic']}", f"Run {results['run']}, {results['created']}", body)


def _summary(results: Results) -> str:
    ranked = results["candidates"]
    own = next(candidate for candidate in ranked if candidate["kind"] == "config")
    sentences = [
        f"Of {len(ranked)} prefixes, <strong>{escape(ranked[0]['name'])}</strong> ranks first: "
        f"{escape(ranked[0]['verdict'])} ({escape(ranked[0]['reason'])}).",
        f"The config's own ranks {own['rank']}: <strong>{escape(own['verdict'])}</strong> ({escape(own['reason'])}).",
        "A student learns what the prefixed model says, which bounds what it can forget.",
    ]
    return " ".join(sentences)


def _ranking(results: Results) -> str:
    head = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads(results))
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in cells(candidate, results))}</tr>"
        for candidate in results["candidates"]
    )
    note = f'<p class="note">{escape(_search_note(results))}</p>' if results["search"] else ""
    caption = (
        f"{results['definitions']['score']} Drift in logits. Where several sets are of one kind, the worst counts."
    )
    return (
        f'<h2>Ranking</h2>{note}<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _plot(results: Results) -> str:
    dots, palette = {}, {}
    for candidate in results["candidates"]:
        forgotten, kept = (_worst(candidate, results, share)["value"] for share in ("forgotten", "kept"))
        dots[candidate["name"]] = Dot(forgotten, kept)
        palette[candidate["name"]] = VERDICT_COLOURS[candidate["verdict"]]
    return (
        '<h2>Forgetting against damage</h2><p class="note">Share of the base model\'s recall that is forgotten, to the right, '
        "and that is kept, upwards, each on the worst set; the damage is what is missing to 100. A good prefix stands in the "
        "upper right corner, no prefix in the upper left, one that refuses everything in the lower right.</p>"
        + legend(VERDICT_COLOURS)
        + scatter(dots, palette, ("forgotten, %", "kept, %"), "Forgetting against damage, by prefix")
    )


def _set_table(name: str, info: Results, results: Results) -> str:
    metrics = ("rougeL_recall", "fall", info["expect"], "refusal_rate")
    return _scores_table(f"{name}: to be {info['expect']}", [f"{name}.{metric}" for metric in metrics], results, cell)


def _first_token_table(results: Results) -> str:
    def shown(score: Results | None) -> str:
        if score is None:
            return cell(None)
        low, high = score["ci95"]
        return f'<td class="number">{score["value"]:.3f}<small>[{low:.3f}, {high:.3f}] n={score["n"]}</small></td>'

    ids = ["retain.topk_overlap", "retain.offset_drift"]
    return _scores_table("First token on retain questions: share of ids, and logits", ids, results, shown)


def _scores_table(title: str, ids: list[str], results: Results, shown: Any) -> str:
    head = "".join(f'<th class="number" scope="col">{escape(key.rsplit(".", 1)[1])}</th>' for key in ids)
    rows = "".join(
        f'<tr><th scope="row">{escape(candidate["name"])}</th>'
        f"{''.join(shown(candidate['scores'].get(key)) for key in ids)}</tr>"
        for candidate in results["candidates"]
    )
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr><th scope="col">prefix</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
