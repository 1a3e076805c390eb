"""What lies deeper in the report: layers, paired comparisons, sample answers. See `report.py`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from duet.pipeline.pages.charts import Line, legend_of_lines, lines, side_by_side
from duet.pipeline.pages.page import Numbers, folded, note, pointer, row, section, table
from duet.pipeline.pages.results import HEADLINE, by_interest, is_share, palette_of

OPEN_SAMPLES = 10  # the others are folded

# Shows the search field, which does nothing without a script, and filters the samples by what is typed.
SCRIPT = """
(() => {
  const box = document.getElementById("search"), count = document.getElementById("found");
  if (!box) return;
  const samples = [...document.querySelectorAll(".sample")], more = document.getElementById("more-samples");
  const wasOpen = more && more.open;
  box.parentElement.hidden = false;
  box.addEventListener("input", () => {
    const wanted = box.value.trim().toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      sample.hidden = !sample.textContent.toLowerCase().includes(wanted);
      shown += !sample.hidden;
    }
    if (more) more.open = wanted ? true : wasOpen;
    count.textContent = wanted ? `${shown} of ${samples.length}` : "";
  });
})();
"""


def layers_section(numbers: Numbers) -> str:
    """The logit lens: how far up the answer's first token stands when the head reads each layer."""
    found = {m: numbers.at("layers", m) for m in by_interest(numbers) if numbers.at("layers", m)}
    title = "Layer by layer"
    if not found:
        return section("layers", title, note("The inner layers were not looked at in this run."))
    text = (
        "Mean rank of the answer's first token on the forget questions when the output head reads each layer, with 95 % "
        "intervals; rank 1 is the most likely. A low rank in a layer below the last says that the model still finds the answer "
        "and that the layers after it hide it."
    )
    palette = palette_of(numbers, found)
    series = {
        model: Line(facts["layers"], facts["rank"], facts.get("ci95") or (), pointer("layers", model))
        for model, facts in found.items()
    }
    asked = ", ".join(f"{escape(model)} {numbers.show('count', 'layers', model, 'n')}" for model in found)
    chart = lines(series, palette, ("layer", "mean rank"), "Rank of the answer's first token")
    body = note(text) + legend_of_lines(palette) + side_by_side([chart]) + f'<p class="note">n: {asked}.</p>'
    body += folded("The ranks in numbers", _layers_table(numbers, found))
    return section("layers", title, body)


def _layers_table(numbers: Numbers, found: Mapping[str, Any]) -> str:
    depths = sorted({layer for facts in found.values() for layer in facts["layers"]})
    rows = []
    for depth in depths:
        cells = []
        for model, facts in found.items():
            at = facts["layers"].index(depth) if depth in facts["layers"] else None
            shown = at is not None
            cells.append(numbers.cell("plain", "layers", model, "rank", at) if shown else '<td class="number">-</td>')
        rows.append(row(f"layer {depth}", cells))
    return table("Mean rank of the answer's first token", ["", *map(escape, found)], rows)


def comparisons_section(numbers: Numbers) -> str:
    """Paired differences from the base; the headline scores first, the others folded."""
    found = numbers.at("comparisons") or {}
    title = "Is it a difference?"
    if not found:
        return section("comparisons", title, note("These results hold no paired comparisons."))
    text = (
        "The same questions asked of two models, compared question by question. Not distinguishable means that these questions "
        "cannot tell the two apart, not that they are equal."
    )
    body = note(text)
    for model, by_metric in found.items():
        first = [key for key in by_metric if key.endswith(f".{HEADLINE}") and not key.startswith("attack.")]
        others = [key for key in by_metric if key not in first]
        body += f"<h3>{escape(model)}</h3>" + _comparison_table(numbers, model, first)
        if others:
            body += folded("The other metrics", _comparison_table(numbers, model, others))
    return section("comparisons", title, body)


def _comparison_table(numbers: Numbers, model: str, metric_ids: list[str]) -> str:
    rows = []
    for metric_id in metric_ids:
        path = ("comparisons", model, metric_id)
        share = is_share(numbers, metric_id)
        rows.append(
            row(
                metric_id,
                [
                    numbers.show("text", *path, "against", tag="td"),
                    numbers.cell("signed" if share else "plain", *path, "difference"),
                    numbers.cell("interval" if share else "interval-plain", *path, "ci95"),
                    numbers.cell("p", *path, "p"),
                    numbers.cell("count", *path, "n"),
                    f"<td>{_in_words(numbers.at(*path))}</td>",
                ],
            )
        )
    heads = ["metric", "against", "difference", "95 % interval", "p", "n", "in words"]
    return table("Model less the one it is compared with; shares in points", heads, rows, ("against", "in words"))


def _in_words(comparison: Mapping[str, Any]) -> str:
    if not comparison["distinguishable"]:
        return "not distinguishable"
    return "lower" if comparison["difference"] < 0 else "higher"


def samples_section(numbers: Numbers) -> str:
    """Questions with every model's answer side by side, and a field to search them."""
    samples = [_sample(numbers, number) for number in range(len(numbers.at("samples") or []))]
    search = (
        '<p class="search" hidden><label for="search">Search in questions and answers</label> '
        '<input id="search" type="search" autocomplete="off"> <output id="found" for="search"></output></p>'
    )
    body = note("Drawn evenly from the query sets by the seed, not by how they turned out.") + search
    body += "".join(samples[:OPEN_SAMPLES])
    if more := samples[OPEN_SAMPLES:]:
        body += f'<details id="more-samples"><summary>More samples</summary>{"".join(more)}</details>'
    return section("samples", "Sample answers", body if samples else note("No samples were kept."))


def _sample(numbers: Numbers, number: int) -> str:
    sample, path = numbers.data["samples"][number], ("samples", number)
    outputs = "".join(
        f"<div><dt>{escape(model)}</dt>{numbers.show('text', *path, 'outputs', model, tag='dd')}</div>"
        if text
        else f"<div><dt>{escape(model)}</dt><dd><em>(empty)</em></dd></div>"
        for model, text in sample["outputs"].items()
    )
    return (
        f'<div class="sample">{numbers.show("text", *path, "set", css="tag")}'
        f"<p>{numbers.show('text', *path, 'question', tag='strong')}</p>"
        f"<dl><div><dt>reference</dt>{numbers.show('text', *path, 'answer', tag='dd')}</div>{outputs}</dl></div>"
    )
