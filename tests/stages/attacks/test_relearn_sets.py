"""On what copies are trained, and the curves that are made of their answers, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duet.cache.errors import UserError
from duet.stages.attacks.relearn_curves import beside, relearning, scored, with_curves
from duet.stages.attacks.relearn_sets import Draw, RelearnSet, relearn_sets
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, QuerySet, Subject
from duet.stages.questions.queries import Query
from duet.stages.settings.attacks import RelearnSettings
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

FACTS = ("amber", "basalt", "copper", "diamond")


def an_exam(**relearn: Any) -> Exam:
    """Four forgotten questions, and two sets of three and two questions to be kept."""
    forget = [Query(str(i), f"What does {i} like?", f"It likes {fact}.") for i, fact in enumerate(FACTS)]
    kept = [Query(str(i), f"Where is {i}?", f"It is in {i}{i}{i}.") for i in range(3)]
    sums = [Query(str(i), f"{i} + 0?", f"It is {i}.") for i in range(2)]
    sets = {"forget": QuerySet(forget, "forgotten"), "retain": QuerySet(kept, "kept"), "sums": QuerySet(sums, "kept")}
    settings = {"pairs": (1, 9), "benign": 2, "steps": (1, 2), "lrs": (0.1, 0.2)} | relearn
    evaluate = EvaluateSettings(attacks=("relearn",), relearn=RelearnSettings(**settings))
    return Exam(sets, "t", PromptSettings(), evaluate, "cpu")


def test_pairs_come_from_the_topic_from_what_is_kept_and_from_another_domain():
    sets, skipped = relearn_sets(an_exam(other="sums", lora_rank=3), "forget")
    names = ["forget 1", "benign", "other"]
    assert [one.name for one in sets] == [*names, *(f"{name}, LoRA" for name in names)]
    assert [one.source for one in sets[:3]] == ["forget", "retain", "sums"]
    assert [[len(draw.pairs) for draw in one.draws] for one in sets[:3]] == [[1], [2], [2]]
    assert [one.lora_rank for one in sets] == [0, 0, 0, 3, 3, 3]
    (draw,) = sets[0].draws
    assert set(draw.pairs) | set(draw.asked) == set(range(4))
    assert not set(draw.pairs) & set(draw.asked)
    assert [one.draws for one in sets[3:]] == [one.draws for one in sets[:3]], "the same lessons"
    assert list(skipped) == ["forget 9"]


def test_pairs_are_drawn_as_often_as_is_said_and_a_draw_more_changes_no_other():
    once, often = (relearn_sets(an_exam(pairs=(1, 3), draws=draws), "forget")[0] for draws in (1, 5))
    assert [len(one.draws) for one in often] == [5, 5, 5]
    assert [one.draws[0] for one in often] == [one.draws[0] for one in once]
    assert len({draw.pairs for draw in often[0].draws}) > 1
    assert all(len(draw.asked) == 3 for draw in often[0].draws)
    assert often[0].asked == (0, 1, 2, 3), "what one draw teaches another asks"


@pytest.mark.parametrize("other", ["nothing", "forget", "retain"])
def test_another_domain_that_is_none_is_refused(other):
    with pytest.raises(UserError, match="not a further set to be kept with 2 questions") as caught:
        relearn_sets(an_exam(other=other), "forget")
    assert caught.value.hint == "such sets are sums"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lrs": ()}, "is not a list of ascending rates"),
        ({"lrs": (2e-5, 1e-5)}, "is not a list of ascending rates"),
        ({"steps": (5, 5)}, "is not a list of ascending numbers of steps"),
        ({"other": "sums", "benign": 0}, "other takes as many pairs as benign says"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        RelearnSettings(**settings)


def test_the_single_rate_of_before_is_refused_with_the_name_of_its_successor(lab_config):
    from duet.pipeline.config.load import load_config

    with pytest.raises(UserError) as caught:
        load_config(str(Path(lab_config(evaluate__relearn={"lr": 3e-4}))))
    assert "evaluate.relearn" in caught.value.what
    assert "lrs" in f"{caught.value.what} {caught.value.hint}"


FIRST, SECOND = Draw((0,), (1, 2, 3)), Draw((3,), (0, 1, 2))
ONE, TWO = RelearnSet("forget 1", "forget", (FIRST,)), RelearnSet("forget 1", "forget", (FIRST, SECOND))


def said(*facts: str) -> list[str]:
    return [f"It likes {fact}." for fact in facts]


def kept_of(after: dict[str, list[list[list[str]]]]) -> dict[str, Any]:
    return {"before": said(*["no"] * 4), "after": {"forget 1": after}}


def test_at_each_number_of_steps_the_rate_counts_that_brings_back_most():
    none, right = said("no", "no", "no"), said(*FACTS[1:])
    one_right = [right[0], *none[1:]]
    curve = scored(kept_of({"0.1": [[none, right]], "0.2": [[one_right, none]]}), an_exam(), "forget", ONE)
    values, best = curve.strongest(DISTINCTIVE)
    assert values.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert best.tolist()[1:] == [1, 0]
    assert curve.strongest(HEADLINE)[0][0].tolist() == pytest.approx([2 / 3] * 3), "the form alone"


def test_a_question_counts_with_its_mean_over_the_draws_that_ask_it():
    none, right = said("no", "no", "no"), said(*FACTS[1:])
    second = [said(FACTS[0], "no", "no"), said("no", FACTS[1], "no")]  # asks 0, 1, 2
    curve = scored(
        kept_of({"0.1": [[none, right], second], "0.2": [[none, none], [none, none]]}), an_exam(), "forget", TWO
    )
    values, best = curve.strongest(DISTINCTIVE)
    assert values.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0.5, 1]]
    assert best.tolist()[1:] == [0, 0]


def test_a_curve_stands_beside_the_controls():
    """Base knows all; the student has half back after one step and all after two, the control half after two."""
    exam = an_exam(pairs=(1,), benign=0)
    asked = relearn_sets(exam, "forget")[0][0].asked
    right = said(*(FACTS[i] for i in asked))
    rows = {"no": said("no", "no", "no"), "half": [*right[:2], "It likes no."], "all": right}

    def model(before: list[str], *after: str) -> dict[str, Any]:
        by_lr = {"0.1": [[rows["no"], rows["no"]]], "0.2": [[rows[key] for key in after]]}
        return {"attack.relearn.forget": {"before": before, "after": {"forget 1": by_lr}}}

    subjects = [Subject("base", Path("b"), "", "base"), Subject("student:a", Path("s"), "", "base")]
    answers = {
        "base": model(said(*FACTS), "all", "all"),
        "student:a": model(said(*["no"] * 4), "half", "all"),
        "control": model(said(*["no"] * 4), "no", "half"),
    }
    found = relearning(subjects, exam, with_curves(answers, exam))
    student, control = found["student:a"]["forget 1"], found["control"]["forget 1"]
    assert student[DISTINCTIVE] == pytest.approx([0, 2 / 3, 1])
    assert control[DISTINCTIVE] == pytest.approx([0, 0, 2 / 3])
    assert (student["to_half"], control["to_half"]) == (1, 2)
    assert student["best_lr"][1:] == [0.2, 0.2]
    assert student["by_lr"] == {"0.1": [0, 0, 0], "0.2": pytest.approx([0, 2 / 3, 1])}
    assert student["above_control"] == pytest.approx(2 / 3)
    assert (student["above_control_steps"], student["steps_ratio"]) == (1, 0.5)
    assert "above_control" not in control


def test_without_half_of_base_there_is_no_ratio():
    curve = {DISTINCTIVE: [0.9, 0.3, 0.2], "steps": [0, 4, 8], "to_half": None}
    control = {DISTINCTIVE: [0.0, 0.1, 0.2], "steps": [0, 4, 8], "to_half": 8}
    assert beside(curve, control) == {
        "above_control": pytest.approx(0.2),
        "above_control_steps": 4,
        "steps_ratio": None,
    }
