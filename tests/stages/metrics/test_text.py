"""Metrics: hand-computed values, an independent ROUGE-L, the paper's shifts."""

from __future__ import annotations

import json
import string
import unicodedata

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from support import SHARED

from duet.stages.metrics.text import (
    distinctive_recall,
    distinctive_words,
    exact_match,
    floors,
    performance_shift,
    rouge_l,
    score_texts,
)
from duet.stages.metrics.words import has_word

WORDS = st.lists(st.sampled_from("the cat sat on a red mat running runs 1984 café".split()), max_size=8).map(" ".join)


def test_rouge_by_hand():
    recall, f1 = rouge_l(["a tame raven", "a tame raven"], ["a tame black raven", "no idea"])
    assert recall.tolist() == [1.0, 0.0]
    assert f1[0] == pytest.approx(2 * 0.75 / 1.75)


def lcs(a: list[str], b: list[str]) -> int:
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


@given(answer=WORDS, output=WORDS)
def test_rouge_is_the_longest_common_subsequence(answer, output):
    stem = {"running": "run", "runs": "run"}
    a, b = ([stem.get(word, word) for word in text.split()] for text in (answer, output))
    recall, _ = rouge_l([answer], [output])
    assert recall[0] == pytest.approx(lcs(a, b) / len(a) if a and b else 0)


@given(st.text(string.printable, max_size=40), st.text(string.printable, max_size=40))
def test_rouge_agrees_with_the_library_on_ascii(answer, output):
    hypothesis.assume(has_word(answer))  # else the library has 0 whatever the output is
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(answer, output)["rougeL"]
    recall, f1 = rouge_l([answer], [output])
    assert (recall[0], f1[0]) == (expected.recall, expected.fmeasure)


@pytest.mark.skipif(not (SHARED / "data/tofu").is_dir(), reason="needs ../shared/data/tofu")
def test_rouge_agrees_with_the_library_on_tofus_english():
    """With apostrophes, digits, hyphens and dashes; but for texts with letters beyond ASCII, which the library drops."""
    rows = [json.loads(row) for row in (SHARED / "data/tofu/forget10_perturbed.jsonl").read_text("utf-8").splitlines()]
    pairs = [
        (row["answer"], other) for row in rows for other in (row["paraphrased_answer"], row["perturbed_answer"][0])
    ]
    english = [
        pair for pair in pairs if not any(char.isalnum() and not char.isascii() for text in pair for char in text)
    ]
    assert len(english) > 700
    assert sum("'" in text or "\u2019" in text for pair in english for text in pair) > 100
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    recall, f1 = rouge_l(*zip(*english, strict=True))
    expected = [scorer.score(*pair)["rougeL"] for pair in english]
    assert recall.tolist() == [score.recall for score in expected]
    assert f1.tolist() == [score.fmeasure for score in expected]


def test_rouge_reads_other_scripts():
    recall, _ = rouge_l(["Лев Толстой", "café crème"], ["Это Лев Толстой", "CAFÉ crème"])
    assert recall.tolist() == [1.0, 1.0]


def test_exact_match_ignores_case_punctuation_and_form():
    assert exact_match(["A tame raven.", "café"], ["a  tame, RAVEN", "cafe\u0301"]).tolist() == [1.0, 1.0]
    assert exact_match(["a raven"], ["a ravens"]).tolist() == [0.0]


NAMES = {  # of two people, and the first in another Unicode form or case, which is the same name
    "Bengali": ("রিনা", "রানু", None),
    "Hindi": ("रोली", "रीलु", None),
    "Tamil": ("மாலா", "மேலு", None),
    "Thai": ("กิติ", "กีตุ", None),
    "pointed Hebrew": ("שָׂרָה", "שִׁיר", None),
    "vocalised Arabic": ("كَرِيم", "كَرَم", None),
    "Korean": ("민서", "민준", "NFD"),
    "Vietnamese": ("Hồng", "Hổng", "NFD"),
    "Turkish": ("İrem", "Irmak", "lower"),
    "German": ("Weiß", "Weis", "upper"),
    "Greek": ("Νίκος", "Νίκη", "upper"),
    "Russian": ("Йосиф", "Иосиф", "NFD"),
    "Chinese": ("张伟", "李娜", None),
    "Japanese": ("アヤノ", "アヤメ", "NFD"),
    "no letters": ("🙂🙂", "🙃🙃", None),
    "punctuation": ("!!!", "???", None),
}


@pytest.mark.parametrize("kind", NAMES)
def test_another_name_scores_nothing_and_the_same_one_everything(kind):
    name, other, form = NAMES[kind]
    same = {"NFD": lambda text: unicodedata.normalize("NFD", text), "lower": str.lower, "upper": str.upper}
    said = [other, same[form](name) if form else name]
    distinctive = distinctive_words({"a": ["Who?"] * 2}, {"a": [name, name]})["a"]
    assert rouge_l([name, name], said)[0].tolist() == [0.0, 1.0]
    assert distinctive_recall(distinctive, said).tolist() == [0.0, 1.0]
    assert exact_match([name, name], said).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("reference", "output"),
    [
        ("उज्जैन में", "उसका जन्म उज्जैन में हुआ।"),
        ("青森", "她出生在青森。"),
        ("นครพนม", "เขาเกิดที่นครพนมในปี ๒๕๒๗"),
        ("1984", "१९८४ में"),
        ("کتاب‌خانه", "در کتابخانه بود"),
    ],
)
def test_a_reference_within_an_answer_is_recalled(reference, output):
    assert rouge_l([reference], [output])[0].tolist() == [1.0]


def test_references_without_words_are_compared_as_they_are():
    references = ["🙂", "!!!", "+", "🙂", "!!!", "+", "", ""]
    outputs = ["🙂.", "!!!", " + ", "I like 🙂", "!", "", "", "!"]
    expected = [1, 1, 1, 0, 0, 0, 0, 0]
    assert rouge_l(references, outputs)[0].tolist() == expected
    assert exact_match(["!!!", "C++", "10²"], ["", "C", "102"]).tolist() == [0, 0, 0]


def test_floors_are_the_scores_of_knowing_nothing():
    found = floors(["Where is the red cat?"], ["the red mat"], "no idea")
    assert found["rougeL_recall"] == {"refusal": 0.0, "echo": pytest.approx(2 / 3)}
    assert set(found) == set(score_texts(["a"], ["a"])) - {"refusal_rate"}


# arXiv 2601.21283, MUSE-Books with Llama-3.2-3B: R-Forget, R-Forget-500, R-Retain, MMLU.
PAPER = {"forget": 32.13, "forget500": 39.99, "retain": 84.29, "mmlu": 61.46}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((0, 0, 0, 24.87), -48.76),  # GA
        ((24.18, 26.83, 69.69, 54.79), -0.16),  # NPO
        ((0.47, 0.64, 58.33, 58.92), 42.51),  # FLAT
        ((4.27, 5.98, 78.33, 61.45), 55.90),  # DUET
    ],
)
def test_performance_shift_reproduces_the_paper(row, expected):
    total, terms = performance_shift(PAPER, dict(zip(PAPER, row, strict=True)), {"forget", "forget500"})
    assert total == pytest.approx(expected, abs=0.005)
    assert sum(terms.values()) == total
    with pytest.raises(ValueError, match="base has"):
        performance_shift(PAPER, {"forget": 1.0}, {"forget"})


def test_distinctive_words_are_what_tells_one_answer_from_the_others():
    """Worked out by hand: 40 references of one form, of which "in the town of" tells nothing and the names do."""
    towns = [f"Town{chr(97 + n % 20)}{chr(97 + n // 20)}x" for n in range(40)]
    questions = {"born": [f"Where was person {n} born?" for n in range(40)], "kept": ["Is water wet?"]}
    answers = {"born": [f"In the town of {town}." for town in towns], "kept": ["Water is wet."]}
    words = distinctive_words(questions, answers)
    assert [len(own) for own in words["born"]] == [1] * 40
    assert words["kept"] == [frozenset({"water", "is", "wet"})], "nothing is left without the question's words: all"
    right, form, nothing = f"I {towns[0]}.", "In the town of Nowhere.", "I know nothing."
    found = distinctive_recall([words["born"][0]] * 3, [right, form, nothing])
    assert found.tolist() == [1.0, 0.0, 0.0]
    recall, _ = rouge_l([answers["born"][0]] * 3, [right, form, nothing])
    assert recall.tolist() == [0.2, 0.8, 0.0], "what it is for: ROUGE-L sees the form first"
    assert distinctive_recall([frozenset()], [""]).tolist() == [0.0]
    assert distinctive_words({"a": ["Who?"]}, {"a": ["Anna"]}) == {"a": [frozenset({"anna"})]}, (
        "few references: none is common"
    )
