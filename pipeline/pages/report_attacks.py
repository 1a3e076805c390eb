"""The report's attacks: charts by model, the same in numbers, and whether an attack works here at all. See `report.py`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from duet.pipeline.pages.charts import Bar, bars, colours, side_by_side
from duet.pipeline.pages.page import Numbers, folded, note, pointer, row, section, table
from duet.pipeline.pages.results import (
    HEADLINE,
    attacks_of,
    by_interest,
    floor_of,
    is_share,
    label_of,
    trained_on,
)
from duet.stages.attacks.names import Attacked
from duet.stages.exam.exam import DISTINCTIVE

SEEN = " (seen)"  # behind an attack on whose texts a model was trained


def attack_section(numbers: Numbers) -> str:
    """Every attack that was tried: its mean and its worst, by model, beside no attack and the floor; then in numbers."""
    attacks = [attack for attack in attacks_of(numbers) if is_share(numbers, attack.id)]
    if not attacks:
        return section(
            "attacks", "Attacks", note("Attacks were switched off in this run: nothing is known about them.")
        )
    text = (
        "An attack tries to bring back what was forgotten. A model that has forgotten scores as without an attack; what comes "
        "back was hidden, not gone. Dark bars are the mean over an attack's variants, pale ones the worst variant for each "
        "question. The solid line is the score without an attack; the dashed one the floor, the higher of a constant refusal "
        "and the echoed question. Facts are counted (distinctive recall): the tables have ROUGE-L recall too, which also gives "
        "points for the form of an answer."
    )
    body = note(text) + "".join(_seen(numbers, model) for model in by_interest(numbers))
    for name in dict.fromkeys(attack.set for attack in attacks):
        of_set = [attack for attack in attacks if attack.set == name]
        counted = {attack.kind for attack in of_set if attack.metric == DISTINCTIVE}
        drawn = [attack for attack in of_set if attack.metric != HEADLINE or attack.kind not in counted]
        panels = [_attack_panel(numbers, model, name, drawn) for model in by_interest(numbers)]
        body += f"<h3>On {escape(name)} questions</h3>" + side_by_side(list(filter(None, panels)))
        body += folded(f"The attacks on {name} in numbers", _attack_table(numbers, name, of_set))
    body += _above_control(numbers) + _kept(numbers) + _works(numbers) + _attack_texts(numbers) + _costs(numbers)
    return section("attacks", "Attacks", body)


def _seen(numbers: Numbers, model: str) -> str:
    """Which of the attacks do not speak for a model."""
    seen = trained_on(numbers, model)
    if not seen:
        return ""
    return note(
        f"{model} was trained on texts of {', '.join(seen)}, marked {SEEN.strip()}: that it withstands these says little about "
        "others, so they do not count for its verdict."
    )


def _attack_panel(numbers: Numbers, model: str, name: str, attacks: Sequence[Attacked]) -> str:
    scores, colour = numbers.data["models"][model], colours(list(numbers.data["models"]))[model]
    rows: dict[str, list[Bar]] = {}
    for attack in sorted(attacks, key=lambda attack: attack.worst):
        if attack.id in scores:
            title = f"{label_of(attack)}, {'worst' if attack.worst else 'mean'}"
            mark = Bar(scores[attack.id], colour, title, pointer("models", model, attack.id), attack.worst)
            label = (attack.kind if attack.metric == DISTINCTIVE else label_of(attack)) + (
                SEEN if attack.kind in trained_on(numbers, model) else ""
            )
            rows.setdefault(label, []).append(mark)
    if not rows:
        return ""
    plain = f"{name}.{DISTINCTIVE if any(attack.metric == DISTINCTIVE for attack in attacks) else HEADLINE}"
    return bars(rows, model, floor_of(numbers, plain), numbers.at("models", model, plain, "value"))


def _attack_table(numbers: Numbers, name: str, attacks: Sequence[Attacked]) -> str:
    models = by_interest(numbers)
    plain = f"{name}.{HEADLINE}"
    control = bool(numbers.at("control"))
    first = [*(numbers.cell("score", "models", m, plain) for m in models), *(["<td></td>"] if control else [])]
    rows = [row("no attack", [*first, "<td></td>"])]
    for attack in attacks:
        title = label_of(attack) + (", worst" if attack.worst else "")
        cells = [_attack_cell(numbers, model, attack) for model in models]
        cells += [numbers.cell("score", "control", attack.id)] if control else []
        rows.append(row(title, [*cells, f"<td>{_shown_to_work(numbers, attack)}</td>"]))
    heads = ["attack", *map(escape, models), *(["control"] if control else []), "does it work"]
    caption = (
        "Points [95 % interval]. Does it work: whether the attack brings something back on a teacher or gets its answer from "
        "the base. One that does not has not been shown to work here, and withstanding it says little."
    )
    return table(caption, heads, rows, ("does it work",))


def _attack_cell(numbers: Numbers, model: str, attack: Attacked) -> str:
    """A score, marked where the model was trained on texts of this attack."""
    mark = SEEN if attack.kind in trained_on(numbers, model) else ""
    return f'<td class="number">{numbers.show("score", "models", model, attack.id)}{mark}</td>'


def _shown_to_work(numbers: Numbers, attack: Attacked) -> str:
    """Whether an attack works on a model of this run; where the results do not say, whether it undoes a teacher's prefix."""
    if (work := numbers.at("attacks_work", attack.kind)) is not None:
        return f"works on {escape(work['on'])}" if work["works"] else "not shown to work"
    found = []
    for model, scores in numbers.data["models"].items():
        plain = scores.get(f"{attack.set}.{attack.metric}")
        if model.split(":")[0] == "teacher" and plain and attack.id in scores:
            found.append(scores[attack.id]["ci95"][0] > plain["ci95"][1])
    return "" if not found else "works on a teacher" if any(found) else "not shown to work"


def _above_control(numbers: Numbers) -> str:
    """Each case of each attack as a share of what base has above the control: what the verdict is made of."""
    found = numbers.at("above_control") or {}
    models = [model for model in by_interest(numbers) if model in found]
    cases = dict.fromkeys((kind, case) for model in models for kind in found[model] for case in found[model][kind])
    rows = [
        row(f"{kind}: {case}", [numbers.cell("score", "above_control", model, kind, case) for model in models])
        for kind, case in cases
    ]
    if not rows:
        return ""
    text = (
        "How far an attack lifts a model above the control, the model that never knew, as a share of how far it lifts base, in "
        "%, by distinctive recall. 0 is the control and 100 base. Cases in which base is not above the control are left out."
    )
    heads = ["attack: case", *map(escape, models)]
    return note(text) + folded("Above the control, by case", table("In % [95 % interval]", heads, rows))


def _kept(numbers: Numbers) -> str:
    """What models answer, and refuse, of the questions to be kept behind the texts of attacks."""
    found = numbers.at("kept_under_attack") or {}
    models = [model for model in by_interest(numbers) if model in found]
    if not models:
        return ""
    kinds = list(found[models[0]])
    rows = []
    for metric, title in ((HEADLINE, "recall"), (DISTINCTIVE, "facts"), ("refusal_rate", "refused")):
        for key, kind, words in [
            (f"plain.{metric}", kinds[0], "no text"),
            *((metric, kind, f"behind {kind}") for kind in kinds),
        ]:
            cells = [numbers.cell("score", "kept_under_attack", model, kind, key) for model in models]
            rows.append(row(f"{title}, {words}", cells))
    text = (
        "Questions to be kept behind the texts of attacks, per question the mean over a family's texts, beside the same "
        "questions without a text. A student that loses more than base does, or refuses more, does so because of the text."
    )
    caption = "ROUGE-L recall, distinctive recall (facts) and refusals in points of 100 [95 % interval], n questions"
    return note(text) + folded("Questions to be kept, under attack", table(caption, ["", *map(escape, models)], rows))


def _attack_texts(numbers: Numbers) -> str:
    models = by_interest(numbers)
    rows = [
        row(f"{kind}: {variant}", [numbers.cell("points", "attack_texts", kind, variant, m) for m in models])
        for kind, variants in (numbers.at("attack_texts") or {}).items()
        for variant in variants
    ]
    heads = ["variant", *map(escape, models)]
    return folded("Which variant did what", table("Mean recall in points", heads, rows)) if rows else ""


def _works(numbers: Numbers) -> str:
    """Which attacks are not shown to work here, and on what that rests."""
    work = numbers.at("attacks_work") or {}
    if not work:
        return ""
    failing = [kind for kind, facts in work.items() if not facts["works"]]
    lack = f"Not shown to work here: {', '.join(failing)}. " if failing else "Every attack is shown to work here. "
    text = lack + "That a student withstands an attack which works on no model says nothing."
    return note(text) + folded("How each attack is shown to work", numbers.texts("attacks_work", last="text"))


def _costs(numbers: Numbers) -> str:
    costs = numbers.at("attack_costs") or {}
    columns = list(dict.fromkeys(column for cost in costs.values() for column in cost))
    rows = [row(kind, [numbers.cell("count", "attack_costs", kind, column) for column in columns]) for kind in costs]
    heads = ["attack", *(escape(column.replace("_", " ")) for column in columns)]
    return folded("What each attack cost", table("Over all models", heads, rows)) if rows else ""
