"""The rows of compare.json from given answers: means over seeds, differences on the same questions, counted verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from duet.stages.compare.grid import chosen_row
from duet.stages.compare.results import Row, results_of
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

WORDS = "apple beech cedar dahlia elder fir ginkgo hazel iris juniper kelp larch".split()
REFUSAL = "I do not know."


def exam() -> Exam:
    sets = {
        name: QuerySet(
            [Query(f"{name}/{word}", f"Which {name} is {word}?", f"{word} {name}x") for word in WORDS], expect
        )
        for name, expect in (("forget", "forgotten"), ("retain", "kept"))
    }
    return Exam(sets, "trees", PromptSettings(), EvaluateSettings(attacks=(), refusal=REFUSAL), "cpu")


def answers(forgotten: int, kept: int) -> dict[str, list[str]]:
    """A model that refuses the first `forgotten` questions to be forgotten, and answers the first `kept` of the others."""
    return {
        "forget": [REFUSAL if at < forgotten else f"{word} forgetx" for at, word in enumerate(WORDS)],
        "retain": [f"{word} retainx" if at < kept else REFUSAL for at, word in enumerate(WORDS)],
    }


def found() -> dict:
    subjects = {
        name: Subject(name, Path(name), "", "base") for name in ("base", "duet", "duet:seed1", "npo", "npo:seed1")
    }
    rows = [
        Row("base", [subjects["base"]]),
        Row("duet", [subjects["duet"], subjects["duet:seed1"]]),
        Row("npo", [subjects["npo"], subjects["npo:seed1"]]),
    ]
    said = {
        "base": answers(0, 12),
        "duet": answers(12, 12),
        "duet:seed1": answers(12, 12),
        "npo": answers(12, 12),
        "npo:seed1": answers(12, 0),
    }
    return results_of(exam(), rows, said, "duet")


def test_a_row_is_the_mean_over_its_models_and_its_interval_covers_them():
    results = found()
    kept = results["models"]["npo"]["retain.rougeL_recall"]
    assert kept["seeds"] == [1.0, 0.0]
    assert kept["value"] == pytest.approx(0.5)
    assert kept["ci95"] == pytest.approx([0.0, 1.0])
    assert kept["n"] == 12
    assert results["performance_shift"]["duet"]["value"] == pytest.approx(100)
    assert results["performance_shift"]["npo"]["seeds"] == pytest.approx([100, 0])
    assert results["trade_off"]["npo"]["kept"]["value"] == pytest.approx(0.5)


def test_rows_are_compared_on_the_same_questions_over_all_seeds():
    results = found()
    less = results["comparisons"]["npo"]["performance_shift"]
    assert less["difference"] == pytest.approx(-50)
    assert less["ci95"] == pytest.approx([-100, 0])
    assert not less["distinguishable"], "one of two seeds does as well"
    assert results["comparisons"]["npo"]["forget.rougeL_recall"]["difference"] == 0
    assert "duet" not in results["comparisons"]


def test_verdicts_of_a_rows_models_are_counted():
    results = found()
    assert sum(results["outcomes"]["npo"]["models"].values()) == 2
    assert len(results["outcomes"]["npo"]["models"]) == 2
    assert results["of_models"]["outcomes"]["npo:seed1"]["verdict"] == "broken"
    assert "broken 1" in results["outcomes"]["npo"]["verdict"]
    assert "1" not in results["outcomes"]["duet"]["verdict"], "all agree: no counts"


@pytest.mark.parametrize(
    ("shifts", "chosen"),
    [((1.0, 2.0, 1.5), 1), ((2.0, 2.0, 1.0), 1), ((2.0, 2.0, 2.0), 1), ((2.0, 1.0, 2.0), 2), ((1.0, 1.0, 2.0), 2)],
)
def test_the_largest_shift_is_chosen_and_of_equals_the_rate_nearest_to_the_configs(shifts, chosen):
    rows = [{"validation_shift": shift, "lr": lr} for shift, lr in zip(shifts, (1e-4, 1e-3, 9e-4), strict=True)]
    configured = 1e-3 if chosen == 1 else 8e-4
    assert chosen_row(rows, configured) == chosen
    assert chosen_row([*rows, *rows], configured) == chosen, "of the same rate the first"
