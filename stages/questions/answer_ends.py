"""What ends an answer: a text that the chat template puts behind it, or an id that the model's files name."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from duet.cache.errors import UserError, note
from duet.stages.models.tokenizers import special_tokens, token_ids
from duet.stages.questions.chat import ChatTemplate


class AnswerEnds:
    """The ends of one tokenizer's answers, behind a chat template or, with None, in plain prompts.

    `in_config` are the ids that config.json names, `in_all` those of all of the model's files.
    """

    def __init__(
        self, tokenizer: Any, chat: ChatTemplate | None, in_config: Collection[int], in_all: Collection[int]
    ) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._in_config, self._in_all = frozenset(in_config), frozenset(in_all)

    @property
    def ids_of_files(self) -> tuple[frozenset[int], frozenset[int]]:
        """The ids that config.json names, and those of all files."""
        return self._in_config, self._in_all

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """All ids that end a response, ascending: those of the model's files, and the one that ends the template's text."""
        found = set(self._in_all)
        if self._chat and self._chat.turn:
            special = self._tokenizer.convert_tokens_to_ids(special_tokens(self._tokenizer))
            ends = set(token_ids(self._tokenizer, self.text)[-1:]) & set(special)
            found |= ends
            if self.text and not ends:
                note(
                    f"the chat template ends an answer with {self.text.strip()!r}, which is not a single token here: no "
                    "response stops there"
                )
        return sorted(found)

    @functools.cached_property
    def text(self) -> str:
        """What ends an assistant's turn by the template; empty: it does not say.

        The text behind an answer, up to its first special token. Where there is none, the text between an answer and the
        next question, if its first special token is one that ends responses by the model's files.
        """
        _, last, between = (self._chat.turn if self._chat else None) or ("", "", "")
        if cut := self._up_to_special(last):
            return cut
        if last.strip():
            return last  # in ordinary tokens: the tokenizer does not know those of this template
        cut = self._up_to_special(between)
        return (
            cut if cut and token_ids(self._tokenizer, cut)[-1] in self._in_all | {self._tokenizer.eos_token_id} else ""
        )

    @functools.cached_property
    def by_files(self) -> int | None:
        """The id that ends a text by the model's files; None where they name none."""
        eos = self._tokenizer.eos_token_id
        if eos in self._in_config or (not self._in_config and eos is not None):
            return eos
        if eos is None and len(self._in_config) < 2:
            return next(iter(self._in_config), None)
        raise UserError(
            f"what ends an answer cannot be told: the tokenizer's eos_token has the id {eos}, config.json names "
            f"{sorted(self._in_config)}, and nothing stands behind an answer in the prompt's form",
            "correct eos_token in tokenizer_config.json, or eos_token_id in config.json",
        )

    def _up_to_special(self, text: str) -> str:
        """The beginning of a text up to its first special token; empty: it has none."""
        found = [(at, -len(token), token) for token in special_tokens(self._tokenizer) if (at := text.find(token)) >= 0]
        at, _, token = min(found, default=(0, 0, ""))
        return text[:at] + token if token else ""
