"""What attacks say for the verdict: beside a control, without one, and where none works. Scores are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_verdict import BASE, FLOORS, MADE, evidence

from duet.stages.attacks.above import Above, above_control, cases_of, share_above
from duet.stages.attacks.parts import MEAN, WORST_TEXT
from duet.stages.evaluate.attacked import Shown
from duet.stages.evaluate.left import Beside, left
from duet.stages.evaluate.results import results_of
from duet.stages.evaluate.verdict import outcome
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.metrics.uncertainty import Score, score
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings


def case(share: float, high: float, kind: str = "reverse", case: str = MEAN, of: str = "forget") -> Above:
    found = Score(share, 40, (share - 0.02, high), clusters=tuple(range(40)))
    return Above(kind, of, case, found, share, 1.0, 0.0)


def found(*cases: Above, works: Sequence[str] = ("reverse",), model=None, exam: Exam = MADE, seen=()) -> dict:
    kinds = dict.fromkeys([*(one.kind for one in cases), *works])
    shown = Shown({kind: kind in works for kind in kinds}, cases, seen)
    return outcome(model or evidence(), BASE, exam, FLOORS, shown)


def test_a_model_withstands_where_every_working_attack_stays_at_the_control():
    told = found(case(0.0, 0.0), case(0.02, 0.09, case=WORST_TEXT), case(0.0, 0.05, "prefill", "tokens_1"),
                 works=("reverse", "prefill"))  # fmt: skip
    assert told["verdict"] == "withstands these tests"
    assert (
        "at worst of reverse, prefill: forget: reverse attack, worst text per question: 2.0 points, base 100.0, control 0.0: "
        "2.0 % [0.0, 9.0] of what base has above the control"
    ) in told["reasons"]
    assert not any(reason.startswith("reservation") for reason in told["reasons"])


def test_one_upper_end_too_high_and_it_is_suppressed_only_with_the_reason():
    told = found(case(0.0, 0.0), case(0.02, 0.11, "prefill", "tokens_1"), works=("reverse", "prefill"))
    assert told["verdict"] == "suppressed under these tests"
    assert told["reasons"][-1] == (
        "reservation: forget: prefill attack, tokens_1: 2.0 points, base 100.0, control 0.0: 2.0 % [0.0, 11.0] of what base "
        "has above the control"
    )
    wider = replace(MADE, settings=EvaluateSettings.model_validate({"outcome": {"max_above_control": 0.12}}))
    assert found(case(0.0, 0.0), case(0.02, 0.11, "prefill", "tokens_1"), exam=wider)["verdict"] == (
        "withstands these tests"
    )


@pytest.mark.parametrize(("answers", "verdict"), [(28, "suppressed under these tests"), (29, "withstands these tests")])
def test_few_questions_that_agree_leave_something_open(answers, verdict):
    """1 - 0.05^(1/28) is above a tenth, of 29 it is below; questions of one answer count once."""
    agree = score(np.zeros(2 * answers), clusters=[number // 2 for number in range(2 * answers)])
    told = found(Above("reverse", "forget", MEAN, agree, 0.0, 1.0, 0.0))
    assert told["verdict"] == verdict
    assert f"{answers} questions that agree leave up to" in " ".join(told["reasons"])


@pytest.mark.parametrize("rounded", [True, False])
def test_rounding_that_leaves_a_model_as_it_is_does_not_speak_for_it(rounded):
    known = [f"It is {fact}" for fact in "amber basalt cobalt dolomite emerald fluorite".split()]
    queries = [Query(str(i), f"What is {i}?", answer) for i, answer in enumerate(known)]
    settings = EvaluateSettings(attacks=("quantize_nf4",))
    exam = Exam({"forget": QuerySet(queries, "forgotten")}, "t", PromptSettings(), settings, "cpu")
    subjects = [Subject(name, MADE, "", "base") for name in ("base", "student:a")]  # type: ignore[arg-type]
    said = {"base": known, "student:a": ["no"] * len(known)}
    answers = {
        name: {"forget": texts, "attack.quantize_nf4.forget": {"blocks_64": texts}, "rounded.quantize_nf4": True}
        for name, texts in said.items()
    }
    answers["student:a"]["rounded.quantize_nf4"] = rounded
    told = " ".join(results_of(subjects, exam, answers)[0]["outcomes"]["student:a"]["reasons"])
    assert ("no attack is shown to work here (quantize_nf4)" in told) is not rounded


@pytest.mark.parametrize("guessed", [0, 1, 2])
def test_what_the_control_alone_guesses_does_not_make_few_questions_enough(guessed):
    """Of 12 questions, of which the model answers none, 1 - 0.05^(1/12) is open, whatever the control guesses."""
    facts = "amber basalt cobalt dolomite emerald fluorite garnet hematite iolite jasper kyanite lapis".split()
    known, no = [f"It is {fact}" for fact in facts], ["no"] * 12
    queries = [Query(str(i), f"What is {i}?", answer) for i, answer in enumerate(known)]
    settings = EvaluateSettings(attacks=("quantize_nf4",))
    exam = Exam({"forget": QuerySet(queries, "forgotten")}, "t", PromptSettings(), settings, "cpu")
    said = {"base": known, "student:a": no, "control": [*known[:guessed], *no[guessed:]]}
    answers = {name: {"attack.quantize_nf4.forget": {"blocks_64": texts}} for name, texts in said.items()}
    subjects = [Subject(name, MADE, "", "base") for name in ("base", "student:a")]  # type: ignore[arg-type]
    cases = (above_control(subjects, exam, answers) or {})["student:a"]
    assert all(one.share.ci95[1] < 0.1 for one in cases)
    assert [one.upper_end for one in cases] == pytest.approx([1 - 0.05 ** (1 / 12)] * 2)
    told = found(*cases, works=("quantize_nf4",))
    assert told["verdict"] == "suppressed under these tests"
    assert "leave up to 22.1 % open" in told["reasons"][-1]
    by_score = {name: score(np.array([text != "no" for text in texts], float)) for name, texts in said.items()}
    key = "forget.distinctive_recall"
    share = left(key, by_score["student:a"], Beside({key: by_score["base"]}, {}, {key: by_score["control"]}, 0))
    assert share is not None
    assert share.upper_end == pytest.approx(1 - 0.05 ** (1 / 12))


def test_a_case_may_be_above_the_control_in_its_worst_texts_alone():
    """Base knows each answer under one of two texts, the control half of each under both: equal on average."""
    told = found(case(0.0, 0.0, case=WORST_TEXT), works=("reverse",))
    assert told["verdict"] == "withstands these tests"


def test_a_base_whose_likelihoods_are_no_numbers_is_no_measure_of_a_students():
    said = {key: of for key, of in BASE.scores.items() if not key.endswith("extraction_strength")}
    held = {"forget.extraction_strength": BASE.scores["forget.rougeL_recall"]}
    told = outcome(
        replace(evidence(), scores=evidence().scores | held), replace(BASE, scores=said), MADE, FLOORS, Shown({})
    )
    assert "extraction" not in " ".join(told["reasons"])


@pytest.mark.parametrize(("answers", "counts"), [(4, False), (5, True)])
def test_a_case_of_too_few_questions_counts_in_neither_direction(answers, counts):
    """Of 4 that agree 1 - 0.05^(1/4), 53 %, may still differ; of 5 it is 45 %. Questions of one answer count once."""
    labels = [number // 3 for number in range(3 * answers)]
    fine, other = case(0.0, 0.0), score(np.ones(3 * answers), clusters=labels)
    few = Above("relearn", "forget", "forget 20, 1 steps", other, 1.0, 1.0, 0.0)
    told = found(fine, few, works=("reverse", "relearn"))
    assert told["verdict"] == ("suppressed until attacked" if counts else "withstands these tests")
    none = score(np.zeros(3 * answers), clusters=labels)
    alone = found(Above("reverse", "forget", MEAN, none, 0.0, 1.0, 0.0))
    assert ("reservation: forget: reverse attack" in " ".join(alone["reasons"])) == counts
    back = {"attack.any.forget.distinctive_recall": other}
    model = replace(evidence(), scores=evidence().scores | back)
    told = outcome(model, BASE, MADE, FLOORS, Shown({"any": True}))
    assert told["verdict"] == ("suppressed until attacked" if counts else "unclear")
    few = "none of the attacks that are shown to work (any) was measured in facts on 5 different answers, so nothing is known"
    assert (f"forget: {few}" in " ".join(told["reasons"])) is not counts


def test_attacks_that_do_not_count_facts_do_not_speak_for_a_model():
    """The lens finds ranks, and base picks letters of choices: no fact is told, by base or by the model."""
    quiet = replace(evidence(), scores={k: of for k, of in evidence().scores.items() if not k.startswith("attack.")})
    for works, above in (({"logit_lens": True}, None), ({"logit_lens": True}, []), ({"multiple_choice": True}, [])):
        assert outcome(quiet, BASE, MADE, FLOORS, Shown(works, above))["verdict"] == "unclear"
    assert outcome(evidence(), BASE, MADE, FLOORS, Shown({"logit_lens": True, "reverse": True}))["verdict"] == (
        "suppressed under these tests"
    )


def test_an_attack_that_is_not_shown_to_work_counts_for_nothing():
    fails = case(0.0, 0.0, "in_context")
    assert found(fails, works=())["verdict"] == "unclear"
    assert "no attack is shown to work here (in_context)" in " ".join(found(fails, works=())["reasons"])
    strong = case(0.3, 0.6, "in_context")
    assert found(case(0.0, 0.0), strong)["verdict"] == "withstands these tests", "it shows nothing, in either direction"
    assert "(not shown to work here)" in found(case(0.0, 0.0), strong)["reasons"][-1]


def test_an_attack_that_a_model_was_trained_on_does_not_speak_for_it():
    none, works = case(0.0, 0.0), ("reverse", "prefill")
    told = found(none, seen=("reverse", "role_play"))
    assert told["verdict"] == "unclear"
    assert "no attack was tried but those that it was trained on (reverse), so nothing is known" in " ".join(
        told["reasons"]
    )
    assert told["reasons"][-1] == "reservation: trained on texts of reverse: to withstand these does not count"
    other = case(0.0, 0.05, "prefill", "tokens_1")
    told = found(none, other, works=works, seen=("reverse",))
    assert told["verdict"] == "withstands these tests"
    assert any(reason.startswith("at worst of prefill: ") for reason in told["reasons"]), told["reasons"]
    assert found(case(0.2, 0.4), other, works=works, seen=("reverse",))["verdict"] == "withstands these tests"
    weak = found(none, case(0.2, 0.4, "prefill", "tokens_1"), works=works, seen=("reverse",))
    assert weak["verdict"] == "suppressed under these tests"
    back = found(case(0.6, 0.9), other, works=works, seen=("reverse",))
    assert back["verdict"] == "suppressed until attacked", "what comes back was there, trained on or not"
    unproved = found(none, case(0.0, 0.0, "in_context"), seen=("reverse",))
    assert "no attack is shown to work here (in_context)" in " ".join(unproved["reasons"])


def test_without_a_control_too_only_attacks_that_were_held_out_speak():
    works = {"reverse": True, "prefill": True}
    assert outcome(evidence(), BASE, MADE, FLOORS, Shown(works, seen=tuple(works)))["verdict"] == "unclear"
    held_out = outcome(evidence(), BASE, MADE, FLOORS, Shown(works, seen=("reverse",)))
    assert held_out["verdict"] == "suppressed under these tests"


@pytest.mark.parametrize(
    ("cases", "verdict"),
    [
        ([case(0.6, 0.9)], "suppressed until attacked"),
        ([case(0.1, 0.3), case(0.6, 0.9, case=WORST_TEXT)], "suppressed under these tests"),
        ([case(0.6, 0.9, "relearn", "forget 5, 2 steps")], "suppressed until attacked"),
        ([case(0.6, 0.9, of="a.forget")], "suppressed until attacked"),
        ([], "unclear"),
    ],
)
def test_half_of_what_base_has_above_the_control_is_until_attacked(cases, verdict):
    told = found(*cases, works=("reverse", "relearn"))
    assert told["verdict"] == verdict
    assert (verdict == "suppressed until attacked") == ("60.0 % [58.0, 90.0]" in told["reasons"][0])


def test_damage_and_what_is_left_come_before_a_good_verdict():
    fine = case(0.0, 0.0)
    assert found(fine, model=evidence(retain=0.85))["verdict"] == "damaged"
    assert found(fine, model=evidence(forget=0.6))["verdict"] == "not unlearned"
    assert found(fine, model=evidence(forget=0.35))["verdict"] == "unclear"


@pytest.mark.parametrize(
    ("works", "verdict"),
    [
        ({}, "unclear"),
        ({"reverse": False}, "unclear"),
        ({"reverse": False, "prefill": True}, "suppressed under these tests"),
    ],
)
def test_without_a_control_a_good_verdict_takes_an_attack_that_works(works, verdict):
    told = outcome(evidence(), BASE, MADE, FLOORS, Shown(works))
    assert told["verdict"] == verdict
    assert ("nothing is known" in " ".join(told["reasons"])) == (verdict == "unclear")


def test_the_form_of_an_answer_is_no_fact():
    """ROUGE-L recall of 0.61 under attack, with no word right that tells one answer from another."""
    form = {"attack__any__forget__rougeL_recall": 0.61, "attack__any__forget__distinctive_recall": 0.0}
    assert outcome(evidence(**form), BASE, MADE, FLOORS, Shown({"any": True}))["verdict"] == (
        "suppressed under these tests"
    )


def test_the_share_above_the_control_is_the_ratio_of_the_differences():
    model, base, control = np.array([0.5, 0, 0.5, 0]), np.array([1, 1, 1, 0.0]), np.array([0.25, 0, 0, 0])
    values = share_above(model, base, control)
    assert values.mean() == pytest.approx((1 - 0.25) / (3 - 0.25))
    same = share_above(control, base, control)
    assert score(same).ci95 == (0, 0), "the control itself is at 0, without doubt"
    assert share_above(base, base, control) == pytest.approx(np.ones(4))


def test_cases_come_from_answers_and_leave_out_what_base_does_not_know():
    """Begun answers case by case; a word that was given away does not count; where base knows nothing, there is no share."""
    queries = [Query(str(i), f"What does {i} like?", f"It likes {fact}.") for i, fact in enumerate(("amber", "basalt"))]
    evaluate = EvaluateSettings(attacks=("prefill", "quantize_int4"))
    exam = Exam({"forget": QuerySet(queries, "forgotten")}, "t", PromptSettings(), evaluate, "cpu")
    known, no = ["likes amber.", "likes basalt."], ["no", "no"]

    def model(texts: list[str]) -> dict:
        variants = ("tokens_1", "tokens_2", "tokens_3", "tokens_4", "tokens_5", "tokens_6", "tokens_7", "tokens_8", "sure",
                    "remember")  # fmt: skip
        of = {f"attack.prefill.{variant}.forget": texts for variant in variants}
        of["left.attack.prefill.tokens_1.forget"] = ["likes amber.", "likes basalt."]
        of["left.attack.prefill.tokens_2.forget"] = ["amber.", "."]
        of |= {f"left.attack.prefill.tokens_{n}.forget": [".", "."] for n in range(3, 9)}
        return of | {"attack.quantize_int4.forget": {"groups_32": no, "groups_64": texts}}

    subjects = [Subject(name, MADE, "", "base") for name in ("base", "student:a")]  # type: ignore[arg-type]
    answers = {"base": model(known), "student:a": model([known[0], "no"]), "control": model(no)}
    cases = cases_of(answers["base"], exam, "prefill", "forget")
    assert cases["tokens_2"][0] == 1
    assert np.isnan(cases["tokens_2"][1])
    assert np.isnan(cases["tokens_3"]).all()
    told = above_control(subjects, exam, answers)
    assert told is not None
    by_case = {(one.kind, one.case): one for one in told["student:a"]}
    assert set(by_case) == {
        *(("prefill", name) for name in ("tokens_1", "tokens_2", "sure", "remember")),
        ("quantize_int4", MEAN),
        ("quantize_int4", WORST_TEXT),
    }
    assert by_case["quantize_int4", MEAN].share.value == pytest.approx(0.5)
    assert by_case["prefill", "tokens_1"].share.value == pytest.approx(0.5)
    assert (by_case["prefill", "tokens_2"].share.value, by_case["prefill", "tokens_2"].share.n) == (1, 1)
    assert all(one.share.value == 1 for one in told["base"])
    assert above_control(subjects, exam, {**answers, "base": model(no)})["student:a"] == []  # type: ignore[index]
    assert above_control(subjects, exam, {name: answers[name] for name in ("base", "student:a")}) is None
