"""The report's section on what is left of facts inside the models, whatever they say. See `report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from duet.pipeline.pages.charts import Line, legend_of_lines, lines, side_by_side
from duet.pipeline.pages.page import Numbers, folded, note, pointer, row, section, table
from duet.pipeline.pages.results import by_interest, palette_of
from duet.stages.attacks.names import CONTROL
from duet.stages.metrics.depth import ID as DEPTH
from duet.stages.metrics.memorisation import EXCHANGED

TITLE = "Inside the models"
STRENGTH = "extraction_strength"
TEXT = (
    "A model that refuses may still hold the fact. Extraction strength: the share of an answer, from its end, that the model "
    "would say after the question and the rest of the answer; where nothing is left, it is what control and floor have. The "
    "floor is base on the same answers behind questions to be kept."
)
DEPTH_TEXT = (
    "Unlearning depth score: base reads question and answer while one layer at a time comes from the model. At zero the layers "
    "hold the fact as those of base do; at 100 points no more than those of the control, which never knew. Drawn is what base "
    "then loses of the fact's log-probability, by layer, mean with 95 % interval; a model that only hides a fact loses it in "
    "the last layers alone. What is below zero is drawn at zero."
)
CONTROL_COLOUR = "#7d4ea8"


def inside_section(numbers: Numbers) -> str:
    """Extraction strength and depth on the attacked sets, by model, beside control and floor; then depth layer by layer."""
    sets = [name for name in numbers.data["sets"] if numbers.at("floors", f"{name}.{STRENGTH}", EXCHANGED) is not None]
    depth = numbers.at("depth", "layers") or {}
    if not sets and not depth:
        return section("inside", TITLE, note("How likely given answers are was not measured in this run."))
    body = note(TEXT) + _strength(numbers, sets) if sets else ""
    return section("inside", TITLE, body + (_depth(numbers, depth) if depth else note("Depth was not measured.")))


def _strength(numbers: Numbers, sets: Sequence[str]) -> str:
    keys = [f"{name}.{STRENGTH}" for name in sets]
    rows = [row(m, [numbers.cell("score", "models", m, key) for key in keys]) for m in numbers.data["models"]]
    if any(numbers.at("control", key) for key in keys):
        rows.append(row(CONTROL, [numbers.cell("score", "control", key) for key in keys]))
    floor = "floor: behind other questions"
    rows.append(row(floor, [numbers.cell("points", "floors", key, EXCHANGED) for key in keys]))
    return table("Extraction strength in points [95 % interval], n answers", ["model", *map(escape, sets)], rows)


def _depth(numbers: Numbers, by_model: Mapping[str, Any]) -> str:
    names = list(numbers.at("depth", "sets"))
    keys = [f"{name}.{DEPTH}" for name in names]
    measured = [m for m in numbers.data["models"] if any(numbers.at("models", m, key) for key in keys)]
    scores = [row(m, [numbers.cell("score", "models", m, key) for key in keys]) for m in measured]
    shown = [m for m in (*by_interest(numbers), CONTROL) if m in by_model]
    palette = palette_of(numbers, shown) | ({CONTROL: CONTROL_COLOUR} if CONTROL in by_model else {})
    series = {model: _line(by_model[model], pointer("depth", "layers", model)) for model in palette}
    chart = lines(series, palette, ("layer", "lost, nats per token"), "What base loses to each model's layers")
    counted = ", ".join(
        f"{escape(name)} {' of '.join(numbers.show('count', 'depth', 'sets', name, key) for key in ('n', 'of'))}"
        for name in names
    )
    body = note(DEPTH_TEXT)
    body += table("Unlearning depth score in points [95 % interval], n answers", ["model", *map(escape, names)], scores)
    body += legend_of_lines(palette) + side_by_side([chart])
    body += f'<p class="note">Answers whose fact is known: {counted}.</p>' + _left_out(numbers)
    return body + folded("The losses in numbers", _losses(numbers, by_model))


def _line(facts: Mapping[str, Any], key: str) -> Line:
    bands = [[max(0.0, edge) for edge in band] for band in facts["ci95"]]
    return Line(facts["layers"], [max(0.0, value) for value in facts["lost"]], bands, key)


def _left_out(numbers: Numbers) -> str:
    found = numbers.at("depth", "left_out") or {}
    said = "; ".join(f"{escape(model)}, {numbers.show('text', 'depth', 'left_out', model)}" for model in found)
    return f'<p class="note">Not measured: {said}.</p>' if found else ""


def _losses(numbers: Numbers, by_model: Mapping[str, Any]) -> str:
    """Of all measured models, which have equally many layers."""
    rows = [
        row(f"layer {layer}", [_loss(numbers, "depth", "layers", model, at=at) for model in by_model])
        for at, layer in enumerate(next(iter(by_model.values()))["layers"])
    ]
    shown = [numbers.show("count", "depth", "layers", model, "n") for model in by_model]
    heads = [f"{escape(model)}<br>n = {count}" for model, count in zip(by_model, shown, strict=True)]
    return table("Loss in nats per token", ["", *heads], rows)


def _loss(numbers: Numbers, *path: str, at: int) -> str:
    loss, interval = numbers.show("plain", *path, "lost", at), numbers.show("interval-plain", *path, "ci95", at)
    return f'<td class="number">{loss} <small>{interval}</small></td>'
