"""What a word is in every script, and words that are replaced."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet.stages.attacks.prompts import with_synonyms
from duet.stages.evaluate.collapse import entropy
from duet.stages.metrics.words import fold, letters, replace_words, split_words, without_punctuation

WORDS = {
    "नागपुर की स्त्री": ["नागपुर", "की", "स्त्री"],
    "מָה שְׁלוֹמְךָ?": ["מָה", "שְׁלוֹמְךָ"],
    "La maïs-été, l'œuvre": ["la", "maïs", "été", "l", "œuvre"],
    "王明2024年去Oslo": ["王", "明", "2024", "年", "去", "oslo"],
    "アヤさんのテレビ": ["アヤ", "さ", "ん", "の", "テレビ"],
    "ไปโรงเรียน": ["ไป", "โร", "ง", "เรี", "ย", "น"],
    "ຂ້ອຍໄປ": ["ຂ້", "ອ", "ຍ", "ໄປ"],
    "ភាសា": ["ភា", "សា"],
    "မြို့": ["မြို့"],
    "ＡＢ１２ ﬁn": ["ab12", "fin"],
    "x_1 10²": ["x", "1", "10²"],
    "co\u00adop a\u200bb": ["coop", "a", "b"],
    "…": ["..."],
    " \u200d": [],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_by_hand(text):
    assert split_words(text) == WORDS[text]


@given(st.text(max_size=30))
def test_unicode_forms_of_a_text_have_the_same_words(text):
    assert split_words(unicodedata.normalize("NFD", text)) == split_words(unicodedata.normalize("NFC", text))


@given(st.text(max_size=30))
def test_no_letter_or_mark_between_letters_is_lost(text):
    """All of the folded text that is no punctuation or space stands in a word, or it has no letter or digit beside it."""
    kept = "".join(split_words(text))
    assert [c for c in fold(text) if unicodedata.category(c)[0] in "LN"] == [
        c for c in kept if unicodedata.category(c)[0] in "LN"
    ]
    assert without_punctuation(without_punctuation(text)) == without_punctuation(text)


def test_whole_words_of_any_script_are_replaced():
    table = {"कहाँ": "किस जगह", "कह": "बोल", "where": "in which place", "new york": "the big apple", "哪里": "什么地方"}
    assert replace_words("वह कहाँ है?", table) == "वह किस जगह है?"
    assert replace_words("Where is nowhere?", table) == "In which place is nowhere?"
    assert replace_words("他在哪里?", table) == "他在什么地方?"
    assert replace_words("Is New York new?", table) == "Is The big apple new?"
    decomposed = unicodedata.normalize("NFD", "Où est-il né?")
    assert replace_words(decomposed, table) == decomposed, "what holds no word of the table stays as it is"
    assert replace_words(decomposed, {"né": "venu"}) == "Où est-il venu?"
    assert (
        with_synonyms("Who died?", {"died": ["passed away", "went"], "who": ["which person"]}, 2)
        == "Which person went?"
    )


def test_letters_keep_their_marks_when_they_are_reversed():
    assert "".join(reversed(letters("रीना"))) == "नारी"


def test_the_entropy_of_words_is_that_of_whole_words():
    assert entropy(["की का"]) == 1.0
    assert entropy(["की की"]) == 0.0
