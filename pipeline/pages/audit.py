"""The ranked table of prefixes in the terminal, and audit.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from rich.table import Table

from duet.pipeline.pages.charts import Dot, scatter
from duet.pipeline.pages.page import cell, definition_list, legend, page
from duet.pipeline.pages.tables import interval, refusal_lines

if TYPE_CHECKING:
    from duet.stages.audit.record import AuditRecord, Ranked, Search, SetRecord
    from duet.stages.metrics.uncertainty import ScoreRecord

VERDICT_COLOURS = {"passes": "#009e73", "unclear": "#e69f00", "fails": "#d55e00"}  # Okabe and Ito's, as in charts.py


def search_note(search: Search, ranked: Sequence[Ranked]) -> str:
    """How far to trust the numbers of a search."""
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


def _asked_for(results: AuditRecord) -> str:
    """The thresholds of the verdicts."""
    return ", ".join(
        f"{share} at least {100 * results['audit'][f'min_{share}']:g} %" for share in ("forgotten", "kept")
    )


def _name(candidate: Ranked) -> str:
    return candidate["name"] + (" (control)" if candidate["kind"] == "control" else "")


def _worst(candidate: Ranked, results: AuditRecord, share: str) -> ScoreRecord:
    """The candidate's share forgotten or kept on the set where its interval begins lowest."""
    names = [name for name, info in results["sets"].items() if info["expect"] == share]
    return min((candidate["scores"][f"{name}.{share}"] for name in names), key=lambda score: score["ci95"][0])


def heads(results: AuditRecord) -> tuple[str, ...]:
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


def cells(candidate: Ranked, results: AuditRecord) -> list[str]:
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


def audit_table(results: AuditRecord) -> Table:
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


def render(results: AuditRecord) -> str:
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


def _summary(results: AuditRecord) -> str:
    ranked = results["candidates"]
    own = next(candidate for candidate in ranked if candidate["kind"] == "config")
    sentences = [
        f"Of {len(ranked)} prefixes, <strong>{escape(ranked[0]['name'])}</strong> ranks first: "
        f"{escape(ranked[0]['verdict'])} ({escape(ranked[0]['reason'])}).",
        f"The config's own ranks {own['rank']}: <strong>{escape(own['verdict'])}</strong> ({escape(own['reason'])}).",
        "A student learns what the prefixed model says, which bounds what it can forget.",
    ]
    return " ".join(sentences)


def _ranking(results: AuditRecord) -> str:
    head = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads(results))
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in cells(candidate, results))}</tr>"
        for candidate in results["candidates"]
    )
    note = (
        f'<p class="note">{escape(search_note(results["search"], results["candidates"]))}</p>'
        if results["search"]
        else ""
    )
    caption = (
        f"{results['definitions']['score']} Drift in logits. Where several sets are of one kind, the worst counts."
    )
    return (
        f'<h2>Ranking</h2>{note}<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _plot(results: AuditRecord) -> str:
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


def _set_table(name: str, info: SetRecord, results: AuditRecord) -> str:
    metrics = ("rougeL_recall", "fall", info["expect"], "refusal_rate")
    return _scores_table(f"{name}: to be {info['expect']}", [f"{name}.{metric}" for metric in metrics], results, cell)


def _first_token_table(results: AuditRecord) -> str:
    def shown(score: ScoreRecord | None) -> str:
        if score is None:
            return cell(None)
        low, high = score["ci95"]
        return f'<td class="number">{score["value"]:.3f}<small>[{low:.3f}, {high:.3f}] n={score["n"]}</small></td>'

    ids = ["retain.topk_overlap", "retain.offset_drift"]
    return _scores_table("First token on retain questions: share of ids, and logits", ids, results, shown)


def _scores_table(title: str, ids: list[str], results: AuditRecord, shown: Callable[[ScoreRecord | None], str]) -> str:
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
