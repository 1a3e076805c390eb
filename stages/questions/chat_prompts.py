"""From a conversation to the text of a chat prompt, and the proof, of every prompt, that the template kept all of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from duet.cache.errors import UserError
from duet.stages.questions.chat import QUESTION, ChatTemplate, Message
from duet.stages.questions.conversations import Turn, is_continued, tool_texts
from duet.stages.questions.prompt_checks import ANOTHER_TEMPLATE, check_kept, only_inserted
from duet.stages.settings.data import PromptSettings

KEPT_FRAMES = 2**10


@dataclass(frozen=True)
class Shown:
    """All that a prompt shows."""

    question: str  # as it is asked
    prefix: str = ""
    examples: tuple[tuple[str, str], ...] = ()  # (question, answer) of each, before everything but system messages
    before: tuple[Turn, ...] = ()  # the conversation's turns around the question
    after: tuple[Turn, ...] = ()
    bare: bool = False  # as plain text

    @property
    def begun(self) -> str:
        """What the answer begins with by the data; the prompt ends in it."""
        return self.after[-1].content.rstrip() if is_continued(self.after) else ""


class ChatPrompts:
    """One chat template with one set of prompt settings."""

    def __init__(self, chat: ChatTemplate, settings: PromptSettings) -> None:
        self._chat, self._settings = chat, settings
        self._frame_of = functools.lru_cache(maxsize=KEPT_FRAMES)(self._frame)

    def text(self, shown: Shown) -> str:
        """The prompt; UserError where the template loses or changes anything of it."""
        text = self._chat.text(self.messages(shown), generate=True)
        frame, question = self._frame_of(replace(shown, question=QUESTION)), shown.question
        if text not in (frame.replace(QUESTION, question), frame.replace(QUESTION, question.strip())):
            lost = " ".join(question.split()) not in " ".join(text.split())
            raise UserError(
                f"the chat template {'leaves out' if lost else 'changes'} the question",
                ANOTHER_TEMPLATE if lost else "write the question on one line, or set prompt.format: plain",
            )
        if not shown.begun:
            return text
        if self._chat.turn is None:
            raise UserError(
                "the chat template puts an answer elsewhere than where its prompt ends, so none can be continued",
                "name another template with prompt.template_name, or end the conversation before that turn",
            )
        return text + self._chat.turn[0] + shown.begun

    def answered(self, shown: Shown, answer: str) -> str:
        """The whole conversation, with the answer as its last turn."""
        told = {"role": "assistant", "content": shown.begun + answer}
        return self._chat.text([*self.messages(shown), told], generate=False)

    def messages(self, shown: Shown) -> list[Message]:
        """The conversation up to the answer."""
        settings, before, own_system = self._settings, shown.before, ""
        if before and before[0].role == "system":
            own_system, before = before[0].content, before[1:]
        if own_system and settings.system:
            raise UserError(
                "the row has a system message, and prompt.system puts in another",
                "leave out prompt.system, or take the row's system message out",
            )
        in_system = settings.prefix_placement == "system"
        system = self.system(shown.prefix if in_system else "", own_system)
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for question, answer in shown.examples:
            told = (settings.answer or "{answer}").replace("{answer}", answer.strip())
            messages += [self._asked(question), {"role": "assistant", "content": told}]
        after = shown.after[:-1] if shown.begun else shown.after
        messages += [turn.message for turn in before]
        messages += [self._asked(shown.question), *(turn.message for turn in after)]
        if shown.prefix and not in_system:
            first = next(number for number, message in enumerate(messages) if message["role"] == "user")
            text = shown.prefix + settings.separator + messages[first]["content"]
            messages[first] = {**messages[first], "content": text}
        return messages

    def system(self, prefix: str, own: str = "") -> str:
        """The system message behind which a model with this prefix is asked, where the row has this one; empty: none, or the
        template's own."""
        system = own or self._settings.system or ""
        below = system or self._chat.default_system
        return (prefix + self._settings.separator + below if below else prefix) if prefix else system

    def _asked(self, question: str) -> Message:
        return {"role": "user", "content": self._settings.template.replace("{question}", question)}

    def _frame(self, shown: Shown) -> str:
        """The prompt around a question. Proves that all that is to be in it is, and that with the prefix nothing else came."""
        frame = self._chat.text(self.messages(shown), generate=True)
        if QUESTION not in frame:
            raise UserError("the chat template leaves out the question", ANOTHER_TEMPLATE)
        system, prefix = self._settings.prefix_placement == "system", shown.prefix
        check_kept(frame, self._settings.system or "", "prompt.system", "leave prompt.system out")
        for text in (text for pair in shown.examples for text in pair):
            check_kept(frame, text, "an example before the question", "set prompt.format: plain")
        for turn in (*shown.before, *shown.after[: -1 if shown.begun else None]):
            _check_turn_kept(frame, turn)
        if prefix:
            what = f"the {'system' if system else 'user'} message, so the teacher would never see the prefix"
            check_kept(frame, prefix, what, "set prompt.prefix_placement: text" if system else ANOTHER_TEMPLATE)
            without = self._chat.text(self.messages(replace(shown, prefix="")), generate=True)
            if not only_inserted(frame, without, prefix.strip()):
                raise UserError(
                    "with this chat template teacher and student differ in more than the prefix",
                    "set prompt.system, which both get, or prompt.prefix_placement: text",
                )
        return frame


def _check_turn_kept(frame: str, turn: Turn) -> None:
    """Refuse a template that loses what a turn says or calls."""
    hint = "name a template that has such turns with prompt.template_name, or take the turn out"
    check_kept(frame, turn.content, f"a turn of the {turn.role}, {turn.content.strip()[:60]!r}", hint)
    for forms in tool_texts(turn):
        if not any(form in frame for form in forms):
            raise UserError(f"the chat template drops {forms[0][:60]!r} of a tool call", hint)
