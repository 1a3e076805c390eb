"""report.html: a page of its own, every number of results.json in it, hostile text escaped, nothing claimed unmeasured."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser

import pytest

from pipeline.charts import Bar, bars, colours, curves
from pipeline.report import render

HOSTILE = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "br", "hr", "img", "link", "input"}


def score(value: float, n: int = 15) -> dict:
    return {"value": value, "n": n, "ci95": [max(0.0, value - 0.1), min(1.0, value + 0.1)]}


@pytest.fixture
def results() -> dict:
    def model(forget: float, retain: float) -> dict:
        return {
            "forget.rougeL_recall": score(forget),
            "retain.rougeL_recall": score(retain, 45),
            "attack.reverse.forget.rougeL_recall": score(forget / 2),
            "attack.reverse_worst.forget.rougeL_recall": score(forget / 3),
        }

    return {
        "run": "lab",
        "topic": HOSTILE,
        "created": "2026-01-21T00:00:00+00:00",
        "models": {"base": model(0.991, 0.982), "teacher": model(0.073, 0.964), "student:a": model(0.087, 0.975)},
        "sets": {"forget": {"expect": "forgotten", "n": 15}, "retain": {"expect": "kept", "n": 45}},
        "floors": {"forget.rougeL_recall": {"refusal": 0.123, "echo": 0.234}},
        "performance_shift": {"student:a": {"value": 89.7, "terms": {"forget.rougeL_recall": 90.4}}},
        "samples": [
            {"set": "forget", "question": HOSTILE, "answer": "yes", "outputs": {"base": HOSTILE, "teacher": ""}}
        ],
        "definitions": {"rougeL_recall": "a definition", "performance_shift": "a sum"},
        "teacher_stores": {"teacher": {"top_k": 20, "prefix": HOSTILE}},
        "students": {
            "a": {
                "loss": "huber_raw",
                "loss_reason": "as the settings say",
                "teachers": {"teacher": {"fingerprint": "f" * 64, "weight": 1.0}},
                "combine": None,
                "stopped_early": False,
                "stall_share": 0.03,
                "trained_parameters": 500,
                "steps": 3,
                "rows": 60,
                "train_s": 1.0,
                "rows_per_s": 60.0,
                "parameters": 1000,
                "model": "m",
                "curve": [[1, 2.0], [2, 1.0], [3, 0.5]],
            }
        },
        "environment": {"torch": "2.13.0"},
    }


class Page(HTMLParser):
    """Collects tags and attributes, and fails on a tag that is closed out of order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(results):
    text = render(results)
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & set(page.attributes)
    assert not re.search(r"url\(|@import|https?://", text)


def test_how_each_student_was_trained_is_said(results):
    results["students"]["a"]["stopped_early"] = True
    text = render(results)
    assert "a: huber_raw (as the settings say), 3 steps, stopped early, over 60 rows in 1.0 s" in text
    assert "3 % of it waiting for the store" in text
    assert "500 of 1,000 parameters trained" in text


def test_hostile_text_is_shown_as_text(results):
    text = render(results)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_every_score_stands_in_the_page_with_its_interval_and_n(results):
    text = render(results)
    for scores in results["models"].values():
        for value in scores.values():
            low, high = value["ci95"]
            assert f"{100 * value['value']:.1f}<small>[{100 * low:.1f}, {100 * high:.1f}] n={value['n']}" in text
    assert "12.3<small>echo 23.4" in text
    assert "+89.7" in text


def test_what_was_not_measured_is_said(results):
    silent = copy.deepcopy(results)
    for scores in silent["models"].values():
        for key in [key for key in scores if key.startswith("attack.")]:
            del scores[key]
    silent["students"]["a"]["curve"] = []
    text = render(silent)
    assert "Attacks were switched off" in text
    assert "brings back" not in text
    assert "No training curve" in text
    del silent["models"]["student:a"]
    assert "No student was evaluated" in render(silent)


def test_several_teachers_stores_and_attacked_sets_are_all_shown(results):
    results["models"] = {name.replace("teacher", "teacher:strict"): s for name, s in results["models"].items()}
    results["models"]["teacher:mild"] = results["models"]["teacher:strict"]
    results["sets"]["second.forget"] = {"expect": "forgotten", "n": 5}
    results["models"]["student:a"]["attack.reverse.second.forget.rougeL_recall"] = score(0.42, 5)
    results["teacher_stores"] = {"strict": {"top_k": 20}, "mild": {"top_k": 20}}
    text = render(results)
    assert "the prefixed teacher:strict 7.3 (95" in text
    assert "the prefixed teacher:mild 7.3 (95" in text
    assert text.count("ROUGE-L recall on the ") == 2
    assert "ROUGE-L recall on the second.forget questions" in text
    for name in ("strict", "mild"):
        assert f"<h3>Logits of teacher {name}</h3>" in text


def test_bars_end_where_their_values_say(results):
    group = [Bar(model, scores["forget.rougeL_recall"]) for model, scores in results["models"].items()]
    floors = {"forget": {"refusal": 0.1, "echo": 0.4}}
    svg = bars({"forget": group}, floors, colours(list(results["models"])), "t")
    widths = [float(width) for width in re.findall(r'<rect [^>]*? width="([\d.]+)"', svg)]
    assert widths[0] / widths[1] == pytest.approx(0.991 / 0.073, rel=0.01)
    assert svg.count('class="floor"') == 1


def test_curves_fall_as_the_loss_does_on_either_scale():
    for values in ([2.0, 1.5, 1.0], [100.0, 1.0, 0.01]):
        svg = curves({"student:a": list(enumerate(values, 1))}, {"student:a": "#000000"}, "t")
        points = re.search(r'<polyline points="([^"]+)"', svg)
        assert points
        heights = [float(point.split(",")[1]) for point in points[1].split()]
        assert heights == sorted(heights), "down the page"
        assert "nan" not in svg


def test_a_model_has_one_colour_on_the_whole_page(results):
    text = render(results)
    palette = colours(list(results["models"]))
    assert len(set(palette.values())) == 3
    drawn = re.findall(r'<rect [^>]*fill="(#\w+)"', text)
    assert drawn == list(palette.values()) * 2, "two query sets"
    assert re.findall(r'<polyline [^>]*stroke="(#\w+)"', text) == [palette["student:a"]]
    assert re.findall(r'background:(#\w+)"', text) == [*palette.values(), palette["student:a"]]
