"""report.html: a page of its own, its numbers and those of results.json the same, hostile text escaped, nothing claimed
unmeasured."""

from __future__ import annotations

import copy
import json
import re
from html import escape
from typing import Any

import pytest
from html_page import Page
from report_results import HOSTILE, MODELS, full_results, plain_results

from duet.cache.errors import UserError
from duet.pipeline.pages.charts import Bar, Line, bars, colours, curves, lines
from duet.pipeline.pages.page import Numbers
from duet.pipeline.pages.report import render, rendered
from duet.pipeline.pages.report_depth import SCRIPT
from duet.pipeline.pages.results import trained_on

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def at(results: Any, key: str) -> Any:
    """What a JSON Pointer points at."""
    node = results
    for step in key.split("/")[1:]:
        part = step.replace("~1", "/").replace("~0", "~")
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def plain(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def expected(value: Any, form: str) -> list[str]:
    """The numbers that a value must be shown as, computed here from the file alone."""
    if form == "score":
        low, high = value["ci95"]
        return [f"{100 * value['value']:.1f}", f"{100 * low:.1f}", f"{100 * high:.1f}", str(value["n"])]
    if form == "score-plain":
        return [*map(plain, (value["value"], *value["ci95"])), str(value["n"])]
    if form == "score-brief":
        return [f"{100 * share:.1f}" for share in (value["value"], *value["ci95"])]
    if form in ("interval", "interval-plain"):
        return [f"{100 * edge:.1f}" if form == "interval" else plain(edge) for edge in value]
    one = {
        "points": lambda: f"{100 * value:.1f}",
        "signed": lambda: f"{100 * value:.1f}".replace("-0.0", "0.0"),
        "signed-points": lambda: f"{value:.1f}".replace("-0.0", "0.0"),
        "count": lambda: f"{value:,}",
        "plain": lambda: plain(value),
        "p": lambda: "0.001" if value < 0.001 else f"{value:.3f}",
        "rule-of-three": lambda: f"{300 / value:.0f}",
    }
    return [one[form]()]


@pytest.mark.parametrize("make", [full_results, plain_results])
def test_every_marked_number_is_what_the_file_says(make):
    results = make()
    page = Page(render(results))
    forms = set()
    for key, form, text in page.marked:
        if form == "text":
            assert text == str(at(results, key)), key
        elif form:
            assert NUMBER.findall(text.replace("+", "")) == expected(at(results, key), form), (key, form)
        else:  # a mark of a chart; a dot has two keys
            assert all(at(results, one) for one in re.split(" (?=/)", key)), key
        forms.add(form)
    assert {"score", "score-brief", "score-plain", "points", "signed-points", "text", ""} <= forms


def test_bars_and_dots_say_the_numbers_of_their_keys():
    results = full_results()
    bars_seen = 0
    for key, form, text in Page(render(results)).marked:
        if not form and key.startswith("/models/") and " " not in key:
            score = at(results, key)
            low, high = score["ci95"]
            shown = f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}], n = {score['n']}"
            assert shown in text
            assert text.endswith(f"{100 * score['value']:.1f}")
            bars_seen += 1
    assert bars_seen == 4 * len(MODELS)


def test_no_number_stands_on_the_page_that_is_not_marked():
    """But for those of our own sentences, names of the run's things, and the axes."""
    named = {"th", "dt", "h1", "h3", "summary", "figcaption", "title", "style", "script", "tick", "name", "text"}
    ours = re.compile(r"95 %|points of 100|100 points|sha256|rank 1\b|prefill\.8|[48] bits|NF4")
    for tag, text in Page(render(full_results())).loose:
        if tag not in named and "Run lab, 2026-01-21T00:00:00+00:00" not in text:
            assert not re.search(r"\d", ours.sub("", text)), (tag, text)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all numbers in a part of results.json."""
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    if isinstance(node, list):
        return [leaf for key, value in enumerate(node) for leaf in leaves(value, (*path, key))]
    return [path] if isinstance(node, int | float) and not isinstance(node, bool) else []


@pytest.mark.parametrize(
    "part",
    [
        "models",
        "floors",
        "performance_shift",
        "outcomes",
        "comparisons",
        "layers",
        "depth",
        "judge",
        "by_distance",
        "over_seeds",
        "relearning",
        "attack_texts",
        "attack_costs",
        "kept_under_attack",
        "sets",
    ],
)
def test_every_number_of_the_file_is_on_the_page(part):
    """Change any, and the page changes."""
    results = full_results()
    before = render(results)
    paths = leaves(results[part])
    if part == "sets":  # n of the others stands beside their scores
        paths = [("forget", "n")]
    assert paths
    for path in paths:
        changed = copy.deepcopy(results)
        node = changed[part]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] += 1 if isinstance(node[path[-1]], int) else 0.0213 + 0.05 * abs(node[path[-1]])
        assert render(changed) != before, path


def test_the_page_is_whole_and_fetches_nothing():
    text = render(full_results())
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not {"src", "onload", "onclick", "style"} & set(page.attributes)
    assert all(target.startswith("#") for target in page.attributes["href"])
    anchors = {target.removeprefix("#") for target in page.attributes["href"]}
    assert len(anchors) == 16
    assert anchors <= set(page.attributes["id"])
    assert not re.search(r"url\(|@import|https?://", text)
    policy = page.attributes["content"][0]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_hostile_text_is_shown_as_text():
    text = render(full_results())
    assert text.count("<script") == 1
    assert f"<script>{SCRIPT}</script>" in text
    assert escape(HOSTILE) in text


def test_nothing_is_called_erased_and_what_was_not_tried_is_named():
    text = render(full_results())
    assert not re.search("erase|proof that|guarantee", text, re.IGNORECASE)
    limits = text.split('id="limits"')[1].split("</section>")[0]
    assert "role play" in limits
    assert "Not tried in this run: " in limits
    tried = limits.split("Not tried in this run: ")[1].split(".")[0]
    assert not {"reverse prompts", "answer prefill", "sampling many answers", "relearning", "logit lens"} & set(
        tried.split(", ")
    )
    assert {"translation", "weights rounded to 8 bits", "reversed queries"} <= set(tried.split(", "))
    assert "no query set translates one that is attacked" in re.sub("<[^>]+>", "", limits)


def test_a_set_in_a_language_without_refusal_patterns_is_named():
    results = full_results()
    results["refusals"] = {"languages": ["en"], "own_patterns": ["^pass"], "unknown_sets": ["forget"]}
    limits = render(results).split('id="limits"')[1].split("</section>")[0]
    assert "refusal_rate of forget: its answers are in no language" in limits
    assert "^pass" in render(results).split('id="run"')[1].split("</section>")[0]
    results["refusals"]["unknown_sets"] = []
    assert "refusal_rate of" not in render(results).split('id="limits"')[1].split("</section>")[0]


def test_an_attack_that_is_not_shown_to_work_is_named():
    text = re.sub("<[^>]+>", "", render(full_results()))
    assert "Not shown to work here: sampling. That a student" in text
    assert "works on teacher" in text
    older = plain_results()  # which do not say: the intervals do
    attacked = older["models"]["teacher"]["attack.reverse_worst.forget.rougeL_recall"]
    for interval, works in (([0.95, 1.0], True), ([0.0, 1.0], False)):
        attacked["ci95"] = interval
        assert ("works on a teacher" in render(older)) == works


def test_an_attack_that_a_student_was_trained_on_is_marked_for_it_alone():
    results = full_results()
    assert "was trained on texts of" not in render(results)
    results["students"]["a"]["trained_on"] = ["reverse"]
    page = render(results)
    text = re.sub("<[^>]+>", "", page)
    assert "student:a was trained on texts of reverse, marked (seen)" in text
    cells = re.findall(
        r'<td class="number"><span data-key="/models/([^/]+)/(attack[^"]+)"[^§]*?</span>([^<]*)</td>', page
    )
    marked = {(model, key.split(".")[1]) for model, key, mark in cells if mark}
    assert marked == {("student:a", "reverse"), ("student:a", "reverse_worst")}
    assert re.findall(r"<text[^>]*>reverse \(seen\)</text>", page)
    namesake = Numbers({"students": {"base": {"trained_on": ["reverse"]}}})
    assert [trained_on(namesake, model) for model in ("base", "teacher", "student:base")] == [[], [], ["reverse"]]
    of_another_run = Numbers({"students": {}, "trained_on": {"model:base": ["prefill"]}})
    assert [trained_on(of_another_run, model) for model in ("student:base", "model:base")] == [[], ["prefill"]]


def traded(results: Any) -> tuple[str, dict[str, str]]:
    """The panel of forgetting under attack, and its marks by model: the keys of each."""
    panel = render(results).split("forget under attack against retain</figcaption>")[1].split("</figure>")[0]
    marks = re.findall(r'<g data-key="([^"]+)"><title>(\S+): .*?</g>', panel)
    return panel, {model: key for key, model in marks}


def test_the_facts_that_an_attack_brings_back_are_drawn_where_they_are_counted():
    results = plain_results()
    worst = "attack.reverse_worst.forget."
    for scores in results["models"].values():
        scores[f"{worst}distinctive_recall"] = scores[f"{worst}rougeL_recall"]
    page = render(results)
    drawn = page.split("<h3>On forget questions</h3>")[1].split("<details")[0]
    assert f"{worst}distinctive_recall" in drawn
    assert f"{worst}rougeL_recall" not in drawn
    assert f"{worst}rougeL_recall" in page.split("<h3>On forget questions</h3>")[1].split("<details")[1]


def test_what_was_traded_is_drawn_under_the_worst_attack_that_was_held_out():
    results = full_results()
    for model in MODELS:
        for key, value in (("reverse_worst", 0.9), ("reverse", 0.2), ("prefill.8", 0.6)):
            results["models"][model][f"attack.{key}.forget.rougeL_recall"]["value"] = value
    panel, marks = traded(results)
    worst, other = "attack.reverse_worst.forget.rougeL_recall", "attack.prefill.8.forget.rougeL_recall"
    assert marks == {"control": f"/control/{worst}"} | {
        model: f"/models/{model}/{worst} /models/{model}/retain.rougeL_recall" for model in MODELS
    }
    assert 'role="img" aria-label="forget under attack against retain. ' in panel
    for mark, count in (("<circle ", 2), ("m-5 -5h10v10h-10z", 1), ("m0 -7l6 11h-12z", 1), ('class="floor"', 1)):
        assert panel.count(mark) == count, "students, base, teacher and the control differ without colour"
    assert panel.count('class="whisker"') == len(MODELS)
    results["students"]["a"]["trained_on"] = ["reverse"]
    assert traded(results)[1]["student:a"].split()[0] == f"/models/student:a/{other}"
    assert traded(results)[1]["student:b"].split()[0] == f"/models/student:b/{worst}"
    facts = "attack.prefill.8.forget.distinctive_recall"
    results["models"]["student:b"][facts] = results["models"]["student:b"][other]
    assert traded(results)[1]["student:b"].split()[0] == f"/models/student:b/{facts}", "facts, where they are counted"
    results["students"]["a"]["trained_on"] = ["reverse", "prefill.8"]
    assert "student:a" not in traded(results)[1], "no attack was held out from it"
    del results["control"]
    panel, marks = traded(results)
    assert "control" not in marks
    assert 'class="floor"' not in panel


def test_the_verdict_comes_first_and_not_distinguishable_is_said():
    text = render(full_results())
    assert text.index("suppressed under these tests") < text.index("<nav")
    by_student = text.split('id="comparisons"')[1].split("<h3>")
    assert "not distinguishable" not in by_student[1]
    assert by_student[2].count("not distinguishable") == 9


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("outcomes", "These results hold no verdict"),
        ("layers", "The inner layers were not looked at"),
        ("depth", "Depth was not measured."),
        ("relearning", "Relearning was not tried in this run"),
        ("comparisons", "These results hold no paired comparisons"),
        ("provenance", "These results hold no hashes of the data"),
        ("students", "No student was trained"),
        ("samples", "No samples were kept"),
    ],
)
def test_a_part_that_is_not_there_is_said_to_be_missing(part, said):
    results = full_results()
    assert said not in render(results)
    del results[part]
    assert said in render(results)


def test_what_was_not_measured_is_said():
    silent = plain_results()
    for scores in silent["models"].values():
        for key in [key for key in scores if key.startswith("attack.")]:
            del scores[key]
    silent["students"]["a"]["curve"] = silent["students"]["b"]["curve"] = []
    text = render(silent)
    assert "Attacks were switched off" in text
    assert "brings most back" not in text
    assert "No training curve" in text
    del silent["models"]["student:a"], silent["models"]["student:b"]
    assert "No student was evaluated" in render(silent)


def test_how_each_student_was_trained_is_said():
    results = full_results()
    results["students"]["a"]["stopped_early"] = True
    text = re.sub(r"<[^>]+>", "", render(results))
    assert "a: huber_raw (as the settings say), 3 steps, stopped early, over 60 rows in 1.25 s" in text
    assert "3.0 % of it waiting for the store" in text


def test_several_teachers_stores_and_attacked_sets_are_all_shown():
    results = plain_results()
    results["models"] = {name.replace("teacher", "teacher:strict"): s for name, s in results["models"].items()}
    results["models"]["teacher:mild"] = results["models"]["teacher:strict"]
    results["sets"]["second.forget"] = {"expect": "forgotten", "n": 5}
    results["models"]["student:a"]["attack.reverse.second.forget.rougeL_recall"] = {
        "value": 0.42, "n": 5, "ci95": [0.3, 0.5],
    }  # fmt: skip
    results["teacher_stores"] = {"strict": {"top_k": 20}, "mild": {"top_k": 20}}
    text = render(results)
    for name in ("strict", "mild"):
        assert f"the prefixed teacher:{name} <span" in text
        assert f"<h3>Logits of teacher {name}</h3>" in text
    assert "<h3>On forget questions</h3>" in text
    assert "<h3>On second.forget questions</h3>" in text


@pytest.mark.parametrize("value", [[], {"models": {}}, {"models": {"base": {"forget.x": {"value": "much"}}}}, "text"])
def test_results_of_another_make_are_refused_in_two_lines(value):
    with pytest.raises(UserError, match=r"results\.json holds no results that a report can be made of"):
        rendered(json.loads(json.dumps(value)), "results.json")


def bar(value: float) -> Bar:
    return Bar({"value": value, "n": 5, "ci95": [value, value]}, "#000000", "t")


def test_bars_end_where_their_values_say():
    svg = bars({"one": [bar(0.991)], "another": [bar(0.073)]}, "t", floor=0.4)
    widths = [float(width) for width in re.findall(r'<rect [^>]*? width="([\d.]+)"', svg)]
    assert widths[0] / widths[1] == pytest.approx(0.991 / 0.073, rel=0.01)
    assert svg.count('class="floor"') == 1
    assert 'class="before"' not in svg


def test_a_label_that_is_too_long_is_set_narrower_and_not_cut():
    name = "an attack with a name that is far too long for a phone"
    svg = bars({name: [bar(0.5)]}, "t")
    assert f">{name}</text>" in svg
    assert 'lengthAdjust="spacingAndGlyphs"' in svg


def test_curves_fall_as_the_loss_does_on_either_scale():
    for values in ([2.0, 1.5, 1.0], [100.0, 1.0, 0.01]):
        svg = curves({"student:a": list(enumerate(values, 1))}, {"student:a": "#000000"}, "t")
        points = re.search(r'<polyline points="([^"]+)"', svg)
        assert points
        heights = [float(point.split(",")[1]) for point in points[1].split()]
        assert heights == sorted(heights), "down the page"
        assert "nan" not in svg


def test_a_band_encloses_its_line():
    svg = lines({"m": Line([0, 1], [50, 80], [[40, 60], [70, 90]])}, {"m": "#000000"}, ("x", "y"), "t", top=100)
    heights = {
        kind: [float(point.split(",")[1]) for point in re.search(rf'<{kind} points="([^"]+)"', svg)[1].split()]  # type: ignore[index]
        for kind in ("polygon", "polyline")
    }
    above, below = heights["polygon"][:2], heights["polygon"][:1:-1]
    assert all(a < y < b for a, y, b in zip(above, heights["polyline"], below, strict=True))


def test_a_model_has_one_colour_on_the_whole_page():
    text = render(full_results())
    palette = colours(list(MODELS))
    assert len(set(palette.values())) == len(MODELS)
    for model, colour in palette.items():
        panel = text.split(f"<figcaption>{model}</figcaption>")[1].split("</figure>")[0]
        assert set(re.findall(r'<rect [^>]*fill="(#\w+)"', panel)) == {colour}
        drawn = re.findall(r'stroke="(#\w+)"[^>]*/>(?:<path[^>]*>)?</g>', text.split(f"<title>{model}</title>")[1])
        assert drawn[0] == colour
