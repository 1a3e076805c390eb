"""The report's verdict, main table, trade-off and list of every score. See `report.py`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from duet.pipeline.pages.charts import Dot, colours, scatter, side_by_side
from duet.pipeline.pages.page import Numbers, folded, legend, note, pointer, row, section, table
from duet.pipeline.pages.results import (
    HEADLINE,
    base_of,
    by_interest,
    is_share,
    metric_ids,
    set_and_metric,
    students_of,
    worst_attack,
    worst_held_out,
)
from duet.stages.attacks.names import CONTROL, Attacked
from duet.stages.exam.exam import DISTINCTIVE
from duet.stages.metrics.memorisation import EXCHANGED

GOOD_VERDICTS = ("withstands these tests", "suppressed under these tests")
# Of a text score the first two, of a choice the third, of memorisation the last.
FLOORS = ("refusal", "echo", "chance", EXCHANGED)
BAD_VERDICTS = ("not unlearned", "damaged", "suppressed until attacked", "broken")


def summary(numbers: Numbers) -> str:
    """What happened, in sentences made from the numbers."""
    students = students_of(numbers)
    if not students:
        return "No student was evaluated."
    student, key = students[0], f"forget.{HEADLINE}"
    teachers = "".join(
        f"{_teacher(numbers, name)} {_brief(numbers, name, key)}, "
        for name in numbers.data["models"]
        if name.split(":")[0] == "teacher"
    )
    sentences = [
        f"Asked about the topic, the base model recalls {_brief(numbers, base_of(numbers, student), key)} of 100 points of the "
        f"reference answers, {teachers}and {escape(student)}, which never sees a prefix, {_brief(numbers, student, key)}."
    ]
    for name, info in numbers.data["sets"].items():
        before, after = (("models", model, f"{name}.{HEADLINE}") for model in (base_of(numbers, student), student))
        if info["expect"] == "kept" and numbers.at(*before) and numbers.at(*after):
            sentences.append(
                f"On {escape(name)} questions it has {numbers.show('score-brief', *after)}, before "
                f"{numbers.show('points', *before, 'value')}."
            )
    if worst := worst_held_out(numbers, student, "forget"):
        beside = f", of a model that never knew {control}" if (control := _control(numbers, worst)) else ""
        what = "facts" if worst.metric == DISTINCTIVE else "ROUGE-L recall"
        sentences.append(
            f"The attack that brings most back, {escape(worst.kind)}, brings back {_brief(numbers, student, worst.id)} "
            f"({what}){beside}."
        )
    return " ".join([*sentences, "In brackets: 95 % intervals."])


def _control(numbers: Numbers, attack: Attacked) -> str:
    """What the attack brings out of the control, in points; nothing where there is none."""
    return numbers.show("points", "control", attack.id, "value") if numbers.at("control", attack.id) else ""


def _teacher(numbers: Numbers, name: str) -> str:
    """`the prefixed teacher`, or that it has none."""
    facts = numbers.at("provenance", "models", name) or {}
    bare = facts and not any(key.startswith("prefix_sha256") for key in facts)
    return f"{escape(name)}, a model without a prefix," if bare else f"the prefixed {escape(name)}"


def _brief(numbers: Numbers, model: str, key: str) -> str:
    if numbers.at("models", model, key) is None:
        return "(not measured)"
    return numbers.show("score-brief", "models", model, key)


def verdict_section(numbers: Numbers) -> str:
    """A card for each student, and a line for every other model."""
    students = students_of(numbers)
    cards = "".join(_card(numbers, student) for student in students)
    outcomes = numbers.at("outcomes") or {}
    if not outcomes:
        lack = note("These results hold no verdict: read the numbers.")
        return section("verdict", "Verdict", lack + f'<div class="cards">{cards}</div>')
    others = "".join(
        f"<dt>{escape(model)}</dt><dd>{numbers.show('text', 'outcomes', model, 'verdict', tag='strong')}"
        f"{_reasons(numbers, model)}{_measures(numbers, model)}{_signs(numbers, model)}</dd>"
        for model in outcomes
        if model not in students
    )
    rest = folded("The models it is compared with", f"<dl>{others}</dl>") if others else ""
    return section("verdict", "Verdict", f'<div class="cards">{cards}</div>{rest}')


def _card(numbers: Numbers, model: str) -> str:
    outcome = numbers.at("outcomes", model)
    verdict = outcome["verdict"] if outcome else None
    tone = "good" if verdict in GOOD_VERDICTS else "bad" if verdict in BAD_VERDICTS else "unclear"
    badge = numbers.show("text", "outcomes", model, "verdict", tag="p", css="badge") if outcome else ""
    base = base_of(numbers, model)
    figures = "".join(
        f"<dt>{escape(name)}, to be {escape(info['expect'])}</dt><dd>{numbers.show('points', 'models', base, key, 'value')} "
        f"&rarr; {numbers.show('points', 'models', model, key, 'value', tag='strong')}</dd>"
        for name, info in numbers.data["sets"].items()
        if numbers.at("models", model, key := f"{name}.{HEADLINE}")
    )
    for name in numbers.data["sets"]:
        if worst := worst_held_out(numbers, model, name):
            score = numbers.show("points", "models", model, worst.id, "value", tag="strong")
            beside = f"; never knew {control}" if (control := _control(numbers, worst)) else ""
            what = ", facts" if worst.metric == DISTINCTIVE else ""
            figures += f"<dt>{escape(name)}, worst attack ({escape(worst.kind)}{what})</dt><dd>{score}{beside}</dd>"
    return (
        f'<article class="verdict {tone}"><h3>{escape(model)}</h3>{badge}{_reasons(numbers, model) if outcome else ""}'
        f'<p class="note">ROUGE-L recall in points, from {escape(base)} to {escape(model)}</p>'
        f"<dl>{figures}</dl>{_measures(numbers, model)}{_signs(numbers, model)}</article>"
    )


def _reasons(numbers: Numbers, model: str) -> str:
    reasons = numbers.at("outcomes", model, "reasons") or []
    path = ("outcomes", model, "reasons")
    return (
        f"<ul>{''.join(numbers.show('text', *path, i, tag='li') for i in range(len(reasons)))}</ul>" if reasons else ""
    )


def _measures(numbers: Numbers, model: str) -> str:
    """Which scores the verdict was made of."""
    measures = numbers.at("outcomes", model, "measures") or {}
    lines = [f"to be {what}: {', '.join(keys) or 'none'}" for what, keys in measures.items()]
    return note(f"Measured for it, beside attacks: {'; '.join(lines)}.") if lines else ""


def _signs(numbers: Numbers, model: str) -> str:
    signs = numbers.at("outcomes", model, "signs") or {}
    rows = [
        row(
            sign,
            [
                *(numbers.cell("plain", "outcomes", model, "signs", sign, key) for key in ("value", "limit")),
                f'<td class="number">{"bad" if facts.get("bad") else "fine"}</td>',
            ],
        )
        for sign, facts in signs.items()
    ]
    return folded("Signs that were looked at", table("", ("sign", "value", "limit", ""), rows)) if rows else ""


def main_table(numbers: Numbers) -> str:
    """Models by rows; the headline score of each set, the worst attack and the shift by columns."""
    sets = numbers.data["sets"]
    keys = [f"{name}.{HEADLINE}" for name in sets]
    attacked = [name for name in sets if any(worst_attack(numbers, m, name) for m in numbers.data["models"])]
    heads = [
        "model",
        *(f"{escape(n)}<br>to be {escape(i['expect'])}" for n, i in sets.items()),
        *(f"{escape(name)}<br>worst attack" for name in attacked),
        "performance<br>shift",
    ]
    rows = []
    for model in numbers.data["models"]:
        cells = [numbers.cell("score", "models", model, key) for key in keys]
        for name in attacked:
            worst = worst_attack(numbers, model, name)
            cells.append(numbers.cell("score", "models", model, worst.id) if worst else '<td class="number">-</td>')
        cells.append(numbers.cell("signed-points", "performance_shift", model, "value"))
        rows.append(row(model, cells))
    for floor, words in (("refusal", "floor: constant refusal"), ("echo", "floor: echoed question")):
        cells = [numbers.cell("points", "floors", key, floor) for key in keys]
        rows.append(row(words, [*cells, *['<td class="number"></td>'] * (len(attacked) + 1)]))
    caption = "ROUGE-L recall in points of 100 [95 % interval], n questions; under the worst attack facts, if they are counted."
    shift = numbers.at("definitions", "performance_shift")
    meaning = (
        f'<p class="note">Performance shift: {numbers.show("text", "definitions", "performance_shift")}</p>'
        if shift
        else ""
    )
    return section("scores", "Before and after", table(caption, heads, rows) + meaning + _shift_terms(numbers))


def _shift_terms(numbers: Numbers) -> str:
    shifts = numbers.at("performance_shift") or {}
    terms = list(dict.fromkeys(term for shift in shifts.values() for term in shift["terms"]))
    rows = [
        row(model, [numbers.cell("signed-points", "performance_shift", model, "terms", term) for term in terms])
        for model in shifts
    ]
    heads = ["model", *(escape(term.rsplit(".", 1)[0]) for term in terms)]
    caption = "Points gained over the model's own base"
    return folded("What the performance shift is the sum of", table(caption, heads, rows)) if rows else ""


def trade_off(numbers: Numbers) -> str:
    """What is left of the topic against what is left of everything else, a panel for each set that is to be kept."""
    sets = numbers.data["sets"]
    gone = next((name for name, info in sets.items() if info["expect"] == "forgotten"), None)
    panels = [_trade_off_panel(numbers, gone, kept) for kept, info in sets.items() if gone and info["expect"] == "kept"]
    if not panels:
        return section(
            "trade-off", "Forgetting against damage", note("It takes a set to be forgotten and one to be kept.")
        )
    text = (
        "ROUGE-L recall in points with 95 % intervals. The base model stands in the upper right corner, good forgetting in the "
        "upper left; what falls is damage."
    )
    body = note(text) + side_by_side(panels) + (_traded(numbers, gone) if gone else "")
    return section("trade-off", "Forgetting against damage", body)


def _trade_off_panel(numbers: Numbers, gone: str, kept: str) -> str:
    palette, dots = colours(list(numbers.data["models"])), {}
    for model in by_interest(numbers):
        ids = [f"{name}.{HEADLINE}" for name in (gone, kept)]
        x, y = (numbers.at("models", model, key) for key in ids)
        if x and y:
            keys = [pointer("models", model, key) for key in ids]
            dots[model] = Dot(x["value"], y["value"], x["ci95"], y["ci95"], keys, _shape(model))
    return scatter(dots, palette, (f"{gone}, points", f"{kept}, points"), f"{gone} against {kept}")


def _shape(model: str) -> str:
    """Of a model's dot, by its kind."""
    return {"base": "square", "teacher": "triangle", "student": "circle"}.get(model.partition(":")[0], "diamond")


def _traded(numbers: Numbers, gone: str) -> str:
    """The same under attack: what was traded, a panel for each set to be kept, and the attacks that it rests on."""
    worst = {model: worst_held_out(numbers, model, gone) for model in by_interest(numbers)}
    tried = {model: attack for model, attack in worst.items() if attack}
    kept = [name for name, info in numbers.data["sets"].items() if info["expect"] == "kept"]
    if not tried:
        return ""
    panels = [_traded_panel(numbers, gone, tried, name) for name in kept]
    text = (
        "The same under attack: to the right, what the worst attack brings back of a model, of those on whose texts it was not "
        "trained, with the worst variant for each question; upwards, what is left of a set to be kept. Students are circles, "
        "teachers triangles, base models squares."
    )
    line = " The dashed line is the control, a model that never knew, under the attack that brings most out of it."
    control = worst_held_out(numbers, CONTROL, gone)
    rows = [
        row(model, [f'<td class="text">{escape(attack.kind)}</td>', numbers.cell("score", "models", model, attack.id)])
        for model, attack in tried.items()
    ]
    if control:
        rows.append(
            row(
                CONTROL, [f'<td class="text">{escape(control.kind)}</td>', numbers.cell("score", "control", control.id)]
            )
        )
    what = "Distinctive recall" if next(iter(tried.values())).metric == DISTINCTIVE else "ROUGE-L recall"
    heads = ["model", "worst attack", f"{gone}, under it"]
    listed = table(f"{what} in points [95 % interval], n questions", heads, rows, ("worst attack",))
    return (
        note(text + (line if control else "")) + side_by_side(panels) + folded("The worst attack on each model", listed)
    )


def _traded_panel(numbers: Numbers, gone: str, worst: Mapping[str, Attacked], kept: str) -> str:
    palette, dots, key = colours(list(numbers.data["models"])), {}, f"{kept}.{HEADLINE}"
    for model, attack in worst.items():
        x, y = numbers.at("models", model, attack.id), numbers.at("models", model, key)
        if y:
            keys = [pointer("models", model, attack.id), pointer("models", model, key)]
            dots[model] = Dot(x["value"], y["value"], x["ci95"], y["ci95"], keys, _shape(model))
    control = worst_held_out(numbers, CONTROL, gone)
    upright = control and (CONTROL, numbers.at("control", control.id, "value"), pointer("control", control.id))
    axes = (f"{gone} under the worst attack, points", f"{kept}, points")
    return scatter(dots, palette, axes, f"{gone} under attack against {kept}", upright)


def all_scores(numbers: Numbers) -> str:
    """Every score of every model."""
    models = numbers.data["models"]
    rows, group = [], None
    for metric_id in metric_ids(numbers):
        name, metric = set_and_metric(numbers, metric_id)
        if name != group:
            group = name
            rows.append(
                f'<tr class="set"><th scope="rowgroup" colspan="{len(models) + 1 + len(FLOORS)}">{escape(name)}</th></tr>'
            )
        form = "score" if is_share(numbers, metric_id) else "score-plain"
        cells = [numbers.cell(form, "models", model, metric_id) for model in models]
        floors: Any = [numbers.cell("points", "floors", metric_id, floor) for floor in FLOORS]
        rows.append(
            row(metric, [*cells, *(floors if numbers.at("floors", metric_id) else ["<td></td>"] * len(FLOORS))])
        )
    heads = ["metric", *map(escape, models), *(f"floor:<br>{floor}" for floor in FLOORS)]
    caption = "Shares in points [95 % interval], n questions; other numbers as they are."
    body = legend(colours(list(models))) + folded("All metrics of all models", table(caption, heads, rows))
    return section("all-scores", "Every score", body)
