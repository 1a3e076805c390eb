"""From a question to token ids: the one place where prompts are rendered, with a prefix (teacher, attacks) or without.

The teacher's and the student's prompt differ in the prefix and in nothing else, because the same code renders both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from cache.errors import UserError
from stages.data import Query
from stages.settings import PromptSettings


@dataclass(frozen=True)
class Prompt:
    """One prompt before it is token ids: what is asked, in which form, and what the answer is compared with."""

    query: Query
    question: str  # as it is asked: of an attack, not the query's own
    prefix: str = ""  # text in front
    opening: str = ""  # what the answer is made to begin with
    opening_tokens: int | None = None  # only so many first tokens of it; None: all
    bare: bool = False  # plain text to be continued, without the chat form and without prompt.template
    examples: tuple[Query, ...] = ()  # answered questions before this one
    references: tuple[str, ...] = ()  # right answers, the best match counts; empty: the query's own
    choices: tuple[str, ...] = ()  # that the question offers, the query's own answer among them

    @staticmethod
    def plain(query: Query, prefix: str = "") -> Prompt:
        """The question as it is."""
        return Prompt(query, query.question, prefix)


def check_prompt_settings(tokenizer: Any, settings: PromptSettings) -> None:
    """Refuse combinations that cannot be rendered."""
    if "{question}" not in settings.template:
        raise UserError(
            f"prompt.template {settings.template!r} lacks {{question}}", "put {question} where the question goes"
        )
    if settings.format == "plain" and settings.prefix_placement == "system":
        raise UserError(
            "prompt.prefix_placement is system, but plain prompts have no system message",
            "set prompt.prefix_placement: text, or prompt.format: chat",
        )
    if settings.format == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "prompt.format is chat, but the tokenizer has no chat template",
            "use an instruction-tuned model, or set prompt.format: plain and prompt.prefix_placement: text",
        )
    if settings.answer is not None and "{answer}" not in settings.answer:
        raise UserError(f"prompt.answer {settings.answer!r} lacks {{answer}}", "put {answer} where the answer goes")
    if settings.format == "plain" and settings.bos == "always" and tokenizer.bos_token_id is None:
        raise UserError("prompt.bos is always, but the tokenizer has no BOS token", "set prompt.bos: never")


def render_prompt(tokenizer: Any, prompt: Prompt, settings: PromptSettings) -> list[int]:
    """Token ids of the prompt and of the answer's opening, which are those that the answer would begin with."""
    ids = render(tokenizer, prompt.question, prompt.prefix, form_of(prompt, settings), prompt.examples)
    return ids + opening_ids(tokenizer, prompt, settings)


def opening_ids(tokenizer: Any, prompt: Prompt, settings: PromptSettings) -> list[int]:
    """Token ids of the answer's opening."""
    if not prompt.opening:
        return []
    return answer_ids(tokenizer, prompt.opening, form_of(prompt, settings))[: prompt.opening_tokens]


def form_of(prompt: Prompt, settings: PromptSettings) -> PromptSettings:
    """How this prompt is rendered: as the settings say, or bare."""
    if not prompt.bare:
        return settings
    return settings.model_copy(update={"format": "plain", "prefix_placement": "text", "template": "{question}"})


def render(
    tokenizer: Any, question: str, prefix: str, settings: PromptSettings, examples: Sequence[Query] = ()
) -> list[int]:
    """Token ids of the prompt up to where the answer begins; an empty `prefix` leaves no trace in it.

    `examples` stand before the question: in a chat as earlier turns, in plain text each on lines of its own.
    """
    asked = [settings.template.replace("{question}", text) for text in (*(e.question for e in examples), question)]
    told = [_answer_text(example.answer or "", settings) for example in examples]
    if prefix and settings.prefix_placement == "text":
        asked[0] = prefix + settings.separator + asked[0]
    if settings.format == "chat":
        ids = _chat_ids(tokenizer, asked, told, prefix, settings)
    else:
        before = "".join(f"{question}{answer}\n" for question, answer in zip(asked, told, strict=False))
        ids = _plain_ids(tokenizer, before + asked[-1], settings)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise UserError(
            "the prompt begins with two BOS tokens: template and tokenizer both add one",
            "set prompt.bos: never, or take the BOS token out of the template",
        )
    return ids


def _chat_ids(
    tokenizer: Any, asked: Sequence[str], told: Sequence[str], prefix: str, settings: PromptSettings
) -> list[int]:
    """`told` answers all of `asked` but the last."""
    messages = [{"role": "user", "content": asked[0]}]
    for answer, question in zip(told, asked[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    if prefix and settings.prefix_placement == "system":
        messages.insert(0, {"role": "system", "content": prefix})
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:  # templates refuse what they do not know, a system message above all
        raise UserError(
            f"the tokenizer's chat template refuses the messages: {error}", "set prompt.prefix_placement: text"
        ) from None
    if prefix and prefix.strip() not in rendered:
        raise UserError(
            "the tokenizer's chat template drops the system message, so the teacher would never see the prefix",
            "set prompt.prefix_placement: text",
        )
    return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])


def _plain_ids(tokenizer: Any, text: str, settings: PromptSettings) -> list[int]:
    if settings.bos == "auto":
        return list(tokenizer(text, verbose=False)["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return [tokenizer.bos_token_id, *ids] if settings.bos == "always" else ids


def render_answer(tokenizer: Any, answer: str, settings: PromptSettings) -> list[int]:
    """Token ids of a given response, with the tokenizer's end-of-sequence id at its end."""
    ids = answer_ids(tokenizer, answer, settings)
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def answer_ids(tokenizer: Any, answer: str, settings: PromptSettings) -> list[int]:
    """Token ids of a response, or of its beginning, without an end-of-sequence id."""
    return list(tokenizer(_answer_text(answer, settings), add_special_tokens=False, verbose=False)["input_ids"])


def _answer_text(answer: str, settings: PromptSettings) -> str:
    return (settings.answer or (" {answer}" if settings.format == "plain" else "{answer}")).replace("{answer}", answer)


def check_length(prompt_ids: Sequence[int], new_tokens: int, context: int, row_id: str, who: str) -> None:
    """Refuse a prompt that, with the tokens to come, does not fit the model's context: nothing is ever truncated."""
    if len(prompt_ids) + new_tokens > context:
        raise UserError(
            f"row {row_id!r}: the {who}'s prompt has {len(prompt_ids)} tokens and {new_tokens} are to follow, "
            f"the model's context is {context}",
            "shorten the prefix or the question, leave the row out, or take a model with a longer context",
        )
