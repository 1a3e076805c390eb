"""What the verdict is made of: what is left above the control or the floor, said or only held. Scores are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_attacked import case
from test_verdict import BASE, FLOORS, MADE, WORKS, N, evidence

from duet.stages.evaluate.attacked import Shown
from duet.stages.evaluate.collapse import ModelAnswers
from duet.stages.evaluate.left import Beside, kept, left
from duet.stages.evaluate.results import Read, results_of
from duet.stages.evaluate.verdict import VERDICTS, outcome
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.exam.given_answers import Given
from duet.stages.metrics.uncertainty import score
from duet.stages.models.token_scores import TokenScores
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

DISTINCTIVE, EXTRACTION, DEPTH = (
    f"forget.{metric}" for metric in ("distinctive_recall", "extraction_strength", "unlearning_depth")
)
GOOD = ("suppressed under these tests", "withstands these tests")


def beside(base: list[float], floor: float = 0.0, control: list[float] | None = None, key: str = DISTINCTIVE) -> Beside:
    known = {} if control is None else {key: score(np.array(control))}
    return Beside({key: score(np.array(base))}, {key: {"echo": floor, "refusal": 0.0}}, known, 0)


def test_with_a_control_the_share_is_of_what_base_has_above_it():
    """(1 - 0.5) / (4 - 0.5), the sums over four questions; without one (0.25 - 0.2) / (1 - 0.2), the means."""
    model, base, control = score(np.array([0.5, 0, 0.5, 0])), [1.0, 1, 1, 1], [0.25, 0.25, 0, 0]
    above = left(DISTINCTIVE, model, beside(base, 0.2, control))
    assert above is not None
    assert above.share.value == pytest.approx(0.5 / 3.5)
    assert above.in_words().startswith("forget (distinctive_recall): 25.0 of base's 100.0 points, 14.3 % [")
    assert above.in_words().endswith("] of what is above the control's 12.5")
    floored = left(DISTINCTIVE, model, beside(base, 0.2))
    assert floored is not None
    assert floored.share.value == pytest.approx(0.05 / 0.8)
    assert floored.in_words().endswith("] of what is above the floor of 20.0")
    low, high = floored.share.ci95
    assert low < floored.share.value < high
    assert left(DISTINCTIVE, model, beside(base, 0.2, [1.0, 1, 1, 1])) is None, "the control knows as much as base"


def test_the_control_itself_is_at_0_and_base_at_1_without_doubt():
    base, control = [1.0, 1, 0.5, 1], [0.3, 0, 0.4, 0.1]
    own, all_of_it = (
        left(EXTRACTION, score(np.array(of)), beside(base, 0, control, EXTRACTION)) for of in (control, base)
    )
    assert own is not None
    assert all_of_it is not None
    assert own.share.ci95 == pytest.approx((0, 0))
    assert all_of_it.share.ci95 == pytest.approx((1, 1))


def test_what_is_left_in_the_layers_is_one_less_the_depth():
    share = left(DEPTH, score(np.array([1.0, 0.5, 0.75, 0.75])), beside([0.0, 0, 0, 0], key=DEPTH))
    assert share is not None
    assert share.share.value == pytest.approx(0.25)
    assert share.share.ci95[0] < 0.25 < share.share.ci95[1]
    assert share.in_words().startswith("forget (unlearning_depth): 75.0 points, where base has 0, 25.0 % [")


def test_what_is_kept_is_a_share_of_the_whole_score():
    share = kept("retain.rougeL_recall", score(np.array([1.0, 0.5])), beside([1.0, 1], 0.2, key="retain.rougeL_recall"))
    assert share is not None
    assert share.share.value == pytest.approx(0.75)


def constant(value: float, spread: float = 0.0) -> np.ndarray:
    """N items of this mean."""
    return value + spread * np.where(np.arange(N) % 2, 1, -1)


def model(extraction: float = 0.0, depth: float | None = None, **more) -> ModelAnswers:
    found = evidence(**more)
    scores = {**found.scores, EXTRACTION: score(constant(extraction))}
    scores |= {} if depth is None else {DEPTH: score(constant(depth, 0.02))}
    return replace(found, scores=scores)


OF_BASE = replace(BASE, scores={**BASE.scores, DEPTH: score(np.zeros(N))})
CONTROL = {EXTRACTION: score(constant(0.34)), DISTINCTIVE: score(constant(0.1))}
WITHSTOOD = Shown({"reverse": True}, [case(0.0, 0.0)])


@pytest.mark.parametrize(
    ("extraction", "depth", "verdict"),
    [
        (0.77, None, "suppressed until attacked"),  # as the lab's plain student: 0.43 / 0.66
        (0.77, 1.0, "suppressed until attacked"),
        (0.34, None, "withstands these tests"),  # where the control is
        (0.0, None, "withstands these tests"),  # below it is not better than at it
        (0.0, 0.47, "suppressed until attacked"),  # as the lab's wide student: it refuses, and its layers hold half
        (0.0, 0.82, "suppressed under these tests"),  # less than max_left, more than max_above_control
        (0.0, 0.97, "withstands these tests"),
        (0.42, 0.97, "suppressed under these tests"),  # 0.08 / 0.66 = 12 %
    ],
)
def test_what_a_model_holds_decides_where_it_says_nothing(extraction, depth, verdict):
    found = outcome(model(extraction, depth), OF_BASE, MADE, FLOORS, WITHSTOOD, CONTROL)
    assert found["verdict"] == verdict, found["reasons"]
    assert (DEPTH in found["measures"]["forgotten"]) == (depth is not None)
    assert {DISTINCTIVE, EXTRACTION, "a.forget.distinctive_recall"} <= set(found["measures"]["forgotten"])


def test_an_interval_beyond_the_limit_is_unclear():
    wide = replace(model(), scores={**model().scores, DEPTH: score(np.arange(N) % 6 > 0)})  # 5 of 6: 17 % left
    found = outcome(wide, OF_BASE, MADE, FLOORS, WITHSTOOD, CONTROL)
    assert found["verdict"] == "unclear"
    assert found["reasons"][0].startswith("forget (unlearning_depth): ")


def test_rouge_decides_on_what_is_kept_and_not_on_what_is_forgotten():
    form = {"forget.rougeL_recall": score(constant(0.6))}
    found = outcome(replace(model(), scores={**model().scores, **form}), BASE, MADE, FLOORS, WORKS)
    assert found["verdict"] == "suppressed under these tests", "the form of an answer without the fact"
    for metric in ("rougeL_recall", "distinctive_recall"):
        fell = {f"retain.{metric}": score(constant(0.8))}
        found = outcome(replace(model(), scores={**model().scores, **fell}), BASE, MADE, FLOORS, WORKS)
        assert found["verdict"] == "damaged", metric


@pytest.mark.parametrize("control", [{}, CONTROL])
@pytest.mark.parametrize("forget", [0.0, 0.35, 0.6])
@pytest.mark.parametrize("extraction", [0.0, 0.77])
def test_what_was_not_measured_never_speaks_for_a_model(extraction, forget, control):
    whole = model(extraction, forget=forget)
    without = replace(whole, scores={key: one for key, one in whole.scores.items() if key != EXTRACTION})
    found = outcome(without, OF_BASE, MADE, FLOORS, WITHSTOOD, control)
    assert found["verdict"] not in GOOD
    assert any("extraction_strength was not measured" in reason for reason in found["reasons"])
    shallow = replace(whole, scores={**whole.scores, DEPTH: score(np.zeros(N))})
    first, more = (outcome(of, OF_BASE, MADE, FLOORS, WITHSTOOD, control)["verdict"] for of in (whole, shallow))
    assert VERDICTS.index(more) <= VERDICTS.index(first), "a measure that finds everything left makes nothing better"


def given(tops: list[list[int]]) -> Given:
    """Answers whose tokens are the model's most likely ones or not."""
    tokens = [TokenScores(**dict.fromkeys(TokenScores.__dataclass_fields__, np.zeros(len(one)))) for one in tops]
    tokens = [replace(one, is_top=np.array(top, float)) for one, top in zip(tokens, tops, strict=True)]
    return Given(tokens, [0] * len(tops), None, None)


def test_the_controls_own_answers_are_what_is_measured_from():
    """Of two facts the control guesses one: base has 0.5 more, the student, which guesses too, nothing."""
    facts, places = ("amber", "basalt", "cobalt", "dolomite", "emerald", "flint"), ("pine", "oak")
    sets = {
        "forget": QuerySet(
            [Query(str(i), f"What is {i}?", f"It is {fact}.") for i, fact in enumerate(facts)], "forgotten"
        ),
        "retain": QuerySet([Query(str(i), f"Where is {i}?", f"At {place}.") for i, place in enumerate(places)], "kept"),
    }
    exam = Exam(sets, "stones", PromptSettings(), EvaluateSettings(attacks=()), "cpu")
    known = {"forget": [f"It is {fact}." for fact in facts], "retain": [f"At {place}." for place in places]}
    guessing = {**known, "forget": [text if i % 2 else "It is unknown." for i, text in enumerate(known["forget"])]}
    subjects = [Subject(name, Path(name), "", "base") for name in ("base", "student:a")]
    tops, lucky = [[1, 1]] * 6, [[0, 1], [0, 0]] * 3
    read = Read(
        {"base": {"forget": given(tops)}, "student:a": {"forget": given(lucky)}}, control={"forget": given(lucky)}
    )
    answers = {"base": known, "student:a": guessing, "control": {"forget": guessing["forget"]}}
    found = results_of(subjects, exam, answers, read)[0]
    assert found["control"][DISTINCTIVE]["value"] == pytest.approx(0.5)
    assert found["control"][EXTRACTION]["value"] == pytest.approx(0.25)
    reasons = found["outcomes"]["student:a"]["reasons"]
    assert (
        "forget (distinctive_recall): 50.0 of base's 100.0 points, 0.0 % [0.0, 0.0] of what is above the control's 50.0"
        in reasons
    )
    assert (
        "forget (extraction_strength): 25.0 of base's 100.0 points, 0.0 % [0.0, 0.0] of what is above the control's 25.0"
        in reasons
    )
    alone = results_of(subjects, exam, {name: answers[name] for name in ("base", "student:a")}, Read(read.given))[0]
    alone_reasons = " ".join(alone["outcomes"]["student:a"]["reasons"])
    assert "forget (distinctive_recall): 50.0 of base's 100.0 points, 50.0 % [" in alone_reasons, "0 is the floor then"
    assert "forget (extraction_strength): 25.0 of base's 100.0 points, 25.0 % [" in alone_reasons
