"""The report's table of how far metrics agree with the judge. See `report.py`."""

from __future__ import annotations

from html import escape

from duet.pipeline.pages.page import Numbers, note, row, section, table

TEXT = (
    "A language model judged whether each answer states the fact of its reference (judged_right, under all scores). The "
    "AUC says how well a metric tells the answers that it calls right from the others, over all models and sets, in "
    "points of 100, of which half is chance."
)


def judge_section(numbers: Numbers) -> str:
    """The judge, its replies that could not be read, and the agreement of metrics with it; nothing without a judge."""
    found = numbers.at("judge") or {}
    if not found:
        return ""
    rows = [row(metric, [numbers.cell("score", "judge", "agreement", metric)]) for metric in found["agreement"]]
    unreadable = ", ".join(
        f"{escape(model)} {numbers.show('count', 'judge', 'unreadable', model)}" for model in found["unreadable"]
    )
    body = note(TEXT) + f"<p>Judge: {numbers.show('text', 'judge', 'model')}, "
    body += f"{numbers.show('count', 'judge', 'answers')} answers. Neither yes nor no: {unreadable}.</p>"
    if rows:
        body += table("AUC in points [95 % interval], n answers", ["metric", "AUC"], rows)
    else:
        body += note("All answers were judged alike, so agreement cannot be measured.")
    return section("judge", "The judge", body)
