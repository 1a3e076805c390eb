"""Refusals of prompts: settings that cannot be rendered, and chat templates that drop or change what they are given."""

from __future__ import annotations

from typing import Any

from duet.cache.errors import UserError
from duet.stages.settings.data import PromptSettings

ANOTHER_TEMPLATE = (
    "templates of models that see images want a list of content parts: name another with prompt.template_name, or set "
    "prompt.format: plain"
)


def check_prompt_settings(tokenizer: Any, settings: PromptSettings) -> None:
    """Refuse combinations that cannot be rendered, and settings that do nothing."""
    if "{question}" not in settings.template:
        raise UserError(
            f"prompt.template {settings.template!r} lacks {{question}}", "put {question} where the question goes"
        )
    if settings.answer is not None and "{answer}" not in settings.answer:
        raise UserError(f"prompt.answer {settings.answer!r} lacks {{answer}}", "put {answer} where the answer goes")
    if settings.format == "chat":
        return
    if settings.prefix_placement == "system":
        raise UserError(
            "prompt.prefix_placement is system, but plain prompts have no system message",
            "set prompt.prefix_placement: text, or prompt.format: chat",
        )
    for name in ("system", "template_name", "template_args"):
        if getattr(settings, name):
            raise UserError(f"prompt.{name} does nothing in plain prompts", "leave it out, or set prompt.format: chat")
    if settings.bos == "always" and tokenizer.bos_token_id is None:
        raise UserError("prompt.bos is always, but the tokenizer has no BOS token", "set prompt.bos: never")


def check_kept(frame: str, text: str, what: str, hint: str) -> None:
    if text.strip() in frame:
        return
    if " ".join(text.split()) in " ".join(frame.split()):
        raise UserError(f"the chat template changes white space within {text[:60]!r}", "write the text on one line")
    raise UserError(f"the chat template drops {what}", hint)


def only_inserted(with_it: str, without: str, text: str) -> bool:
    """Is `with_it` the text `without` with one piece put in, of which `text` is part?"""
    more = len(with_it) - len(without)
    starts = range(max(0, with_it.find(text) + len(text) - more), with_it.find(text) + 1)
    return any(with_it[:at] + with_it[at + more :] == without for at in starts if more > 0)
