"""The report's relearning: how much comes back while copies are trained, beside a model that never knew. See `report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from duet.pipeline.pages.charts import Line, legend_of_lines, lines, side_by_side
from duet.pipeline.pages.page import Numbers, note, pointer, row, section, table
from duet.pipeline.pages.results import by_interest, palette_of
from duet.stages.exam.exam import DISTINCTIVE

TITLE = "Relearning"
TEXT = (
    "Recall on the forget questions, in points with 95 % intervals, while the model is fine-tuned on a few of them, or on text "
    "that has nothing to do with them (benign, other). Drawn is distinctive recall, which counts facts and not the form of "
    "answers, where the results have it; at each number of steps the learning rate counts that brings back most. What was only "
    "hidden comes back after fewer steps than a model needs that never knew (the control)."
)


def relearning_section(numbers: Numbers) -> str:
    """How quickly a model relearns what it was to forget, one panel per kind of data."""
    models = by_interest(numbers)
    models += [m for m in numbers.at("relearning") or {} if m not in models]  # a control is not one of the models
    found = {m: numbers.at("relearning", m) for m in models if numbers.at("relearning", m)}
    if not found:
        return section("relearning", TITLE, note("Relearning was not tried in this run."))
    palette = palette_of(numbers, found)
    palette |= dict(zip((m for m in found if m not in palette), ("#7d4ea8", "#a8431a"), strict=False))
    kinds = list(dict.fromkeys(kind for by_kind in found.values() for kind in by_kind))
    panels = [
        lines(
            {m: _relearnt(numbers, m, kind) for m, by_kind in found.items() if kind in by_kind},
            palette,
            ("steps", "recall, points"),
            f"trained on: {kind}",
            top=100,
        )
        for kind in kinds
    ]
    body = note(TEXT) + legend_of_lines(palette) + side_by_side(panels) + _half(numbers, found, kinds)
    return section("relearning", TITLE, body + _beside(numbers, found, kinds))


def _half(numbers: Numbers, found: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """Steps until half of base's recall is back, distinctive where it was measured."""
    rows = []
    for model, by_kind in found.items():
        cells = []
        for kind in kinds:
            key = "to_half" if "to_half" in by_kind.get(kind, {}) else "steps_to_half"
            if by_kind.get(kind, {}).get(key) is not None:
                cells.append(numbers.cell("count", "relearning", model, kind, key))
            else:
                cells.append(f'<td class="number">{"not reached" if kind in by_kind else "-"}</td>')
        rows.append(row(model, cells))
    return table("Steps until half of the base model's recall is back", ["model", *map(escape, kinds)], rows)


def _beside(numbers: Numbers, found: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """How far a model's curve rises above the control's, and how many of the control's steps it takes to half."""
    rows = [
        row(
            f"{model}, {kind}",
            [
                numbers.cell("signed", "relearning", model, kind, "above_control"),
                numbers.cell("count", "relearning", model, kind, "above_control_steps"),
                numbers.cell("plain", "relearning", model, kind, "steps_ratio")
                if by_kind[kind]["steps_ratio"] is not None
                else '<td class="number">-</td>',
            ],
        )
        for model, by_kind in found.items()
        for kind in kinds
        if "above_control" in by_kind.get(kind, {})
    ]
    heads = ["model, trained on", "most above the control", "after steps", "steps to half, as a share of the control's"]
    return table("Distinctive recall beside the control's, in points", heads, rows) if rows else ""


def _relearnt(numbers: Numbers, model: str, kind: str) -> Line:
    facts = numbers.at("relearning", model, kind)
    key, edges = (DISTINCTIVE, f"{DISTINCTIVE}_ci95") if DISTINCTIVE in facts else ("recall", "ci95")
    bands = [[100 * edge for edge in band] for band in facts.get(edges) or ()]
    return Line(facts["steps"], [100 * share for share in facts[key]], bands, pointer("relearning", model, kind))
