"""Conversations as rows hold them, lists of messages: checked, and cut into what is asked and what is answered.

A query is a conversation up to the answer that is to come, and a question is one of a single user turn. The last user turn is
called the question: attacks word it otherwise. All other turns stand before it or after it, and are asked as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from duet.cache.errors import UserError
from duet.stages.questions.text_files import FAULT_HINT, fault_of

FIELD = "messages"  # of a row that has a conversation in the place of a question
ROLES = ("system", "user", "assistant", "tool")
CONTINUE = "continue"  # key of a last assistant turn that the answer goes on with
WEIGHT = "weight"  # key of an assistant turn that says whether it is asked for


@dataclass(frozen=True)
class Turn:
    """One message. `more` are its further keys, such as tool_calls, as JSON: a chat template gets them as they are."""

    role: str
    content: str
    more: str = ""

    @property
    def further(self) -> dict[str, Any]:
        return json.loads(self.more) if self.more else {}

    @property
    def message(self) -> dict[str, Any]:
        """As a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.further}


@dataclass(frozen=True)
class Asked:
    """A conversation around its question, and its answer, where it has one."""

    before: tuple[Turn, ...]
    question: str
    after: tuple[Turn, ...]
    answer: str | None


def asked_of(found: Any, every: bool, at: str) -> list[Asked]:
    """What a list of messages asks: for its last answer, or for `every` one, each behind all that stands before it.

    A message's own weight, 1 or 0, goes before that. UserError, which begins with `at`, where it cannot be asked.
    """
    messages = _listed(found, at)
    turns = [_turn(message, f"{at}, message {number}") for number, message in enumerate(messages)]
    _check_order(turns, at)
    continued = [number for number, message in enumerate(messages) if message.get(CONTINUE)]
    last = turns[-1]
    if continued and (continued != [len(turns) - 1] or last.role != "assistant" or _calls(last)):
        raise UserError(
            f"{at}, message {continued[0]}: only a text of the assistant that ends the conversation can be continued",
            f"take {CONTINUE!r} out of the message",
        )
    if _calls(last):
        raise UserError(
            f"{at}: the conversation ends in a tool call, and an answer is text",
            "end it with the answer's text, or with the turn before",
        )
    open_end = bool(continued) or last.role != "assistant"
    wanted = []
    for number, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        is_last = number == len(turns) - 1
        if _is_wanted(turn, message.get(WEIGHT), every or is_last, f"{at}, message {number}") and not (
            is_last and open_end
        ):
            wanted.append(number)
    asked = [_around_question(turns[:number], turns[number].content, at) for number in wanted]
    asked += [_around_question(turns, None, at)] if open_end else []
    if not asked:
        raise UserError(f"{at}: every answer has the weight 0", "give one of them the weight 1, or take the row out")
    return asked


def _is_wanted(turn: Turn, weight: Any, by_setting: bool, at: str) -> bool:
    """Whether a turn is an answer that is asked for."""
    if weight not in (None, 0, 1) or (weight == 1 and (turn.role != "assistant" or _calls(turn))):
        raise UserError(
            f"{at} has the weight {weight!r}",
            "a text of the assistant may have 1, which asks for it, or 0, which does not; others have none",
        )
    return turn.role == "assistant" and not _calls(turn) and (by_setting if weight is None else weight == 1)


def _listed(found: Any, at: str) -> list[Any]:
    """The messages; a data set may hold them by columns."""
    if isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        lengths = {len(column) for column in found.values()}
        if len(lengths) == 1:
            found = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    if not isinstance(found, list) or not found:
        raise UserError(
            f"{at}: expected a conversation, a list of messages, and found {str(found)[:60]!r}",
            'write [{"role": "user", "content": "…"}, …]',
        )
    return found


def _turn(message: Any, at: str) -> Turn:
    """One message, checked by itself."""
    if not isinstance(message, dict):
        raise UserError(f"{at} is {str(message)[:60]!r}, expected an object", "give each message a role and a content")
    further = {key: value for key, value in message.items() if value is not None and key not in (CONTINUE, WEIGHT)}
    role, content = further.pop("role", None), further.pop("content", None)
    if role not in ROLES:
        other = "; its keys are from and value, call them so" if {"from", "value"} <= message.keys() else ""
        raise UserError(
            f"{at} has the role {role!r}", f"a message has a role, {', '.join(ROLES)}, and a content{other}"
        )
    if further.get("tool_calls") and role != "assistant":
        raise UserError(f"{at} calls a tool as the {role}", "only an assistant's message can have tool_calls")
    if content is None and further.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        kind = "no content" if content is None else f"a {type(content).__name__} as its content"
        raise UserError(f"{at} has {kind}, expected text", "write its text; images and other parts cannot be asked")
    if not content.strip() and not further.get("tool_calls"):
        raise UserError(f"{at} is empty", "fill it, or take the message out")
    if fault := fault_of(content):
        raise UserError(f"{at} {fault}", FAULT_HINT)
    try:
        return Turn(role, content, json.dumps(further, ensure_ascii=False) if further else "")
    except TypeError as error:
        raise UserError(f"{at} has a key of another kind than JSON's: {error}", "write it as text or number") from None


def _check_order(turns: Sequence[Turn], at: str) -> None:
    """Refuse what no template can mean; whether two user turns may follow each other, the template says."""
    for number, turn in enumerate(turns):
        if turn.role == "system" and number:
            raise UserError(f"{at}, message {number} is a system message", "only the first message can be one")
    for number, (one, other) in enumerate(pairwise(turns)):
        if one.role == other.role == "assistant":
            raise UserError(f"{at}, messages {number} and {number + 1} are both the assistant's", "join them into one")


def _around_question(turns: Sequence[Turn], answer: str | None, at: str) -> Asked:
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise UserError(f"{at}: no message of the user stands before the answer", "give the conversation a user turn")
    last = users[-1]
    if turns[last].more:
        raise UserError(
            f"{at}, message {last} has the keys {', '.join(turns[last].further)} beside role and content",
            "take them out: a question is text alone",
        )
    return Asked(tuple(turns[:last]), turns[last].content, tuple(turns[last + 1 :]), answer)


def is_continued(after: Sequence[Turn]) -> bool:
    """Whether turns behind a question end in the beginning of its answer."""
    return bool(after) and after[-1].role == "assistant"


def _calls(turn: Turn) -> bool:
    return bool(turn.further.get("tool_calls"))


def tool_texts(turn: Turn) -> list[tuple[str, ...]]:
    """What a prompt must show of the turn's tool calls, each in one of several forms, the plain one first.

    Each call's name; arguments that are a text, as they are; of others the texts and numbers, plain or as JSON has them.
    """
    found: list[tuple[str, ...]] = []
    for call in turn.further.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        name, arguments = function.get("name"), function.get("arguments")
        found += [(text,) for text in (name, arguments) if isinstance(text, str)]
        found += [_forms(leaf) for leaf in _leaves(arguments) if arguments is not leaf]
    return found


def _forms(leaf: str) -> tuple[str, ...]:
    return leaf, json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in _leaves(part)]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return []  # templates write those in several ways
    return [value if isinstance(value, str) else json.dumps(value)]
