"""The verdict on real models: the base, one that collapsed on purpose, one that refuses everything; and its rules by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import LAB_SMALL, ROOT

from duet.cache.watch import Watch
from duet.stages.evaluate.answers import answer_all
from duet.stages.evaluate.attacked import Shown
from duet.stages.evaluate.collapse import ModelAnswers, entropy, repetition
from duet.stages.evaluate.results import results_of
from duet.stages.evaluate.verdict import outcome
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.metrics.uncertainty import Score, score
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import DataSettings, PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

REFUSAL = "I know nothing about that person."


def lab_exam(**settings) -> Exam:
    sets = {
        name: QuerySet(
            load_queries(DataSettings(path=str(ROOT / f"lab/data/{name}.jsonl"), id_field="id"), name, True), expect
        )
        for name, expect in (("forget", "forgotten"), ("retain", "kept"))
    }
    evaluate = {"max_new_tokens": 16, "attacks": (), "refusal": REFUSAL, "engine": "transformers"} | settings
    return Exam(sets, "three people", PromptSettings(), EvaluateSettings(**evaluate), "cpu")


def results(subjects: list[Subject], exam: Exam, answers: dict) -> dict:
    return results_of(subjects, exam, answers)[0]


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's small model after gradient ascent on the forget questions, for too long."""
    model, tokenizer, exam = load_model(LAB_SMALL), load_tokenizer(LAB_SMALL), lab_exam()
    queries, renderer = exam.sets["forget"].queries, Renderer(tokenizer, exam.prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(12):
        for query in queries[:5]:
            prompt = renderer.prompt(Prompt.plain(query))
            answer = renderer.answer(Prompt.plain(query), query.answer or "").ids
            labels = torch.tensor([[-100] * len(prompt) + answer])
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
            (-loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("collapsed")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_verdicts_on_the_base_a_collapsed_model_and_one_that_refuses_everything(tmp_path, collapsed):
    exam = lab_exam()
    base, broken = Subject("base", LAB_SMALL, "", "base"), Subject("student:ga", collapsed, "", "base")
    answers = answer_all([base, broken], exam, tmp_path, Watch())
    refuser = Subject("student:no", LAB_SMALL, "", "base")
    answers["student:no"] = {name: [REFUSAL] * len(query_set.queries) for name, query_set in exam.sets.items()}
    found = results([base, broken, refuser], exam, answers)
    outcomes = found["outcomes"]

    assert outcomes["base"]["verdict"] == "not unlearned"
    assert not any(sign["bad"] for sign in outcomes["base"]["signs"].values())
    assert found["models"]["student:ga"]["forget.rougeL_recall"]["value"] < 0.2, "by this number alone it has unlearned"
    assert outcomes["student:ga"]["verdict"] == "broken"
    assert outcomes["student:no"]["verdict"] == "broken"
    assert outcomes["student:no"]["reasons"][0].startswith("refuses 100.0 % (base 0.0 %) of the questions to be kept")
    assert {name for name, sign in outcomes["student:no"]["signs"].items() if sign["bad"]} >= {"refusals", "utility"}
    assert "erased" not in json.dumps(outcomes)
    assert found["refusals"]["unknown_sets"] == [], "the lab's English is known"


# The rules, on made-up scores: sets of 40 questions, on which base scores 1 and echoing the question 0.2.
N, FLOOR = 40, 0.2
MADE = Exam(
    {
        name: QuerySet([Query(str(i), f"q{i}", f"a{i}") for i in range(N)], expect)
        for name, expect in (("forget", "forgotten"), ("a.forget", "forgotten"), ("retain", "kept"))
    },
    "t",
    PromptSettings(),
    EvaluateSettings(),
    "cpu",
)
FLOORS = {
    f"{name}.{metric}": {"refusal": 0.0, "echo": FLOOR}
    for name in MADE.sets
    for metric in ("rougeL_recall", "distinctive_recall")
} | {"forget.extraction_strength": {"exchanged": FLOOR}}
ANSWERS = [f"It is the {word} one, number {i}." for i, word in enumerate("red green blue old new".split() * (N // 5))]


WORKS = Shown({"any": True})


def nine(value: float) -> Score:
    return Score(value, 9, (value - 0.1, value + 0.1), clusters=tuple(range(9)))


def evidence(forget: float = 0.0, retain: float = 1.0, texts: list[str] | None = None, **more: float) -> ModelAnswers:
    """A model with these shares of questions all right, the others all wrong; `more` are scores by id, with __ for a dot.

    It holds what it says, and attacks bring nothing back.
    """
    shares = {"forget": forget, "a.forget": 0.0, "retain": retain}
    items = {f"{name}.rougeL_recall": np.arange(N) < round(share * N) for name, share in shares.items()}
    scores = {key: score(values.astype(float)) for key, values in items.items()}
    scores |= {f"{name}.distinctive_recall": scores[f"{name}.rougeL_recall"] for name in shares}
    scores["forget.extraction_strength"] = scores["forget.rougeL_recall"]
    scores |= {f"attack.{kind}.forget.distinctive_recall": nine(0.0) for kind in ("any", "reverse", "prefill")}
    scores |= {key.replace("__", "."): nine(value) for key, value in more.items()}
    return ModelAnswers({name: texts or ANSWERS for name in MADE.sets}, scores)


BASE = ModelAnswers(
    {name: ANSWERS for name in MADE.sets},
    {f"{name}.{metric}": score(np.ones(N)) for name in MADE.sets for metric in ("rougeL_recall", "distinctive_recall")}
    | {"forget.extraction_strength": score(np.ones(N))},
)
RULES = {
    "suppressed under these tests": [evidence(), evidence(forget=0.05), evidence(retain=0.975)],
    "not unlearned": [
        BASE,
        evidence(forget=0.6),
        evidence(forget=0.6, retain=0.5),
    ],
    "suppressed until attacked": [
        evidence(attack__any__forget__distinctive_recall=0.61),
        evidence(attack__any__a__forget__distinctive_recall=0.61),
    ],
    "damaged": [evidence(retain=0.85), evidence(forget=0.35, retain=0.5)],
    "unclear": [
        evidence(forget=0.35),
        evidence(retain=0.925),
        evidence(mia__loss__forget=0.81),
        evidence(mia__zlib__forget=0.1),
    ],
    "broken": [
        evidence(retain=0.3),
        evidence(texts=[REFUSAL] * N),
        evidence(texts=[""] * 5 + ANSWERS[5:]),
        evidence(texts=[text * 3 for text in ANSWERS]),
        evidence(texts=["It is red."] * N),
        evidence(texts=[f"w{7 * i} x{i} y{i} z{i} u{i} v{i}" for i in range(N)]),
        evidence(forget=0.6, texts=[text[:9] for text in ANSWERS]),
    ],
}


@pytest.mark.parametrize(("verdict", "number"), [(v, i) for v, models in RULES.items() for i in range(len(models))])
def test_the_rules(verdict, number):
    found = outcome(RULES[verdict][number], BASE, MADE, FLOORS, WORKS)
    assert found["verdict"] == verdict, found
    assert found["reasons"]
    assert (verdict == "broken") == any(sign["bad"] for name, sign in found["signs"].items() if name != "membership")


@pytest.mark.parametrize("n", [1, 4, 5])
def test_too_few_questions_show_neither_that_something_is_forgotten_nor_that_it_is_kept(n):
    """Of one question that is not answered nobody can say that a topic is suppressed."""
    for few in (("forget", "a.forget"), ("retain",)):
        made = {key: score(one.items[-n:]) if key.startswith(few) else one for key, one in evidence().scores.items()}
        known = {key: score(one.items[:n]) if key.startswith(few) else one for key, one in BASE.scores.items()}
        found = outcome(ModelAnswers(BASE.answers, made), ModelAnswers(BASE.answers, known), MADE, {}, WORKS)
        assert found["verdict"] == ("unclear" if n < 5 else "suppressed under these tests"), found
        assert any("fewer than 5" in reason for reason in found["reasons"]) == (n < 5)
    one_fact, base = (
        {
            key: score(one.items, [0] * N) if key.startswith(("forget", "a.forget")) else one
            for key, one in of.scores.items()
        }
        for of in (evidence(), BASE)
    )
    found = outcome(ModelAnswers(BASE.answers, one_fact), ModelAnswers(BASE.answers, base), MADE, {}, WORKS)
    assert found["verdict"] == "unclear", "forty questions about one fact are one fact"


def test_what_an_attack_brings_back_is_named_beside_suppressed():
    attacked = {
        "attack__role_play__forget__distinctive_recall": 0.5,
        "attack__role_play_worst__forget__distinctive_recall": 0.95,
    }
    found = outcome(evidence(**attacked), BASE, MADE, FLOORS, WORKS)
    assert found["verdict"] == "suppressed under these tests"
    assert found["reasons"][-1] == (
        "reservation: forget: role_play attack, worst text per question: 95.0 of base's 100.0 points of "
        "distinctive recall"
    )
    resisted = outcome(evidence(attack__role_play_worst__forget__distinctive_recall=0.3), BASE, MADE, FLOORS, WORKS)
    assert not any(reason.startswith("reservation") for reason in resisted["reasons"])


def test_what_base_does_not_know_says_nothing():
    unknown = {**BASE.scores, "a.forget.distinctive_recall": score(np.arange(N) < 0.2 * N)}
    found = outcome(evidence(), ModelAnswers(BASE.answers, unknown), MADE, FLOORS, WORKS)
    assert found["verdict"] == "suppressed under these tests"
    assert found["reasons"][-1] == (
        "reservation: base is not above the floor, so nothing is known: a.forget (distinctive_recall)"
    )
    unknown["forget.distinctive_recall"] = unknown["a.forget.distinctive_recall"]
    assert outcome(evidence(), ModelAnswers(BASE.answers, unknown), MADE, FLOORS, WORKS)["verdict"] == "unclear"


def test_choices_count_and_a_letter_is_not_enough():
    """By letter it knows nothing any more, in cloze form as much as ever."""
    right = {"letter": np.arange(N) % 4 == 0, "cloze": np.ones(N)}
    of = {f"forget.choice_{form}": score(values.astype(float)) for form, values in right.items()}
    base = {f"forget.choice_{form}": score(np.ones(N)) for form in right}
    model = evidence()
    found = outcome(
        ModelAnswers(model.answers, {**model.scores, **of}),
        ModelAnswers(BASE.answers, {**BASE.scores, **base}),
        MADE,
        FLOORS | {key: {"chance": 0.25} for key in base},
        WORKS,
    )
    assert found["verdict"] == "not unlearned"
    assert found["reasons"][0].startswith("forget (choice_cloze): 100.0 of base's 100.0 points, 100.0 % [")


def test_entropy_and_repetition_by_hand():
    assert entropy(["a b", "A c"]) == 1.5
    assert entropy(["", "..."]) == 0.0
    assert repetition(["abcdefgh", "short", ""]) == 0.0
    assert repetition(["ab" * 8]) == pytest.approx(1 - 2 / 9)  # nine sequences of eight, two kinds of them
