"""From a question to token ids, and from an answer to the ids that a model would have to say: the one owner of the seam.

Teacher, student, likelihoods, attacks, relearning and baselines render here, with a prefix or without. What must always hold,
of every prompt, or a UserError says what is wrong:

- The question stands in it as the data have it (templates may take white space off its ends), and so do the other turns of the
  conversation that it belongs to.
- A prefix stands in the teacher's prompt, which differs from the student's in that prefix alone.
- It begins with at most one BOS token and does not end in an end-of-sequence token.
- A given answer has the ids that follow the prompt's when both are tokenised as one text, and its end is what the chat template
  puts behind an answer. Where a tokenizer joins the prompt's last character and the answer's first, no ids are right.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.stages.models.directory import load_config, text_config
from duet.stages.models.tokenizers import eos_ids, load_tokenizer, token_ids
from duet.stages.questions.answer_ends import AnswerEnds
from duet.stages.questions.chat import QUESTION, ChatTemplate
from duet.stages.questions.chat_prompts import ChatPrompts, Shown
from duet.stages.questions.prompt_checks import check_prompt_settings
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

KEPT_PROMPTS = 2**14  # rendered prompts that are remembered: an evaluation asks for each several times


@dataclass(frozen=True)
class Prompt:
    """One prompt before it is token ids: what is asked, in which form, and what the answer is compared with.

    The query's conversation stands around the question.
    """

    query: Query
    question: str  # as it is asked: of an attack, not the query's own
    prefix: str = ""  # text in front
    opening: str = ""  # what the answer is made to begin with
    opening_tokens: int | None = None  # number of its first tokens; None: all
    bare: bool = False  # plain text to be continued, without the chat form and without prompt.template
    examples: tuple[Query, ...] = ()  # answered questions before this one
    references: tuple[str, ...] = ()  # right answers, the best match counts; empty: the query's own
    choices: tuple[str, ...] = ()  # that the question offers, the query's own answer among them

    @staticmethod
    def plain(query: Query, prefix: str = "") -> Prompt:
        """The question as it is."""
        return Prompt(query, query.question, prefix)


@dataclass(frozen=True)
class GivenAnswer:
    """What a model would have to say after one prompt to give an answer."""

    own: list[int]  # the answer alone
    ids: list[int]  # with the end of the turn; a tokenizer may join that and the answer's last character

    @property
    def num_end(self) -> int:
        """How many of `ids`, the last ones, are not the answer's own."""
        same = 0
        while same < min(len(self.own), len(self.ids)) and self.own[same] == self.ids[same]:
            same += 1
        return len(self.ids) - same


class Renderer:
    """One tokenizer with one set of prompt settings. `ends` are the ids that end a response by the model's files: those of
    config.json, and those of all files."""

    def __init__(
        self, tokenizer: Any, settings: PromptSettings, ends: tuple[Collection[int], Collection[int]] = ((), ())
    ) -> None:
        check_prompt_settings(tokenizer, settings)
        self.tokenizer, self.settings = tokenizer, settings
        self.chat = ChatTemplate(tokenizer, settings) if settings.format == "chat" else None
        self._chat_prompts = ChatPrompts(self.chat, settings) if self.chat else None
        self._ends = AnswerEnds(tokenizer, self.chat, *ends)
        self._remembered = functools.lru_cache(maxsize=KEPT_PROMPTS)(self._render)
        if self.chat:
            self.chat.check_answer_comes_first()

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt and of the answer's opening, which are those that the answer would begin with."""
        return [*self._rendered(prompt)[1], *self.opening(prompt)]

    def opening(self, prompt: Prompt) -> list[int]:
        """Token ids of the answer's opening."""
        return self.answer(prompt, prompt.opening).own[: prompt.opening_tokens] if prompt.opening else []

    def answer(self, prompt: Prompt, answer: str) -> GivenAnswer:
        """The ids of an answer after this prompt (without its opening). White space around the answer is not part of it.

        Where the data have begun the answer, the beginning is part of the prompt, and the answer is what follows it.
        """
        prompt_ids, whole = self._rendered(prompt)[1], self.answer_text(prompt, answer)
        _, end_text, end_id = self._seam(prompt)
        if self._in_chat(prompt):
            self._check_turn(prompt, answer, whole)
        own = self._after(prompt, prompt_ids, whole)
        if end_text:
            return GivenAnswer(own, self._after(prompt, prompt_ids, whole + end_text))
        return GivenAnswer(own, own if end_id is None else [*own, end_id])

    def answer_text(self, prompt: Prompt, answer: str) -> str:
        """The text whose last ids are the answer's own."""
        return self._rendered(prompt)[0] + self._seam(prompt)[0] + self._answer_text(answer, prompt)

    def in_form(self, settings: PromptSettings) -> Renderer:
        """The same tokenizer and model with other settings."""
        return Renderer(self.tokenizer, settings, self._ends.ids_of_files)

    def system(self, prefix: str) -> str:
        """The system message behind which a model with this prefix is asked; empty: none, or the template's own."""
        return self._chat_prompts.system(prefix) if self._chat_prompts else prefix

    def in_front_of_text(self, prefix: str) -> list[int]:
        """Token ids of what stands before a text that is read as it is."""
        return [*self._in_front, *(self._ids(prefix + self.settings.separator) if prefix else [])]

    @property
    def stop_ids(self) -> list[int]:
        """All ids that end a response, ascending."""
        return self._ends.stop_ids

    @property
    def provenance(self) -> dict[str, Any]:
        """The settings, as JSON: all that decides a prompt. The day is among them where a template asks for it."""
        told = self.settings.model_dump(mode="json", exclude={"date"})
        return told | ({"date": self.chat.date.isoformat()} if self.chat and self.chat.asks_the_clock else {})

    def _in_chat(self, prompt: Prompt) -> bool:
        return self.chat is not None and not prompt.bare

    def _rendered(self, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        try:
            return self._remembered(self._shown(prompt))
        except UserError as error:
            raise UserError(f"row {prompt.query.row_id!r}: {error.what}", error.hint) from error

    def _shown(self, prompt: Prompt) -> Shown:
        if any(example.is_conversation for example in prompt.examples):
            raise UserError(
                "an example in front of the question is a conversation of several turns",
                "take examples that are single questions",
            )
        return Shown(
            prompt.question,
            prompt.prefix,
            tuple((example.question, example.answer or "") for example in prompt.examples),
            prompt.query.before,
            prompt.query.after,
            prompt.bare,
        )

    def _render(self, shown: Shown) -> tuple[str, tuple[int, ...]]:
        """Text and ids of a prompt. A BOS token that is not in the text is among the ids."""
        if self._chat_prompts is not None and not shown.bare:
            text = self._chat_prompts.text(shown)
            ids = self._ids(text)
        else:
            text = self._plain_text(shown)
            ids = [*self._in_front, *self._ids(text)]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(
                "the prompt begins with two BOS tokens: template and tokenizer both add one",
                "set prompt.bos: never, or take the BOS token out of the template",
            )
        if eos is not None and len(ids) > 1 and ids[-1] == eos:
            raise UserError(
                "the prompt ends in an end-of-sequence token, so an answer would be a new text",
                "take the token out of the template or the question",
            )
        return text, tuple(ids)

    def _check_turn(self, prompt: Prompt, answer: str, whole: str) -> None:
        """Refuse an answer that the template does not give back, as one with a thinking block of its own."""
        if self.chat is None or self._chat_prompts is None or self.chat.turn is None:
            return
        told = self._answer_text(answer, prompt)
        if self._chat_prompts.answered(self._shown(prompt), told) != whole + self.chat.turn[1]:
            raise UserError(
                f"row {prompt.query.row_id!r}: the chat template changes the answer {answer[:60]!r}",
                "write the answer as the template leaves it, without thinking blocks, or set prompt.format: plain",
            )

    # Plain prompts

    def _plain_text(self, shown: Shown) -> str:
        if (shown.before or shown.after) and not shown.bare:
            raise UserError(
                "a conversation of several turns has no place in a plain prompt",
                "set prompt.format: chat, or ask single questions",
            )
        template = "{question}" if shown.bare else self.settings.template
        asked = [template.replace("{question}", text) for text in (*(q for q, _ in shown.examples), shown.question)]
        turns = [*(turn.content for turn in shown.before), asked[-1], *(turn.content for turn in shown.after)]
        asked[-1] = "\n".join(text for text in turns if text)
        if shown.prefix:
            asked[0] = shown.prefix + self.settings.separator + asked[0]
        told = [self._plain_answer(text, answer) for text, (_, answer) in zip(asked, shown.examples, strict=False)]
        return "".join(f"{text}{answer}\n" for text, answer in zip(asked, told, strict=False)) + asked[-1]

    def _plain_answer(self, prompt_text: str, answer: str) -> str:
        form = self.settings.answer or ("{answer}" if prompt_text.endswith("\n") else " {answer}")
        return form.replace("{answer}", answer.strip())

    @functools.cached_property
    def _in_front(self) -> list[int]:
        """Ids before the text of a plain prompt. What the tokenizer would add behind it is left out: nothing ends there yet."""
        bos = self.settings.bos
        if bos != "auto":
            return [self.tokenizer.bos_token_id] if bos == "always" else []
        probe = self._ids(QUESTION)
        added = list(self.tokenizer(QUESTION, verbose=False)["input_ids"])
        for start in range(len(added) - len(probe) + 1):
            if added[start : start + len(probe)] == probe:
                return added[:start]
        raise UserError(
            "the tokenizer makes other tokens of a text where it adds special ones",
            "set prompt.bos: always, or never",
        )

    # The seam

    def _seam(self, prompt: Prompt) -> tuple[str, str, int | None]:
        """What stands between prompt and answer, and what ends the answer: a text, or else an id."""
        if not self._in_chat(prompt):
            return "", "", self._ends.by_files
        if self.chat is None or self.chat.turn is None:
            raise UserError(
                f"row {prompt.query.row_id!r}: the chat template puts an answer elsewhere than where its prompt ends",
                "given answers have no place behind such a prompt: name another template with prompt.template_name",
            )
        before = "" if self._shown(prompt).begun else self.chat.turn[0]  # else it stands in the prompt
        return before, self._ends.text, None if self._ends.text else self._ends.by_files

    def _answer_text(self, answer: str, prompt: Prompt) -> str:
        if self._in_chat(prompt) and not self._shown(prompt).begun:
            return (self.settings.answer or "{answer}").replace("{answer}", answer.strip())
        return self._plain_answer(self._rendered(prompt)[0], answer)

    def _after(self, prompt: Prompt, prompt_ids: Sequence[int], whole: str) -> list[int]:
        """The ids of a text that begins with the prompt's, less the prompt's."""
        ids = self._ids(whole) if self._in_chat(prompt) else [*self._in_front, *self._ids(whole)]
        if ids[: len(prompt_ids)] != list(prompt_ids):
            raise UserError(
                f"row {prompt.query.row_id!r}: the tokenizer joins the end of the prompt and the beginning of the answer, "
                "so no token of the answer follows the prompt",
                "let the prompt end in a letter, a colon or a line break; a space belongs to prompt.answer",
            )
        return ids[len(prompt_ids) :]

    def _ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)


def open_renderer(model_dir: Path, settings: PromptSettings, trust_remote_code: bool = False) -> Renderer:
    """The renderer of a model directory."""
    if settings.format == "plain" and settings.template != settings.template.rstrip(" \t"):
        raise UserError(
            "prompt.template ends in a space, which tokenizers join with the first word of an answer",
            "end it without; the space belongs to prompt.answer, which has one by default",
        )
    config, tokenizer = load_config(model_dir, trust_remote_code), load_tokenizer(model_dir, trust_remote_code)
    named = text_config(config).eos_token_id
    ends = set(named) if isinstance(named, list) else {named} - {None}
    return Renderer(tokenizer, settings, (ends, eos_ids(model_dir, config, tokenizer)))
