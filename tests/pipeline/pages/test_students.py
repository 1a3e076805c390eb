"""Students beside each other: the table fits, the page is whole and shows what is in students.json."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from html_page import Page
from report_results import HOSTILE, PROBE, finished_student
from rich.console import Console

from duet.pipeline.pages.charts import Dot, colours, scatter
from duet.pipeline.pages.students import cells, render, students_table
from duet.pipeline.pages.tables import WIDTH, progress_note
from duet.stages.student.summary import TeacherShare


def test_every_cell_can_be_read_alone():
    assert cells(finished_student("a")) == [
        "a", "owner/llama", "huber_raw", "24.3 of 3,213 M", "120", "3,723.4 s", "123,457 tok/s", "61.23 GB", "0.0179",
        "75.0 / 50.0", "100.0 / 0.0",
    ]  # fmt: skip
    small = finished_student("a", parameters=765_440, trained_parameters=765_440)
    assert cells(small)[3] == "0.765 of 0.765 M"
    of_one_subset = PROBE | {"agreement.retain": None, "refusal.retain": None}
    assert cells(finished_student("a", probe=of_one_subset))[-2:] == ["75.0 / -", "100.0 / -"]


def test_a_start_says_its_noise():
    assert cells(finished_student("a", start_noise=0.5))[1] == "owner/llama + 0.5 noise"
    assert "<td>owner/llama + 0.5 noise</td>" in render("lab", [finished_student("a", start_noise=0.5)])


def test_a_loss_says_against_whom_where_teachers_have_names():
    def taught(combine: str | None, **weights: float) -> str:
        teachers = {name: TeacherShare("f", weight) for name, weight in weights.items()}
        return cells(finished_student("a", teachers=teachers, combine=combine))[2]

    assert taught(None, teacher=1.0) == "huber_raw"
    assert taught(None, strict=1.0) == "huber_raw of strict"
    assert taught("average", mild=1 / 3, strict=2 / 3) == "huber_raw, average of mild 0.333 and strict 0.667"


@pytest.mark.parametrize(("verbose", "width"), [(False, WIDTH), (True, 160)])
def test_the_table_fits_the_screen_with_long_names(verbose, width):
    stream = io.StringIO()
    name = "llama3.2-3b-lr1e-05-top_k5-lossforward_kl_topk"
    student = finished_student(name, loss="forward_kl_topk", start="meta-llama/Llama-3.2-3B-Instruct")
    Console(file=stream, width=width).print(students_table([student], verbose))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    below = [line.split("  ")[0].strip() for line in lines if "as the teacher" not in line]
    assert name in "".join(below).replace("student", ""), "folded, not cut"
    for cell in ("3,723.4 s", "75.0 / 50.0"):
        assert f" {cell} " in stream.getvalue()
    for cell in ("123,457 tok/s", "61.23 GB", "24.3 of 3,213 M"):
        assert (f" {cell} " in stream.getvalue()) == verbose


def test_the_page_is_whole_fetches_nothing_and_shows_hostile_text_as_text():
    text = render(
        HOSTILE, [finished_student("a"), finished_student(HOSTILE, loss_reason=HOSTILE, head=HOSTILE, start=HOSTILE)]
    )
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & set(page.attributes)
    assert "<script" not in text
    assert text.count("<circle ") == 2
    assert text.count("<polyline ") == 2
    for cell in cells(finished_student("a")):
        assert f"<td>{cell}</td>" in text
    assert "as the settings say; Llama: gathered head" in text


def test_a_student_that_was_not_asked_about_both_subsets_has_no_dot():
    of_one_subset = PROBE | {"agreement.retain": None}
    text = render("lab", [finished_student("a", probe=of_one_subset)])
    assert "<circle " not in text
    assert "Nothing was measured on both subsets" in text
    assert text.count("<polyline ") == 1


def test_dots_stand_where_their_shares_say_and_labels_never_cover_each_other():
    dots = {"student:a": Dot(1.0, 1.0), "student:b": Dot(0.63, 0.9), "student:c": Dot(1.0, 1.0)}
    svg = scatter(dots, colours(list(dots)), ("forget, %", "retain, %"), "t")
    places = [tuple(map(float, found)) for found in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert places[0] == places[1], "equal shares"
    assert places[2][0] < places[0][0], "less forgotten: further left"
    assert places[2][1] > places[0][1], "less kept: further down"
    ticks = [float(tick) for tick in re.findall(r'text-anchor="(?:end|middle)">(\d+)<', svg)]
    assert (min(ticks), max(ticks)) == (60, 100)
    heights = [float(y) for y in re.findall(r'<text x="\d+" y="([\d.]+)">student', svg)]
    assert min(b - a for a, b in pairwise(heights)) >= 12


@pytest.mark.parametrize("lost", ["loss_retain", "loss_forget"])
def test_the_bars_note(lost):
    line = {
        "loss": 1.234, "loss_forget": 2.0, "loss_retain": 1.0, "tokens_per_s": 12345.6, "stall_share": 0.034, "memory_gb": 0.61,
    }  # fmt: skip
    assert progress_note(line) == "loss 1.23 (forget 2, retain 1)  12,346 tok/s  stall 3 %  0.61 GB"
    assert f"{lost.removeprefix('loss_')} " not in progress_note({**line, lost: None})


def test_broad_rows_have_a_share_of_their_own_where_a_student_has_some():
    broad = PROBE | {"agreement.broad": 0.25, "refusal.broad": 0.5}
    both = [finished_student("a", probe=broad), finished_student("b")]
    assert cells(both[0], ("forget", "retain", "broad"))[-2:] == ["75.0 / 50.0 / 25.0", "100.0 / 0.0 / 50.0"]
    stream = io.StringIO()
    Console(file=stream, width=170).print(students_table(both))
    for text in ("forget / retain / broad", "75.0 / 50.0 / 25.0", "75.0 / 50.0 / -"):
        assert text in stream.getvalue()
    assert "forget / retain / broad" in render("run", both)
    assert "broad" not in render("run", both[1:])
