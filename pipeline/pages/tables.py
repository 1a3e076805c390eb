"""The terminal's tables and lines: scores, verdicts, attacks and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from duet.cache.record import SUBSETS


def progress_note(line: Mapping[str, Any]) -> str:
    """The numbers of a line of metrics.jsonl that are worth watching."""
    subsets = [(name, line[f"loss_{name}"]) for name in SUBSETS]
    losses = ", ".join(f"{name} {loss:.3g}" for name, loss in subsets if loss is not None)
    return (
        f"loss {line['loss']:.3g} ({losses})  {line['tokens_per_s']:,.0f} tok/s  "
        f"stall {100 * line['stall_share']:.0f} %  {line['memory_gb']:.2f} GB"
    )


def loss_in_words(summary: Mapping[str, Any]) -> str:
    """A student's loss and, where the teacher has a name, whom it is against: `l1, mix of mild 0.75 and strict 0.25`."""
    weights = {name: facts["weight"] for name, facts in summary["teachers"].items()}
    if list(weights) == ["teacher"]:
        return summary["loss"]
    if not summary["combine"]:
        return f"{summary['loss']} of {next(iter(weights))}"
    return f"{summary['loss']}, {summary['combine']} of {' and '.join(f'{n} {w:.3g}' for n, w in weights.items())}"


def interval(score: Mapping[str, Any]) -> str:
    """A score in points with its 95 % interval: `93.3 [86.7, 100.0]`."""
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def results_table(results: dict[str, Any]) -> Table:
    """Models by rows; ROUGE-L recall per set, the worst reverse prompt and the performance shift by columns."""
    keys = {f"{name}.rougeL_recall": f"{name}\nn={info['n']}" for name, info in results["sets"].items()}
    for name, info in results["sets"].items():
        attack = f"attack.reverse_worst.{name}.rougeL_recall"
        if any(attack in scores for scores in results["models"].values()):
            keys[attack] = f"{name}, worst\nreverse prompt\nn={info['n']}"
    table = Table(title="ROUGE-L recall in points [95 % interval]", title_justify="left", caption_justify="left")
    table.add_column("model", no_wrap=True)
    for title in keys.values():
        table.add_column(title, justify="right")
    table.add_column("performance\nshift", justify="right")
    for model, scores in results["models"].items():
        shift = results["performance_shift"].get(model)
        cells = [interval(scores[key]) if key in scores else "-" for key in keys]
        table.add_row(model, *cells, f"{shift['value']:+.1f}" if shift else "-")
    for floor in ("refusal", "echo"):
        values = [results["floors"].get(key, {}).get(floor) for key in keys]
        table.add_row(
            f"[dim]floor: {floor}[/dim]", *(f"[dim]{100 * v:.1f}[/dim]" if v is not None else "" for v in values), ""
        )
    return table


def outcome_lines(results: dict[str, Any]) -> list[str]:
    """The verdict on each model, and what it rests on most; results.json has all reasons."""
    return [
        f"{model}: {outcome['verdict']} ({outcome['reasons'][0]})" for model, outcome in results["outcomes"].items()
    ]


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
    table = Table(
        title=f"What is asked of {num_models} models; what is on disk is not asked again", title_justify="left"
    )
    table.add_column("attack", no_wrap=True)
    for title in ("answers", "prompt tokens", "answer tokens, at most", "training steps"):
        table.add_column(title, justify="right")
    for kind, cost in costs.items():
        counts = (cost.prompts, cost.prompt_tokens, cost.answer_tokens, cost.training_steps)
        table.add_row(kind, *(f"{count:,}" for count in counts))
    return table


def attacks_table(results: dict[str, Any]) -> Table:
    """Attacks by rows, models by columns: what the worst variant per question brings back of the forget set, in points."""
    table = Table(
        title="Forget set under attack, in points: recall with the worst variant per question [95 % interval]",
        title_justify="left",
        caption="sampling: leak@k of the largest k; logit_lens: mean reciprocal rank. no: not shown to work on this model",
        caption_justify="left",
    )
    table.add_column("attack", no_wrap=True)
    table.add_column("works")
    for model in results["models"]:
        table.add_column(model, justify="right")
    first = next(iter(results["models"].values()))
    for kind, work in results["attacks_work"].items():
        begins = (
            f"attack.{kind}.forget.leak@",
            f"attack.{kind}.forget.mrr",
            f"attack.{kind}_worst.forget.rougeL_recall",
        )
        if found := [key for key in first if key.startswith(begins)]:
            cells = [interval(scores[found[-1]]) for scores in results["models"].values()]
            table.add_row(kind, "yes" if work["works"] else "no", *cells)
    return table
