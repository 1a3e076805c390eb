"""The report's relearning: distinctive recall where it was measured, and each curve beside the control's."""

from __future__ import annotations

from typing import Any

from report_results import full_results

from duet.pipeline.pages.page import Numbers
from duet.pipeline.pages.report_relearning import relearning_section


def measured(**more: Any) -> dict[str, Any]:
    return {
        "steps": [0, 4, 8], "recall": [0.111, 0.222, 0.333], "ci95": [[0, 1]] * 3, "steps_to_half": 4, "n": 9,
        "distinctive_recall": [0.12, 0.34, 0.56], "distinctive_recall_ci95": [[0, 1]] * 3, "to_half": 8,
    } | more  # fmt: skip


def page_of(relearning: dict[str, Any]) -> str:
    return relearning_section(Numbers(full_results() | {"relearning": relearning})).replace("<wbr>", "")


def test_facts_are_drawn_and_counted_and_stand_beside_the_control():
    text = page_of(
        {
            "student:a": {"forget 5": measured(above_control=0.417, above_control_steps=4, steps_ratio=0.25)},
            "student:b": {"forget 5": measured(above_control=-0.02, above_control_steps=8, steps_ratio=None)},
            "control": {"forget 5": measured(to_half=None)},
        }
    )
    assert "+41.7" in text
    assert "0.25" in text
    assert "/relearning/student:a/forget 5/to_half" in text
    assert "steps_to_half" not in text
    assert text.count("not reached") == 1
    assert text.count("student:b, forget 5") == 1
    assert "control, forget 5" not in text


def test_results_without_facts_show_recall_and_no_table_beside_a_control():
    only = {key: value for key, value in measured().items() if "distinctive" not in key and key != "to_half"}
    text = page_of({"student:a": {"forget 5": only}})
    assert "/relearning/student:a/forget 5/steps_to_half" in text
    assert "beside the control" not in text
