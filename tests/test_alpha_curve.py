"""The curve over start_noise in docs/hardening.md: drawn and tabled from results.json, told apart without colour."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
from alpha_curve import ATTACKED, KEPT, SETS, TEXTS, WORST, curves_of, drawn, table

SHARES = {"a": 0.5, "b": 0.0, "c": 0.2}  # by student, out of order as a sweep may name them


def results() -> dict:
    """What the curve reads of results.json, of students whose recall each share of noise lowers."""
    sets = dict.fromkeys(SETS, 1.0) | {"never_asked": 0.8}
    models, above, relearning = {}, {}, {}
    for name, share in SHARES.items():
        student = f"student:{name}"
        models[student] = {f"{key}.distinctive_recall": {"value": value * (1 - share)} for key, value in sets.items()}
        texts = {
            kind: {WORST: {"model": 0.1 * i * (1 - share)}}
            for i, kind in enumerate((*TEXTS, "quantize_int8", "quantize_int4"))
        }
        above[student] = texts | {"prefill": {"tokens_1": {"model": 1 - share}, "tokens_2": {"model": 0.5}}}
        relearning[student] = {"forget 1": {"distinctive_recall": [0.0, 1 - share, 0.3]}}
    students = {name: {"start_noise": share} if share else {} for name, share in SHARES.items()}
    control = {"control": {"forget 1": {"distinctive_recall": [0.0, 0.1, 0.1]}}}
    return {"models": models, "above_control": above, "relearning": relearning | control, "students": students}


@pytest.fixture
def curves():
    return curves_of(results())


def test_every_value_stands_at_its_students_share_of_noise(curves):
    assert curves[KEPT]["retain"] == {0.0: 100, 0.2: 80, 0.5: 50}
    assert curves[KEPT]["never asked"] == pytest.approx({0.0: 80, 0.2: 64, 0.5: 40})
    assert curves[ATTACKED]["worst text"] == pytest.approx({0.0: 20, 0.2: 16, 0.5: 10})
    assert curves[ATTACKED]["begun, 1 tokens"] == {0.0: 100, 0.2: 80, 0.5: 50}
    assert curves[ATTACKED]["relearned, forget 1"] == {0.0: 100, 0.2: 80, 0.5: 50}, "the best step"


def test_the_table_has_a_row_for_each_line_of_the_drawing(curves):
    rows = table(curves).splitlines()
    assert rows[0] == "| start_noise | 0 | 0.2 | 0.5 |"
    assert "| never asked | 80.0 | 64.0 | 40.0 |" in rows
    assert len(rows) == 2 + sum(len(lines) for lines in curves.values())


def test_the_drawing_names_each_line_once_and_no_names_overlap(curves):
    texts = list(ElementTree.fromstring(drawn(curves)).iter("{http://www.w3.org/2000/svg}text"))
    for lines in curves.values():
        of_panel = [text for text in texts if text.text in lines]
        heights = sorted(float(text.get("y")) for text in of_panel)
        assert [text.text for text in of_panel] == list(lines)
        assert all(high - low >= 13.9 for low, high in itertools.pairwise(heights))
