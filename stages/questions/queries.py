"""Query sets: from a file or a Hugging Face data set to checked rows. Nothing is dropped or repaired on the way.

How a file becomes rows is in `json_rows.py`, `tables.py` (CSV) and `columns.py` (Parquet, the hub).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.errors import UserError, nearest_path
from duet.stages.questions import conversations
from duet.stages.questions.columns import HUB_SCHEME, QUESTION, WrongField, read_hub, read_parquet
from duet.stages.questions.conversations import Turn
from duet.stages.questions.json_rows import KINDS as JSON_KINDS
from duet.stages.questions.json_rows import read_json_rows
from duet.stages.questions.tables import DELIMITERS, read_table
from duet.stages.questions.text_files import FAULT_HINT, bytes_of, fault_of, refuse_other_kind
from duet.stages.settings.data import DataSettings

READERS: dict[str, Callable[[Path, DataSettings, str], Iterator[Any]]] = {  # of files, by the ends of their names
    **dict.fromkeys(JSON_KINDS, read_json_rows),
    ".parquet": read_parquet,
    **dict.fromkeys(DELIMITERS, read_table),
}
SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True)
class Query:
    """One question, or a conversation of which it is the last user turn. `answer` is None where the data has none, and the
    right choice where it has choices; what the further fields hold, and whether they do, the settings say."""

    row_id: str
    question: str
    answer: str | None
    paraphrased: str | None = None  # the answer in other words
    perturbed: tuple[str, ...] | None = None  # wrong answers, at least one
    choices: tuple[str, ...] = ()
    right: int | None = None  # number of the right choice, from 0
    before: tuple[Turn, ...] = ()  # the conversation's turns before the question
    after: tuple[Turn, ...] = ()  # those behind it; the assistant's as the last is the beginning of the answer

    @property
    def is_conversation(self) -> bool:
        return bool(self.before or self.after)

    @property
    def texts(self) -> list[str]:
        """All that is said up to the answer, turn by turn."""
        return [turn.content for turn in self._turns if turn.content]

    @property
    def asked(self) -> str:
        """What is asked, as one text that no other query has: the question, or the conversation as JSON."""
        if not self.is_conversation:
            return self.question
        return json.dumps([turn.message for turn in self._turns], ensure_ascii=False)

    @property
    def _turns(self) -> list[Turn]:
        return [*self.before, Turn("user", self.question), *self.after]


def load_queries(settings: DataSettings, where: str, need_answers: bool = False) -> list[Query]:
    """Read, check and select the rows of one query set; `where` is the config key that errors name."""
    rows = list(_read_rows(settings, where))
    if not rows:
        raise UserError(f"{where}: {settings.path} has no rows", "name a file with at least one question")
    queries = [_queries(row, number, settings, where, need_answers) for number, row in enumerate(rows)]
    _check_unique(queries, settings, where)
    return [query for i in _selection(settings, len(queries), where) for query in queries[i]]


def _read_rows(settings: DataSettings, where: str) -> Iterator[Any]:
    if settings.path.startswith(HUB_SCHEME):
        return read_hub(settings, where)
    if "://" in settings.path:
        raise UserError(
            f"{where}.path: {settings.path} is an address, expected a file",
            "download it; of addresses only hf:// is read",
        )
    path = Path(settings.path)
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in READERS)
        there = f"name one of its files: {', '.join(files[:5])}" if files else f"name a file ({', '.join(READERS)})"
        raise UserError(f"{where}.path: {settings.path} is a directory, expected a file", there)
    if not path.is_file():
        raise UserError(
            f"{where}.path: no such file: {settings.path}",
            nearest_path(settings.path)
            + "paths are relative to the current directory; a data set on the Hugging Face hub is hf://OWNER/NAME",
        )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        refuse_other_kind(bytes_of(path, where), path, where)
        raise UserError(
            f"{where}.path: unknown kind of file: {settings.path}", f"use {', '.join(READERS)} or hf://OWNER/NAME"
        )
    return reader(path, settings, where)


def _queries(row: Any, number: int, settings: DataSettings, where: str, need_answers: bool) -> list[Query]:
    """A row's query, or those of a conversation of which several answers are asked for."""
    at = f"{where}: {settings.path}, row {number}"
    if not isinstance(row, dict):
        raise UserError(f"{at} is {shown(row)}, expected an object", 'write one object per row: {"question": "…"}')
    choices, right = (), None
    if settings.choices_field is not None:
        choices, right = _choices(row, settings, at, where)
        row = row | {settings.answer_field: choices[right]}
    asked = _asked(row, settings, at, where)
    has_answer = row.get(settings.answer_field) is not None
    if has_answer and all(one.answer is not None for one in asked):
        raise UserError(
            f"{at} has two answers: its conversation ends in one, and the field {settings.answer_field!r} holds another",
            f"take one of them out, or name a field that no row has with {where}.answer_field",
        )
    given = None  # of a question, and of a conversation without an answer of its own
    if has_answer or (need_answers and any(one.answer is None for one in asked)):
        given = _text(row, "answer_field", settings, at, where)
    paraphrased = (
        _text(row, "paraphrased_field", settings, at, where) if settings.paraphrased_field is not None else None
    )
    perturbed = _texts(row, "perturbed_field", settings, at, where) if settings.perturbed_field is not None else None
    row_id = _row_id(row, settings, at, where) if settings.id_field is not None else str(number)
    if len(asked) > 1 and (paraphrased or perturbed or choices):
        raise UserError(
            f"{at} asks for {len(asked)} answers, and has other answers to one",
            f"leave {where}.turns out, and the weights of its messages, or the fields of other answers",
        )
    return [
        Query(
            f"{row_id}/{at_turn}" if len(asked) > 1 else row_id,
            one.question,
            given if one.answer is None else one.answer,
            paraphrased,
            perturbed,
            choices,
            right,
            before=one.before,
            after=one.after,
        )
        for at_turn, one in enumerate(asked, start=1)
    ]


def _asked(row: dict[str, Any], settings: DataSettings, at: str, where: str) -> list[conversations.Asked]:
    """The row's question, or its conversation: a list in the place of a text, or under `messages` where no question is."""
    field, every = settings.question_field, settings.turns == "all"
    if field == QUESTION and row.get(field) is None and row.get(conversations.FIELD) is not None:
        return conversations.asked_of(row[conversations.FIELD], every, f"{at}: {conversations.FIELD}")
    if isinstance(row.get(field), list | dict):
        return conversations.asked_of(row[field], every, f"{at}: {field}")
    return [conversations.Asked((), _text(row, "question_field", settings, at, where), (), None)]


def shown(value: Any) -> str:
    """A value as a message shows it: in full if it is short."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"


def _field(row: dict[str, Any], setting: str, settings: DataSettings, at: str, where: str) -> Any:
    """What the row holds in the field that a setting names; WrongField if that is nothing."""
    field = getattr(settings, setting)
    if field not in row:
        raise WrongField(
            f"{at} has no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}",
            f"name the field with {where}.{setting}",
        )
    value = row[field]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise WrongField(
            f"{at}: {field} is {'null' if value is None else 'NaN'}",
            f"fill it, take the row out, or name another field with {where}.{setting}",
        )
    return value


def _text(row: dict[str, Any], setting: str, settings: DataSettings, at: str, where: str) -> str:
    field, value = getattr(settings, setting), _field(row, setting, settings, at, where)
    if not isinstance(value, str) or not value.strip():
        raise WrongField(
            f"{at} has {shown(value)} in field {field!r}, expected text",
            f"fix the row, or name another field with {where}.{setting}",
        )
    _check_whole(value, f"{at}: {field}")
    return value


def _check_whole(text: str, at: str) -> None:
    if fault := fault_of(text):
        raise UserError(f"{at} {fault}", FAULT_HINT)


def _texts(row: dict[str, Any], setting: str, settings: DataSettings, at: str, where: str) -> tuple[str, ...]:
    """A list of texts, at least one."""
    field, found = getattr(settings, setting), _field(row, setting, settings, at, where)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        wanted = "texts" if setting == "choices_field" else "wrong answers"
        raise WrongField(
            f"{at} has {shown(found)} in field {field!r}, expected a list of {wanted}",
            f"fix the row, or name another field with {where}.{setting}",
        )
    for number, text in enumerate(found):
        _check_whole(text, f"{at}: {field}, entry {number},")
    return tuple(found)


def _row_id(row: dict[str, Any], settings: DataSettings, at: str, where: str) -> str:
    """The row's own id, which is text or a number."""
    field, value = settings.id_field, _field(row, "id_field", settings, at, where)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise WrongField(
            f"{at} has {shown(value)} in field {field!r}, expected an id: text or a number",
            f"fix the row, name another field with {where}.id_field, or leave that out",
        )
    _check_whole(str(value), f"{at}: {field}")
    return str(value)


def _choices(row: dict[str, Any], settings: DataSettings, at: str, where: str) -> tuple[tuple[str, ...], int]:
    """The choices' texts and the number of the right one."""
    choices = _texts(row, "choices_field", settings, at, where)
    index = _field(row, "answer_field", settings, at, where)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise UserError(
            f"{at}: {shown(index)} is not an index into its choices {shown(list(choices))}",
            f"{where}.answer_field must hold the index (from 0) of the right entry of {settings.choices_field!r}",
        )
    return choices, index


def _check_unique(queries: list[list[Query]], settings: DataSettings, where: str) -> None:
    first: dict[str, int] = {}
    for number, query in ((number, query) for number, of_row in enumerate(queries) for query in of_row):
        if query.row_id in first:
            raise UserError(
                f"{where}: duplicate id {query.row_id!r} in {settings.path}, rows {first[query.row_id]} and {number}",
                f"make the ids in field {settings.id_field!r} unique, or leave {where}.id_field out",
            )
        first[query.row_id] = number


def _selection(settings: DataSettings, count: int, where: str) -> list[int]:
    start, stop = settings.rows or (0, count)
    if start >= stop or stop > count:
        raise UserError(
            f"{where}.rows: [{start}, {stop}] is not a range within the {count} rows of {settings.path}",
            f"give [first, stop] with first < stop <= {count}",
        )
    if settings.sample is None:
        return list(range(start, stop))
    if settings.sample > stop - start:
        raise UserError(
            f"{where}.sample: {settings.sample} rows wanted, {stop - start} are there in {settings.path}",
            f"set {where}.sample to at most {stop - start}, or leave it out",
        )
    drawn = np.random.default_rng(settings.sample_seed).choice(stop - start, settings.sample, replace=False)
    return [start + int(i) for i in sorted(drawn)]
