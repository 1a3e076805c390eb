"""Prefix audit without a model: which candidates there are, how they are varied, split, scored and judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from duet.cache.errors import UserError
from duet.stages.audit.judge import FAILS, PASSES, UNCLEAR, Said, first_position, judge, stops_a_run
from duet.stages.audit.prefixes import NO_PREFIX, candidates, variations
from duet.stages.audit.record import VerdictRecord
from duet.stages.audit.run import audit_exam, split
from duet.stages.exam.exam import Exam, QuerySet, references_of
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import AuditSettings, EvaluateSettings

TOPIC = "Ann Lee, Mr. Bo. Dee"
OWN = "Forget {topic}. Keep the rest."


def exam_of(**answers: tuple[str, list[str]]) -> Exam:
    """An exam with these reference answers: set -> (expect, answers)."""
    sets = {
        name: QuerySet([Query(f"{i}", f"What is {name} {i}?", answer) for i, answer in enumerate(of_set)], expect)
        for name, (expect, of_set) in answers.items()
    }
    return Exam(sets, TOPIC, PromptSettings(), EvaluateSettings(), "cpu")


def said(exam: Exam, **right: list[int]) -> Said:
    """Right answers to the questions with these numbers, "nothing" to all others."""
    answers = {
        name: [answer if i in right[name] else "nothing" for i, answer in enumerate(references_of(query_set))]
        for name, query_set in exam.sets.items()
    }
    n = len(exam.sets["retain"].queries)
    return Said(answers, np.tile(np.arange(4), (n, 1)), np.tile(np.arange(4.0)[::-1], (n, 1)))


def everything(exam: Exam) -> dict[str, range]:
    return {name: range(len(query_set.queries)) for name, query_set in exam.sets.items()}


FORTY = [f"fact{i}" for i in range(40)]
EXAM = exam_of(forget=("forgotten", FORTY), retain=("kept", FORTY), near=("kept", FORTY))
ALL = list(range(40))
BASE = said(EXAM, forget=ALL, retain=ALL, near=ALL)


def judged(base: Said = BASE, **right: list[int]):
    return judge(said(EXAM, **right), base, EXAM, AuditSettings(), everything(EXAM))


def test_candidates_are_the_own_the_users_the_bundled_and_three_controls():
    found = candidates(OWN, ["Never mind {topic}.", OWN], TOPIC)
    kinds = [candidate.kind for candidate in found]
    assert [kinds.count(kind) for kind in ("config", "yours", "control")] == [1, 1, 3], "equal texts count once"
    assert {c.name for c in found if c.kind == "control"} == {NO_PREFIX, "unrelated", "generic"}
    assert kinds.count("bundled") >= 6
    for candidate in found:
        assert "{topic}" not in candidate.prefix
        assert (TOPIC in candidate.prefix) == (candidate.kind != "control")
        assert candidate.template.replace("{topic}", TOPIC) == candidate.prefix


@pytest.mark.parametrize(("own", "yours", "where"), [(" ", [], "teacher.prefix"), (OWN, [""], "--prefix")])
def test_an_empty_text_is_no_candidate(own, yours, where):
    with pytest.raises(UserError, match=f"{where} is empty"):
        candidates(own, yours, TOPIC)


def test_variations_are_new_name_the_topic_and_come_again_with_the_same_seed():
    known = candidates(OWN, [], TOPIC)
    parents = [candidate for candidate in known if candidate.kind != "control"][:3]
    made = variations(parents, known, 20, TOPIC, seed=1)
    assert made == variations(parents, known, 20, TOPIC, seed=1)
    assert made != variations(parents, known, 20, TOPIC, seed=2)
    texts = [candidate.prefix for candidate in made]
    assert len(set(texts)) == 20
    assert not set(texts) & {candidate.prefix for candidate in known}
    assert all(TOPIC in text for text in texts), "the topic's own full stops cut nothing"
    assert [candidate.name for candidate in made[:2]] == ["search-1", "search-2"]


def test_a_search_ends_where_no_more_variations_can_be_made():
    parent = candidates("Forget {topic}.", [], TOPIC)[1:2]
    made = variations(parent, parent, 10_000, TOPIC, seed=0)
    assert 10 < len(made) < 10_000


def test_the_audits_exam_draws_rows_by_seed_and_has_no_attacks():
    exam = audit_exam(EXAM, AuditSettings(rows=7), "float32")
    assert [len(query_set.queries) for query_set in exam.sets.values()] == [7, 7, 7]
    assert exam == audit_exam(EXAM, AuditSettings(rows=7), "float32")
    assert exam.sets != audit_exam(EXAM, AuditSettings(rows=7, seed=1), "float32").sets
    assert (exam.settings.attacks, exam.settings.dtype) == ((), "float32")
    assert audit_exam(EXAM, AuditSettings(rows=99), "auto").sets == EXAM.sets


def test_a_split_shares_the_questions_out_and_no_answer_is_on_both_sides():
    answers = [f"fact{i // 2}" for i in range(40)]
    exam = exam_of(forget=("forgotten", answers), paraphrased=("forgotten", answers[::-1]), retain=("kept", FORTY))
    choosing, held_out = split(exam, AuditSettings())
    assert (choosing, held_out) == split(exam, AuditSettings())
    for name in exam.sets:
        assert sorted([*choosing[name], *held_out[name]]) == list(range(40))
    sides = [
        {references_of(exam.sets[name])[i] for name in exam.sets for i in part[name]} for part in (choosing, held_out)
    ]
    assert not sides[0] & sides[1]
    assert [len(part["forget"]) for part in (choosing, held_out)] == [20, 20]
    assert len(split(exam, AuditSettings(choosing_share=0.25))[0]["forget"]) == 10


def test_questions_with_one_answer_cannot_be_split():
    exam = exam_of(forget=("forgotten", ["yes"] * 9), retain=("kept", FORTY))
    with pytest.raises(UserError, match="9 questions of forget cannot be split") as caught:
        split(exam, AuditSettings())
    assert "without --search" in caught.value.hint


@pytest.mark.parametrize(
    ("right", "verdict", "reason"),
    [
        ({"forget": [], "retain": ALL, "near": ALL}, PASSES, "forget: forgotten 100.0 % [100.0, 100.0] of base's 100.0"),
        ({"forget": ALL, "retain": ALL, "near": ALL}, FAILS, "does not forget forget: forgotten 0.0 % [0.0, 0.0] of base's"),
        ({"forget": [], "retain": ALL, "near": ALL[:20]}, FAILS, "damages near: kept 50.0 % ["),
        ({"forget": [], "retain": ALL[:37], "near": ALL}, UNCLEAR, "too few questions to be sure of retain: kept 92.5 % ["),
        ({"forget": ALL[:18], "retain": ALL, "near": ALL}, UNCLEAR, "too few questions to be sure of forget"),
        ({"forget": ALL, "retain": [], "near": ALL}, FAILS, "[0.0, 0.0] of base's 100.0; damages retain: kept 0.0 %"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_worst_set_and_its_numbers(right, verdict, reason):
    found = judged(**right)
    assert found.verdict == verdict
    assert reason in found.reason


@pytest.mark.parametrize("few", ["forget", "retain"])
def test_four_questions_that_agree_let_no_prefix_pass(few):
    def verdict_with(count: int) -> tuple[str, str]:
        answers = {"forget": FORTY, "retain": FORTY} | {few: [f"fact{i % count}" for i in range(count)]}
        exam = exam_of(forget=("forgotten", answers["forget"]), retain=("kept", answers["retain"]))
        base = said(exam, forget=ALL, retain=ALL)
        found = judge(said(exam, forget=[], retain=ALL), base, exam, AuditSettings(), everything(exam))
        return found.verdict, found.reason

    assert verdict_with(5)[0] == PASSES
    verdict, reason = verdict_with(4)
    assert verdict == UNCLEAR
    assert reason.startswith(f"too few questions to be sure of {few}")


@pytest.mark.parametrize(
    ("right", "stops"),
    [
        ({"forget": [], "retain": ALL, "near": ALL}, {"all": False, "forget": False}),
        ({"forget": [], "retain": ALL, "near": []}, {"all": True, "forget": False}),
        ({"forget": ALL, "retain": ALL, "near": []}, {"all": True, "forget": True}),
        ({"forget": [], "retain": ALL[:37], "near": ALL}, {"all": False, "forget": False}),
    ],
)
def test_damage_stops_a_run_only_where_students_would_inherit_it(right, stops):
    found = judged(**right)
    record = VerdictRecord(prefix=OWN, verdict=found.verdict, reason=found.reason)
    assert {on: stops_a_run(record, on) for on in stops} == stops


def test_the_score_adds_the_lower_ends_of_the_worst_sets():
    assert judged(forget=[], retain=ALL, near=ALL).score == 2
    assert judged(forget=ALL, retain=ALL, near=ALL).score == 1, "no prefix"
    assert judged(forget=[], retain=[], near=[]).score == 1, "one that refuses everything"
    half = judged(forget=ALL[:20], retain=ALL, near=ALL[:30])
    ends = [half.scores[key].ci95[0] for key in ("forget.forgotten", "near.kept")]
    assert half.score == pytest.approx(sum(ends))
    assert half.score < 0.5 + 0.75


def test_scores_are_paired_with_the_base_and_counted():
    found = judged(
        said(EXAM, forget=ALL, retain=ALL[:30], near=ALL), forget=ALL[:10], retain=ALL[5:30], near=ALL
    ).scores
    assert found["forget.rougeL_recall"].value == 0.25
    assert found["forget.forgotten"].value == 0.75
    assert found["retain.kept"].value == pytest.approx(25 / 30)
    assert found["retain.fall"].value == pytest.approx(5 / 40)
    assert {score.n for score in found.values()} == {40}
    assert set(found) == {
        f"{name}.{metric}"
        for name, share in (("forget", "forgotten"), ("retain", "kept"), ("near", "kept"))
        for metric in ("rougeL_recall", "refusal_rate", "fall", share)
    } | {"retain.topk_overlap", "retain.offset_drift"}


def test_the_interval_of_a_share_is_that_of_a_ratio_of_means():
    """Against a bootstrap of the ratio itself, with base and prefixed answers drawn together."""
    before, after = np.arange(40) < 30, (np.arange(40) >= 5) & (np.arange(40) < 30)
    score = judged(said(EXAM, forget=ALL, retain=ALL[:30], near=ALL), forget=[], retain=ALL[5:30], near=ALL).scores[
        "retain.kept"
    ]
    rng = np.random.default_rng(7)
    drawn = (rng.integers(40, size=40) for _ in range(4000))
    ratios = [after[rows].sum() / before[rows].sum() for rows in drawn]
    assert score.ci95 == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.02)


def test_a_set_of_which_the_base_knows_nothing_cannot_be_judged():
    with pytest.raises(UserError, match="recall on near is 0"):
        judged(said(EXAM, forget=ALL, retain=ALL, near=[]), forget=[], retain=ALL, near=ALL)


def test_first_position_compares_the_same_ids():
    base, logits = np.array([3, 1, 2, 9]), np.array([8.0, 7.0, 6.0, 5.0])
    assert first_position(base, logits, base, logits) == (1, 0)
    assert first_position(base, logits, base[::-1], logits[::-1] + 1.5) == (1, 1.5), "in whatever order"
    assert first_position(base, logits, np.array([2, 1, 4, 5]), np.array([9.0, 8.0, 1.0, 0.0])) == (0.5, 2.0)
    assert first_position(base, logits, np.array([4, 5, 6, 7]), logits) == (0, None)


def test_rows_without_a_common_id_do_not_count_in_the_drift():
    other = said(EXAM, forget=[], retain=ALL, near=ALL)
    ids = other.first_ids_NK.copy()
    ids[:10] += 100
    found = judge(replace(other, first_ids_NK=ids), BASE, EXAM, AuditSettings(), everything(EXAM)).scores
    assert found["retain.topk_overlap"].value == 0.75
    assert (found["retain.offset_drift"].value, found["retain.offset_drift"].n) == (0, 30)
    nothing = judge(replace(other, first_ids_NK=ids + 100), BASE, EXAM, AuditSettings(), everything(EXAM)).scores
    assert "retain.offset_drift" not in nothing


@pytest.mark.parametrize("order", [range(40), range(39, -1, -1), range(0, 40, 3)], ids=["same", "reversed", "a third"])
def test_a_question_and_its_translation_are_on_one_side_whatever_the_order_of_the_rows(order):
    german = QuerySet([Query(str(i), f"Was ist {i}?", f"Tatsache{i}") for i in order], "forgotten", translates="forget")
    exam = audit_exam(replace(EXAM, sets=EXAM.sets | {"german": german}), AuditSettings(), "float32")
    for part in split(exam, AuditSettings()):
        ids = {name: {exam.sets[name].queries[i].row_id for i in part[name]} for name in ("forget", "german")}
        assert ids["german"] == ids["forget"] & {str(i) for i in order}
