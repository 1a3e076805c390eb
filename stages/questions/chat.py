"""A tokenizer's chat template: messages in, text out, with its arguments and its clock fixed.

Templates are programs. They drop what they do not know, put in messages of their own, ask for today's date and open thinking
blocks. Here they are rendered, and whatever they raise becomes a UserError; `prompts.py` checks what came out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

from duet.cache.errors import UserError
from duet.stages.settings.data import PromptSettings

Message = Mapping[str, Any]
# Words without meaning that stand for a text while a template is examined; letters only, which no template takes for a command.
SYSTEM, QUESTION, ANSWER, NEXT = "Qsystemq", "Qquestionq", "Qanswerq", "Qnextq"
SWITCH = "enable_thinking"  # the argument by which hybrid models' templates are told whether to think
OPENED = re.compile(
    r"(<think>|<thinking>|<thought>|<reasoning>|<seed:think>|\[THINK\]|<\|START_THINKING\|>|◁think▷|<\|channel\|>analysis"
    r"<\|message\|>)\s*$"
)


class ChatTemplate:
    """One template of a tokenizer, by the settings' name of it, with the settings' arguments."""

    def __init__(self, tokenizer: Any, settings: PromptSettings) -> None:
        self._tokenizer, self._args = tokenizer, dict(settings.template_args)
        self.source = chosen_template(tokenizer, settings.template_name)
        self.date = settings.date or date.today()
        for name in self._args:
            if name != SWITCH and not re.search(rf"\b{re.escape(name)}\b", self.source):
                raise UserError(
                    f"prompt.template_args: the chat template has no argument {name!r}",
                    "leave it out; what a template can be told stands in its text",
                )

    @property
    def asks_the_clock(self) -> bool:
        """Does what it renders depend on the day? (The day is `date`, whatever the clock says.)"""
        return "strftime_now" in self.source

    @property
    def arguments(self) -> dict[str, Any]:
        """What the template is given beside the messages, its clock among them."""
        return {"strftime_now": datetime.combine(self.date, time()).strftime} | self._args

    def text(self, messages: Sequence[Message], generate: bool, **changed: Any) -> str:
        """The conversation as text, up to where an answer begins if `generate`; `changed` replaces the settings' arguments."""
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.source,
                add_generation_prompt=generate,
                tokenize=False,
                **self.arguments | changed,
            )
        except Exception as error:  # a template can raise whatever Python can
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"the chat template cannot render these messages: {why}", self._way(error)) from error

    def _way(self, error: Exception) -> str:
        if "tools" in self.source and isinstance(error, TypeError):
            return "it seems to want a list of tools: set prompt.template_args: {tools: []}"
        if "alternat" in str(error).lower():
            return "join turns of one role that follow each other, or name another template with prompt.template_name"
        if "role" in str(error).lower() or "system" in str(error).lower():
            return "set prompt.prefix_placement: text, and leave out prompt.system and the rows' own system messages"
        return "give it what it lacks with prompt.template_args, or name another template with prompt.template_name"

    @cached_property
    def default_system(self) -> str:
        """The system message that the template puts in where a conversation has none; empty: it puts in nothing."""
        user = {"role": "user", "content": QUESTION}
        try:
            given = self.text([{"role": "system", "content": SYSTEM}, user], generate=True)
        except UserError:  # it takes no system message at all
            return ""
        before, found, after = given.partition(SYSTEM)
        bare = self.text([user], generate=True)
        if not found or len(bare) < len(before) + len(after):
            return ""
        return bare[len(before) : len(bare) - len(after)] if bare.startswith(before) and bare.endswith(after) else ""

    @cached_property
    def turn(self) -> tuple[str, str, str] | None:
        """(what it puts between a prompt and an answer, what behind an answer that ends the conversation, and what between an
        answer and a next question); None where a conversation with an answer does not begin with its prompt.
        """
        user, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        prompt, last = self.text([user], generate=True), self.text([user, answer], generate=False)
        before, found, after = last.removeprefix(prompt).partition(ANSWER)
        if not last.startswith(prompt) or not found:
            return None
        following = self.text([user, answer, {"role": "user", "content": NEXT}], generate=True)
        return before, after, following.partition(ANSWER)[2].partition(NEXT)[0]

    def check_answer_comes_first(self) -> None:
        """Refuse a template after whose prompt a model does not begin with the answer, unless the settings want that.

        The first token would be that of a thinking block or of a header, alike for every question: nothing to be trained on.
        """
        if self._args.get(SWITCH) is True:
            return
        user = [{"role": "user", "content": QUESTION}]
        prompt = self.text(user, generate=True)
        opened = OPENED.search(prompt)
        between = self.turn[0].strip() if self.turn else ""
        switched = SWITCH in self.source and SWITCH not in self._args
        if switched and not opened and not between:
            between = "" if self.text(user, generate=True, **{SWITCH: False}) == prompt else "<think>"
        if not opened and not between:
            return
        what = f"ends in {opened[1]!r}" if opened else f"is followed by {between!r} before any answer"
        way = (
            f"set prompt.template_args: {{{SWITCH}: false}}, or true" if switched else "name a template that does not "
        )
        way += "" if switched else f"with prompt.template_name, or set prompt.template_args: {{{SWITCH}: true}}"
        raise UserError(
            f"this chat template's prompt {what}: the first tokens that are trained and scored would not be the answer's",
            f"{way} to take what the model says first as it is",
        )


def chosen_template(tokenizer: Any, name: str | None) -> str:
    """The text of the template of this name, or of the only or default one; UserError where that is none."""
    found = tokenizer.chat_template
    if not found:
        raise UserError(
            "prompt.format is chat, but the tokenizer has no chat template",
            "use an instruction-tuned model, or set prompt.format: plain and prompt.prefix_placement: text",
        )
    named = found if isinstance(found, dict) else {"default": found}
    if (name or "default") in named:
        return named[name or "default"]
    what = f"has no chat template {name!r}" if name else "has several chat templates, none of them called default"
    raise UserError(f"the tokenizer {what}", f"set prompt.template_name to one of {', '.join(sorted(named))}")
