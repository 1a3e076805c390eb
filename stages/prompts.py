"""From a question to token ids: the one place where prompts are rendered, with a prefix (teacher, attacks) or without.

The teacher's and the student's prompt differ in the prefix and in nothing else, because the same code renders both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cache.errors import UserError
from stages.settings import PromptSettings


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


def render(tokenizer: Any, question: str, prefix: str, settings: PromptSettings) -> list[int]:
    """Token ids of the prompt up to where the answer begins; an empty `prefix` leaves no trace in it."""
    text = settings.template.replace("{question}", question)
    if prefix and settings.prefix_placement == "text":
        text = prefix + settings.separator + text
    ids = (
        _chat_ids(tokenizer, text, prefix, settings)
        if settings.format == "chat"
        else _plain_ids(tokenizer, text, settings)
    )
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise UserError(
            "the prompt begins with two BOS tokens: template and tokenizer both add one",
            "set prompt.bos: never, or take the BOS token out of the template",
        )
    return ids


def _chat_ids(tokenizer: Any, text: str, prefix: str, settings: PromptSettings) -> list[int]:
    messages = [{"role": "user", "content": text}]
    if prefix and settings.prefix_placement == "system":
        messages.insert(0, {"role": "system", "content": prefix})
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
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
    text = (settings.answer or (" {answer}" if settings.format == "plain" else "{answer}")).replace("{answer}", answer)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def check_length(prompt_ids: Sequence[int], new_tokens: int, context: int, row_id: str, who: str) -> None:
    """Refuse a prompt that, with the tokens to come, does not fit the model's context: nothing is ever truncated."""
    if len(prompt_ids) + new_tokens > context:
        raise UserError(
            f"row {row_id!r}: the {who}'s prompt has {len(prompt_ids)} tokens and {new_tokens} are to follow, "
            f"the model's context is {context}",
            "shorten the prefix or the question, leave the row out, or take a model with a longer context",
        )
