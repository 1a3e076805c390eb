"""What the report's numbers rest on: training, what was run, known limits, definitions. See `report.py`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from duet.pipeline.pages.charts import curves, legend_of_lines, side_by_side
from duet.pipeline.pages.page import Numbers, folded, note, row, section, table
from duet.pipeline.pages.results import attacks_of, palette_of
from duet.pipeline.pages.tables import loss_in_words, noise_in_words, refusal_lines
from duet.stages.settings.attacks import ATTACKS

# What Duet does not try, whatever the settings.
NEVER_TRIED = (
    "prompts optimised against the model (GCG and its kin)",
    "conversations of several turns",
    "steering or patching of inner activations",
    "pruning and merging of weights",
    "probes trained on inner activations",
    "a person who tries for a day",
)


def training_section(numbers: Numbers) -> str:
    """The students' losses by step, and what training took."""
    students = numbers.at("students") or {}
    title = "Training"
    if not students:
        return section("training", title, note("No student was trained in this run."))
    curve = {f"student:{name}": info["curve"] for name, info in students.items()}
    palette = palette_of(numbers, curve)
    palette |= {model: "#8a8f98" for model in curve if model not in palette}
    facts = "".join(_trained(numbers, name) for name in students)
    chart = side_by_side([curves(curve, palette, "Training loss by step")])
    return section("training", title, legend_of_lines(palette) + chart + f'<ul class="note">{facts}</ul>')


def _trained(numbers: Numbers, name: str) -> str:
    info, path = numbers.data["students"][name], ("students", name)

    def said(form: str, key: str) -> str:
        return numbers.show(form, *path, key)

    weights = {teacher: facts["weight"] for teacher, facts in info["teachers"].items()}
    loss = loss_in_words(info["loss"], info["combine"], weights)
    early = ", stopped early," if info["stopped_early"] else ""
    return (
        f"<li>{escape(name)}: {escape(loss)} ({escape(info['loss_reason'])}), {said('count', 'steps')} "
        f"steps{early} over {said('count', 'rows')} rows in {said('plain', 'train_s')} s "
        f"({said('plain', 'rows_per_s')} rows/s, {said('points', 'stall_share')} % of it waiting for the store), "
        f"{said('count', 'trained_parameters')} of {said('count', 'parameters')} parameters trained, "
        f"from {said('text', 'model')}{noise_in_words(info.get('start_noise'))}</li>"
    )


def run_section(numbers: Numbers) -> str:
    """Hashes, versions, seeds and settings: what identifies a run, and what it takes to repeat it."""
    stores = numbers.at("teacher_stores") or {}
    titles = {name: "Teacher logits" if len(stores) == 1 else f"Logits of teacher {name}" for name in stores}
    body = _data_table(numbers) + _weights_table(numbers)
    body += "".join(f"<h3>{escape(titles[name])}</h3>{numbers.facts('teacher_stores', name)}" for name in stores)
    for title, *path in (("Seeds", "provenance", "seeds"), ("Versions", "environment")):
        if numbers.at(*path):
            body += f"<h3>{title}</h3>{numbers.facts(*path)}"
    if numbers.at("provenance", "config_sha256"):
        body += f'<p class="note">sha256 of the settings: {numbers.show("text", "provenance", "config_sha256", tag="code")}</p>'
        body += folded("All settings", _settings(numbers, ("provenance", "config")))
    elif numbers.at("evaluate"):
        body += folded("Settings of the evaluation", numbers.facts("evaluate"))
    if numbers.at("refusals"):
        body += folded("What refusals are counted with", _settings(numbers, ("refusals",)))
    return section("run", "What was run", body)


def _data_table(numbers: Numbers) -> str:
    rows = [
        row(name, [numbers.cell("count", "provenance", "data", name, "rows"), _hash(numbers, "data", name, "sha256")])
        for name in numbers.at("provenance", "data") or {}
    ]
    caption = "Questions: sha256 over id, question and answer of each row, as asked"
    lack = note("These results hold no hashes of the data.")
    return table(caption, ["set", "rows", "sha256"], rows, ("sha256",)) if rows else lack


def _weights_table(numbers: Numbers) -> str:
    rows = []
    for model, facts in (numbers.at("provenance", "models") or {}).items():
        prefixes = [key for key in facts if key.startswith("prefix_sha256")]
        shown = [_hash(numbers, "models", model, key, tag="div") for key in prefixes]
        rows.append(row(model, [_hash(numbers, "models", model, "weights_sha256"), f"<td>{''.join(shown)}</td>"]))
    if not rows:
        return note("These results hold no hashes of the weights.")
    caption = "Models: sha256 of config and weights, and of the prefix"
    return table(caption, ["model", "weights", "prefix"], rows, ("weights", "prefix"))


def _hash(numbers: Numbers, *path: str, tag: str = "td") -> str:
    return numbers.show("text", "provenance", *path, tag=tag, css="hash")


def _settings(numbers: Numbers, path: tuple[str | int, ...]) -> str:
    """Nested settings as nested lists; a list's entries by their number."""
    node: Any = numbers.at(*path)
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    parts = []
    for key, value in items:
        nested = isinstance(value, Mapping | list) and value
        shown = f"<dd>{_settings(numbers, (*path, key))}</dd>" if nested else numbers.show("text", *path, key, tag="dd")
        parts.append(f"<dt>{escape(str(key))}</dt>{shown}")
    return f'<dl class="settings">{"".join(parts)}</dl>'


def limits_section(numbers: Numbers) -> str:
    """What these numbers do not show."""
    sets = numbers.data["sets"]
    smallest = min(sets, key=lambda name: sets[name]["n"]) if sets else None
    items = [
        *(numbers.at("remarks") or ()),
        "Suppressed under these tests is all that can be said: what no test here brings back may still be in the weights.",
        "Another wording, language or attack may find what these questions did not.",
    ]
    body = [f"<li>{escape(item)}</li>" for item in items]
    if smallest is not None:
        body.append(
            f"<li>Few questions: {escape(smallest)} has {numbers.show('count', 'sets', smallest, 'n')}. Where all of them turn "
            f"out alike, up to {numbers.show('rule-of-three', 'sets', smallest, 'n')} of all such questions may still turn out "
            "otherwise (rule of three, 95 %).</li>"
        )
    rest = (
        "Intervals say how much the scores depend on which questions were drawn. They do not cover another training seed, "
        "another data set or another machine.",
        "ROUGE-L recall counts words that answer and reference share. It misses an answer in other words, and gives points to "
        "common words: read it beside its floor. Refusals are found by a list of expressions, in the languages that it knows.",
        "A student learns what its teacher says; what the teacher does not forget, it cannot.",
    )
    body += [f"<li>{escape(item)}</li>" for item in rest]
    body += [f"<li>{escape(line)}</li>" for line in refusal_lines(numbers.data)]
    body += [f"<li>{item}</li>" for item in _not_tried(numbers)]
    return section("limits", "Known limits", f"<ul>{''.join(body)}</ul>")


def _not_tried(numbers: Numbers) -> list[str]:
    """The attacks that were not tried, by title, and why, where the results say so."""
    tried = {attack.kind.partition(".")[0] for attack in attacks_of(numbers)}
    tried |= {kind for kind, part in (("relearn", "relearning"), ("logit_lens", "layers")) if numbers.at(part)}
    missing = [attack.title for kind, attack in ATTACKS.items() if kind not in tried]
    found = [f"Not tried in this run: {escape(', '.join(missing))}."] if missing else []
    found += [
        f"{escape(what)}: {numbers.show('text', 'attacks_skipped', what)}"
        for what in numbers.at("attacks_skipped") or {}
    ]
    return [*found, f"Never tried by Duet, whatever the settings: {escape('; '.join(NEVER_TRIED))}."]


def definitions_section(numbers: Numbers) -> str:
    """Every metric's definition, with its version where it has one."""
    parts = []
    for metric in numbers.at("definitions") or {}:
        version = numbers.at("versions", metric)
        name = escape(metric) + (f"@{numbers.show('text', 'versions', metric)}" if version is not None else "")
        parts.append(f"<dt>{name}</dt>{numbers.show('text', 'definitions', metric, tag='dd')}")
    return section("definitions", "What the numbers mean", f"<dl>{''.join(parts)}</dl>")
