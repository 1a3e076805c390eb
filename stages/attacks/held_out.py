"""Attack texts that a student was trained on are none of its tests: a check by text, before anything is asked.

Which kinds of attack a student saw is in its training summary (`trained_on`), and the verdict counts only the others. This
check is about single texts, a user's own among them (`evaluate.attack_texts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from duet.cache.errors import UserError
from duet.stages.attacks.chosen import prompt_kinds
from duet.stages.attacks.texts import texts
from duet.stages.exam.exam import Exam
from duet.stages.metrics.words import split_words

FEW = 4  # words of a text that may stand in a longer one by chance; as a whole even a shorter text is refused


def refuse_trained_texts(exam: Exam, trained: Sequence[str]) -> None:
    """UserError where a text of an attack that is made is one of `trained`, the texts that stood around questions in training.

    Both may hold {topic} and {question}. Compared are words, so case and punctuation do not matter: a text is the same as one
    in which it stands, or which stands in it, where that has more than FEW words.
    """
    words_of = {text: _words(text, exam.topic) for text in trained}
    for where, text in _asked(exam):
        own = _words(text, exam.topic)
        same = next((other for other, words in words_of.items() if _same(own, words)), None)
        if same is not None:
            raise UserError(
                f"{where} has a text that a student was trained on: {text!r}, in training {same!r}",
                "take it out of evaluate.attack_texts, or write another: what was trained on tests nothing",
            )


def _asked(exam: Exam) -> Iterator[tuple[str, str]]:
    """Every text around a question of the attacks that are made, and what has it."""
    variants = texts(exam.settings.attack_texts)[0]
    for kind in prompt_kinds(exam):
        for key, variant in variants.get(kind, {}).items():
            for text in (variant.in_front, variant.question):
                yield f"attack {kind}, {key},", text


def _words(text: str, topic: str) -> list[str]:
    """A text's words, with its topic and without its question."""
    return split_words(re.sub(r"\{\w+\}", " ", text.replace("{topic}", topic)))


def _same(one: Sequence[str], other: Sequence[str]) -> bool:
    short, long = sorted((list(one), list(other)), key=len)
    if len(short) <= FEW:
        return bool(short) and short == long
    return any(long[at : at + len(short)] == short for at in range(len(long) - len(short) + 1))
