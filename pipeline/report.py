"""report.html: one self-contained page, a pure function of results.json. No scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from cache.files import publishing
from pipeline.charts import Bar, bars, colours, curves
from pipeline.terminal import loss_in_words

HEADLINE = "rougeL_recall"
ATTACKS = ("attack.reverse", "attack.reverse_worst")  # mean over the texts, and the worst per question
CSS_PATH = Path(__file__).with_name("report.css")

Results = Mapping[str, Any]


def write_report(results: Results, path: Path) -> None:
    """Render and publish the page."""
    with publishing(path) as temporary:
        temporary.write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The whole page as HTML text."""
    sections = (
        _before_after(results),
        _attack(results),
        _samples(results),
        _all_scores(results),
        _shift(results),
        _training(results),
        _definitions(results),
        _provenance(results),
    )
    meta = f"Run {results['run']}, {results['created']}"
    body = f'<p class="lead">{_summary(results)}</p>{"".join(sections)}'
    return page(f"Forgetting {results['topic']}", meta, body)


def page(title: str, meta: str, body: str) -> str:
    """A self-contained page in the report's style; `title` and `meta` are text, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS_PATH.read_text(encoding='utf-8')}</style></head>"
        f'<body><main><h1>{escape(title)}</h1><p class="meta">{escape(meta)}</p>{body}</main></body></html>\n'
    )


def _points(score: Mapping[str, Any] | None) -> str:
    """`93.3 (95 % interval 86.7 to 100.0, n = 15)`."""
    if score is None:
        return "not measured"
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f} (95 % interval {100 * low:.1f} to {100 * high:.1f}, n&nbsp;=&nbsp;{score['n']})"


def _summary(results: Results) -> str:
    """What happened, in sentences made from the numbers."""
    models = results["models"]
    student = next((name for name in models if name.startswith("student:")), None)
    if student is None:
        return "No student was evaluated."
    key = f"forget.{HEADLINE}"
    teachers = ", ".join(
        f"the prefixed {escape(name)} {_points(scores.get(key))}"
        for name, scores in models.items()
        if name.split(":")[0] == "teacher"
    )
    sentences = [
        f"Asked about the topic, the base model recalls <strong>{_points(models['base'].get(key))}</strong> of 100 points of "
        f"the reference answers, {teachers}, and "
        f"{escape(student)}, which never sees the prefix, <strong>{_points(models[student].get(key))}</strong>."
    ]
    for name, info in results["sets"].items():
        before, after = (models[m].get(f"{name}.{HEADLINE}") for m in ("base", student))
        if info["expect"] == "kept" and before and after:
            sentences.append(
                f"On {escape(name)} questions it has {_points(after)}, before {100 * before['value']:.1f}."
            )
    worst = models[student].get(f"{ATTACKS[1]}.{key}")
    if worst:
        sentences.append(f"The worst reverse prompt per question brings back {_points(worst)}.")
    return " ".join(sentences)


def _palette(results: Results) -> dict[str, str]:
    return colours(list(results["models"]))


def legend(palette: Mapping[str, str]) -> str:
    """The colours' meaning, as a list."""
    items = "".join(f'<li><i style="background:{colour}"></i>{escape(m)}</li>' for m, colour in palette.items())
    return f'<ul class="legend">{items}</ul>'


def _before_after(results: Results) -> str:
    groups, floors = {}, {}
    for name, info in results["sets"].items():
        key, title = f"{name}.{HEADLINE}", f"{name}: to be {info['expect']}, n = {info['n']}"
        groups[title] = [Bar(model, scores[key]) for model, scores in results["models"].items() if key in scores]
        floors[title] = results["floors"].get(key, {})
    return (
        "<h2>Before and after</h2>"
        '<p class="note">ROUGE-L recall in points. Whiskers are 95 % intervals. The dashed line is the floor: the higher of '
        "a constant refusal's score and that of repeating the question.</p>"
        + legend(_palette(results))
        + bars(groups, floors, _palette(results), "ROUGE-L recall per query set and model")
    )


def _attack(results: Results) -> str:
    tables = "".join(_attacked(results["models"], name) for name in results["sets"])
    if not tables:
        return "<h2>Reverse prompts</h2><p>Attacks were switched off in this run: nothing is known about them.</p>"
    return (
        "<h2>Reverse prompts</h2><p>A reverse prompt stands in front of the question and tries to undo the forgetting. "
        f"A model that has forgotten scores as without an attack; what comes back was hidden, not gone.</p>{tables}"
    )


def _attacked(models: Mapping[str, Any], name: str) -> str:
    """The table of attacks on a query set; empty where none were tried."""
    keys = [f"{name}.{HEADLINE}", *(f"{attack}.{name}.{HEADLINE}" for attack in ATTACKS)]
    rows = {model: scores for model, scores in models.items() if keys[1] in scores}
    if not rows:
        return ""
    head = "".join(f'<th class="number" scope="col">{t}</th>' for t in ("no attack", "mean of texts", "worst text"))
    body = "".join(
        f'<tr><th scope="row">{escape(model)}</th>{"".join(cell(scores.get(key)) for key in keys)}</tr>'
        for model, scores in rows.items()
    )
    caption = f"ROUGE-L recall on the {escape(name)} questions, points [95 % interval]"
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">model</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def cell(score: Mapping[str, Any] | None) -> str:
    """A table cell with a score in points, its interval and n; a dash where it was not measured."""
    if score is None:
        return '<td class="number">-</td>'
    low, high = score["ci95"]
    return (
        f'<td class="number">{100 * score["value"]:.1f}'
        f"<small>[{100 * low:.1f}, {100 * high:.1f}] n={score['n']}</small></td>"
    )


def _all_scores(results: Results) -> str:
    models = results["models"]
    keys = list(dict.fromkeys(key for scores in models.values() for key in scores))
    rows, group = [], None
    for key in keys:
        name, metric = key.rsplit(".", 1)
        if name != group:
            group = name
            rows.append(f'<tr class="set"><th scope="rowgroup" colspan="{len(models) + 2}">{escape(name)}</th></tr>')
        floor = results["floors"].get(key)
        points = {of: f"{100 * value:.1f}" for of, value in (floor or {}).items()}  # refusal and echo, or chance
        shown = "".join(f"<small>echo {text}</small>" if of == "echo" else text for of, text in points.items())
        cells = "".join(cell(scores.get(key)) for scores in models.values())
        rows.append(f'<tr><th scope="row">{escape(metric)}</th>{cells}<td class="number">{shown}</td></tr>')
    head = "".join(f'<th class="number" scope="col">{escape(model)}</th>' for model in models)
    return (
        '<h2>Every score</h2><div class="scroll"><table><caption>Points, with 95 % interval and number of questions. '
        "Floor: score of a constant refusal, below it that of echoing the question; of choices, chance.</caption>"
        f'<thead><tr><th scope="col">metric</th>{head}<th class="number" scope="col">floor</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shift(results: Results) -> str:
    shifts = results["performance_shift"]
    terms = list(dict.fromkeys(term for shift in shifts.values() for term in shift["terms"]))
    head = "".join(f'<th class="number" scope="col">{escape(term.rsplit(".", 1)[0])}</th>' for term in terms)
    rows = "".join(
        f'<tr><th scope="row">{escape(model)}</th>'
        + "".join(f'<td class="number">{shift["terms"].get(term, 0):+.1f}</td>' for term in terms)
        + f'<td class="number"><strong>{shift["value"]:+.1f}</strong></td></tr>'
        for model, shift in shifts.items()
    )
    return (
        f"<h2>Performance shift</h2><p>{escape(results['definitions'].get('performance_shift', ''))}</p>"
        f'<div class="scroll"><table><caption>Points gained over the model\'s own base</caption><thead><tr>'
        f'<th scope="col">model</th>{head}<th class="number" scope="col">sum</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _training(results: Results) -> str:
    students = results["students"]
    curve = {f"student:{name}": info["curve"] for name, info in students.items()}
    palette = {model: colour for model, colour in _palette(results).items() if model in curve}
    chart = curves(curve, palette, "Training loss by step")
    facts = "".join(
        f"<li>{escape(name)}: {escape(loss_in_words(info))} ({escape(info['loss_reason'])}), "
        f"{info['steps']} steps"
        f"{', stopped early,' if info['stopped_early'] else ''} over {info['rows']} rows in {info['train_s']:.1f} s "
        f"({info['rows_per_s']:.0f} rows/s, {100 * info['stall_share']:.0f} % of it waiting for the store), "
        f"{info['trained_parameters']:,} of {info['parameters']:,} parameters trained, from {escape(str(info['model']))}</li>"
        for name, info in students.items()
    )
    return f'<h2>Training</h2>{legend(palette)}{chart}<ul class="note">{facts}</ul>'


def _samples(results: Results) -> str:
    parts = []
    for sample in results["samples"]:
        outputs = "".join(
            f"<dt>{escape(model)}</dt><dd>{escape(text) or '<em>(empty)</em>'}</dd>"
            for model, text in sample["outputs"].items()
        )
        parts.append(
            f'<div class="sample"><span class="tag">{escape(sample["set"])}</span>'
            f"<p><strong>{escape(sample['question'])}</strong></p>"
            f"<dl><dt>reference</dt><dd>{escape(sample['answer'] or '')}</dd>{outputs}</dl></div>"
        )
    return (
        '<h2>Sample answers</h2><p class="note">Drawn evenly from the query sets by the seed, not by how they turned out.</p>'
        + "".join(parts)
    )


def _definitions(results: Results) -> str:
    return f"<h2>What the numbers mean</h2>{definition_list(results['definitions'])}"


def _provenance(results: Results) -> str:
    stores = results["teacher_stores"]
    titles = {name: "Teacher logits" if len(stores) == 1 else f"Logits of teacher {name}" for name in stores}
    logits = "".join(f"<h3>{escape(titles[name])}</h3>{definition_list(facts)}" for name, facts in stores.items())
    return f"<h2>Provenance</h2>{logits}<h3>Environment</h3>{definition_list(results['environment'])}"


def definition_list(pairs: Mapping[str, Any]) -> str:
    """Names and what they stand for, any text."""
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs.items())
    return f"<dl>{items}</dl>"
