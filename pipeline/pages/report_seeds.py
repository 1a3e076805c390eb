"""The report's rows over training seeds. See `report.py`."""

from __future__ import annotations

from html import escape

from duet.pipeline.pages.page import Numbers, folded, note, row, section, table
from duet.pipeline.pages.results import HEADLINE
from duet.stages.exam.exam import DISTINCTIVE

TEXT = (
    "Students that differ in their training seed alone, as one row: means over seeds and questions, with intervals over both: "
    "how far another seed and other questions would move the number."
)


def seeds_section(numbers: Numbers) -> str:
    """A row for each student that was trained with several seeds; nothing where there is none."""
    found = numbers.at("over_seeds") or {}
    if not found:
        return ""
    keys = [
        f"{name}.{metric}"
        for name in numbers.data["sets"]
        for metric in (HEADLINE, DISTINCTIVE)
        if any(f"{name}.{metric}" in of["scores"] for of in found.values())
    ]
    rows = [
        row(
            model,
            [
                *(numbers.cell("score", "over_seeds", model, "scores", key) for key in keys),
                f"<td>{', '.join(_verdict(numbers, model, verdict) for verdict in of['verdicts'])}</td>",
            ],
        )
        for model, of in found.items()
    ]
    heads = ["model", *(escape(key).replace(".", ".<wbr>") for key in keys), "verdicts"]
    body = note(TEXT) + table("Scores in points [95 % interval], n questions", heads, rows, ("verdicts",))
    body += folded("Every score, and that of each seed", "".join(_all_scores(numbers, model) for model in found))
    return section("over-seeds", "Over seeds", body)


def _verdict(numbers: Numbers, model: str, verdict: str) -> str:
    return f"{escape(verdict)} {numbers.show('count', 'over_seeds', model, 'verdicts', verdict)}"


def _all_scores(numbers: Numbers, model: str) -> str:
    of = numbers.at("over_seeds", model)
    rows = [
        row(
            key,
            [
                numbers.cell("score-plain", "over_seeds", model, "scores", key),
                *(
                    numbers.cell("plain", "over_seeds", model, "scores", key, "seeds", at)
                    for at in range(len(of["models"]))
                ),
            ],
        )
        for key in of["scores"]
    ]
    return table(model, ["metric", "over seeds", *map(escape, of["models"])], rows)
