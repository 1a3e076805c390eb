"""Questions inside the texts of `contexts.yaml`: what a student is asked while it learns to answer as if asked plainly.

The texts are the training's alone: none of the evaluation's stands among them. Their families have the names of attacks, so
that results can say what a student was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from duet.cache.files import sha256_json
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.requests import AskedAbout
from duet.stages.questions.yaml_text import parse_yaml

CONTEXTS_PATH = Path(__file__).with_name("contexts.yaml")
QUESTION = "{question}"
FEW = 3  # words that may stand in a training text by chance
SHARE = 1 / 3  # of the rows of a step, for each kind of text independently: more makes rows longer, and training slower


@cache
def context_texts() -> dict[str, list[str]]:
    """The texts of each family."""
    return parse_yaml(CONTEXTS_PATH.read_text(encoding="utf-8"), str(CONTEXTS_PATH))


def trained_text_in(text: str) -> str | None:
    """The text of a family that stands in this text of an attack, or that this one is a part of, of more than FEW words.

    Compared are words: case, punctuation and the places of topic and question make no difference.
    """
    told = _words(text)
    for known in (known for texts in context_texts().values() for known in texts):
        if _words(known) in told or (len(told.split()) > FEW and told in _words(known)):
            return known
    return None


def _words(text: str) -> str:
    """The words of a text with its places left out, with spaces around each."""
    words = re.findall(r"\w+", re.sub(r"{\w+}", " ", text.lower()))
    return f" {' '.join(words)} "


@dataclass(frozen=True)
class Contexts:
    """The queries of a store's rows, and a renderer that puts them into contexts."""

    renderer: Renderer
    asked: Mapping[str, AskedAbout]  # by row id, in plan order

    def prompt(self, row_id: str, in_front: str = "", turn: str = QUESTION) -> list[int]:
        """Token ids of a row's question between these texts."""
        of, topic = self.asked[row_id].query, self.asked[row_id].topic
        question = turn.replace("{topic}", topic).replace(QUESTION, of.question)
        return self.renderer.prompt(Prompt(of, question, in_front.replace("{topic}", topic)))

    def drawn(self, row_id: str, key: Sequence[int]) -> list[int]:
        """The same with texts that `key` and the row draw: of SHARE with one in front, of SHARE with one in its turn."""
        rng = np.random.default_rng([*key, self.numbers[row_id]])
        use_front, use_turn = rng.random(2) < SHARE
        in_front, turn = self._in_front[rng.integers(len(self._in_front))], self._turns[rng.integers(len(self._turns))]
        return self.prompt(row_id, in_front if use_front else "", turn if use_turn else QUESTION)

    def longest(self, row_id: str) -> list[int]:
        """The same with the longest text in front and the longest turn."""
        return self.prompt(row_id, *self._longest)

    def sha256(self) -> str:
        """Of all that decides what is drawn, beside the prompts' settings and the queries, which are the store's."""
        return sha256_json([context_texts(), [[row_id, of.topic] for row_id, of in self.asked.items()]])

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The place of each row among them."""
        return {row_id: number for number, row_id in enumerate(self.asked)}

    @cached_property
    def _longest(self) -> tuple[str, str]:
        first = next(iter(self.asked))
        return (
            max(self._in_front, key=lambda text: len(self.prompt(first, in_front=text))),
            max(self._turns, key=lambda text: len(self.prompt(first, turn=text))),
        )

    @cached_property
    def _in_front(self) -> list[str]:
        return [text for texts in context_texts().values() for text in texts if QUESTION not in text]

    @cached_property
    def _turns(self) -> list[str]:
        return [text for texts in context_texts().values() for text in texts if QUESTION in text]
