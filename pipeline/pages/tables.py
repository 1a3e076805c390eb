"""The terminal's tables and lines: scores, verdicts, attacks and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from duet.cache.record import SUBSETS
from duet.pipeline.pages.results import seen_by_models
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE

WIDTH = 100  # columns of the widest table that is shown without -v


def progress_note(line: Mapping[str, Any]) -> str:
    """The numbers of a line of metrics.jsonl that are worth watching."""
    subsets = [(name, line.get(f"loss_{name}")) for name in SUBSETS]
    losses = ", ".join(f"{name} {loss:.3g}" for name, loss in subsets if loss is not None)
    return (
        f"loss {line['loss']:.3g} ({losses})  {line['tokens_per_s']:,.0f} tok/s  "
        f"stall {100 * line['stall_share']:.0f} %  {line['memory_gb']:.2f} GB"
    )


def loss_in_words(loss: str, combine: str | None, weights: Mapping[str, float]) -> str:
    """A student's loss and, where its teachers have names, these: `l1, mix of mild 0.75 and strict 0.25`."""
    if list(weights) == ["teacher"]:
        return loss
    if not combine:
        return f"{loss} of {next(iter(weights))}"
    return f"{loss}, {combine} of {' and '.join(f'{n} {w:.3g}' for n, w in weights.items())}"


def noise_in_words(start_noise: float | None) -> str:
    """What follows the name of the model that a student starts from: ` + 0.5 noise`, or nothing."""
    return f" + {start_noise:g} noise" if start_noise else ""


def points(score: Mapping[str, Any]) -> str:
    """A score in points: `93.3`."""
    return f"{100 * score['value']:.1f}"


def interval(score: Mapping[str, Any]) -> str:
    """A score in points with its 95 % interval: `93.3 [86.7, 100.0]`."""
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def plain_table(caption: str) -> Table:
    """A table without rules, so that a screen of WIDTH columns holds many columns of numbers."""
    return Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, caption=caption, caption_justify="left"
    )


def results_table(results: dict[str, Any], verbose: bool = False) -> Table:
    """Models by rows; by columns ROUGE-L recall per set in points, and the verdict.

    `verbose` adds numbers of questions, 95 % intervals, the performance shift, and two rows with the floors.
    """
    keys = {f"{name}.{HEADLINE}": f"{name}\nn={of['n']}" if verbose else name for name, of in results["sets"].items()}
    table = plain_table("ROUGE-L recall in points; " + ("[95 % interval]" if verbose else "-v adds intervals"))
    table.add_column("model", no_wrap=True)
    for title in keys.values():
        table.add_column(title, justify="right", overflow="fold")
    if verbose:
        table.add_column("performance\nshift", justify="right")
    table.add_column("verdict")
    shown = interval if verbose else points
    for model, scores in results["models"].items():
        cells = [shown(scores[key]) if key in scores else "-" for key in keys]
        if verbose:
            shift = results["performance_shift"].get(model)
            cells.append(f"{shift['value']:+.1f}" if shift else "-")
        table.add_row(model, *cells, results["outcomes"][model]["verdict"])
    for row, found in results.get("over_seeds", {}).items():
        cells = [shown(found["scores"][key]) if key in found["scores"] else "-" for key in keys]
        verdicts = ", ".join(f"{verdict} {count}" for verdict, count in found["verdicts"].items())
        table.add_row(f"{row}, {len(found['models'])} seeds", *cells, *(["-"] if verbose else []), verdicts)
    for floor in ("refusal", "echo") if verbose else ():
        values = [results["floors"].get(key, {}).get(floor) for key in keys]
        cells = [f"{100 * value:.1f}" if value is not None else "" for value in values]
        table.add_row(f"floor: {floor}", *cells, style="dim")
    return table


def outcome_lines(results: dict[str, Any]) -> list[str]:
    """The verdict on each model and its first reason; results.json has all reasons."""
    return [
        f"{model}: {outcome['verdict']} ({outcome['reasons'][0]})" for model, outcome in results["outcomes"].items()
    ]


def kept_lines(results: Mapping[str, Any]) -> list[str]:
    """A line per student and family of attack texts: the questions to be kept behind these texts, beside base's figures."""
    found = results.get("kept_under_attack", {})
    lines = []
    for model, by_kind in found.items():
        for kind, own in by_kind.items() if model.startswith("student:") else ():
            base = found.get(model.replace("student:", "base:", 1), found["base"])[kind]  # its own, where it has one
            lines.append(
                f"{model}, {own['rougeL_recall']['n']} questions to be kept behind {kind} texts: "
                f"recall {interval(own['rougeL_recall'])}, without {points(own['plain.rougeL_recall'])}, base "
                f"{points(base['rougeL_recall'])}; refused {interval(own['refusal_rate'])} %, without "
                f"{points(own['plain.refusal_rate'])}, base {points(base['refusal_rate'])}"
            )
    return lines


def refusal_lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each set whose refusal rate says little, since no answer is in a language that the patterns know."""
    refusals = results.get("refusals", {})
    what = (
        "only evaluate.refusal_patterns count there"
        if refusals.get("own_patterns")
        else "a rate of 0 means nothing there; add patterns with evaluate.refusal_patterns"
    )
    return [
        f"refusal_rate of {name}: its answers are in no language that the refusal patterns know: {what}"
        for name in refusals.get("unknown_sets", ())
    ]


def costs_table(costs: Mapping[str, Any], num_models: int) -> Table:
    """What an evaluation will ask, by attack: prompts, tokens and training steps over all models."""
    table = plain_table(f"For all {num_models} models; answers on disk are not asked for again")
    table.add_column("attack", no_wrap=True)
    for title in ("answers", "prompt tokens", "answer tokens, at most", "training steps"):
        table.add_column(title, justify="right")
    for kind, cost in costs.items():
        counts = (cost.prompts, cost.prompt_tokens, cost.answer_tokens, cost.training_steps)
        table.add_row(kind, *(f"{count:,}" for count in counts))
    return table


def attacks_table(results: dict[str, Any], verbose: bool = False) -> Table:
    """Attacks by rows, models and the control by columns: the facts of the forget set that the worst variant per question
    brings back, in points of distinctive recall; where no question has a word of its own, ROUGE-L recall, and the row says so.

    `verbose` adds 95 % intervals.
    """
    columns = dict(results["models"]) | ({"control": results["control"]} if results.get("control") else {})
    seen = seen_by_models(results)
    work = results["attacks_work"]
    caption = ["Facts that came back, in points, worst variant per question; works: shown to work on this model"]
    for remarks in (
        {
            "sampling: leak@k of the largest k": "sampling" in work,
            "logit_lens: mean reciprocal rank": "logit_lens" in work,
        },
        {
            "+: trained on texts of this attack, not counted for its verdict": bool(seen),
            "control: a model that never knew": "control" in columns,
        },
    ):
        caption += filter(None, ["; ".join(text for text, holds in remarks.items() if holds)])
    table = plain_table("\n".join(caption))
    table.add_column("attack", no_wrap=True)
    table.add_column("works")
    for model in columns:
        table.add_column(model, justify="right", overflow="fold")  # three seeds differ in their last letter
    first = next(iter(results["models"].values()))
    shown = interval if verbose else points
    for kind, shown_to in work.items():
        worst = f"attack.{kind}_worst.forget."
        own = [key for key in first if key.startswith((f"attack.{kind}.forget.leak@", f"attack.{kind}.forget.mrr"))]
        found = own[-1:] or [key for metric in (DISTINCTIVE, HEADLINE) if (key := worst + metric) in first]
        if found:
            cells = [
                (shown(scores[found[0]]) if found[0] in scores else "-") + ("+" if kind in seen.get(model, ()) else "")
                for model, scores in columns.items()
            ]
            title = f"{kind} (ROUGE-L)" if found[0].endswith(HEADLINE) else kind
            table.add_row(title, "yes" if shown_to["works"] else "no", *cells)
    return table
