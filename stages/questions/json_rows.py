"""Rows of JSON, whatever the file's name ends in: an array of objects, or objects one after the other (JSON Lines)."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.stages.questions.conversations import FIELD as CONVERSATION
from duet.stages.questions.text_files import text_of
from duet.stages.settings.data import DataSettings

KINDS = (".jsonl", ".ndjson", ".json")
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA_BEFORE_END = re.compile(r",?\s*[]}]")


class _Twice(ValueError):
    """A key that an object has twice, of which Python's reader would drop the first."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode


def read_json_rows(path: Path, settings: DataSettings, where: str) -> Iterator[Any]:
    """The rows of a JSON file; UserError with the line of what is no JSON."""
    text = text_of(path, where)
    at = _after_space(text, 0)
    if text[at : at + 1] == "[":
        yield from _of_array(text, at, path, where)
        return
    rows = _one_after_the_other(text, at, path, where)
    first = next(rows, None)
    if isinstance(first, dict):
        second = next(rows, None)
        if second is None:
            _refuse_whole(first, settings, path, where)
        yield from (row for row in (first, second) if row is not None)
    elif first is not None:
        yield first
    yield from rows


def _one_after_the_other(text: str, at: int, path: Path, where: str) -> Iterator[Any]:
    while at < len(text):
        row, at = _value(text, at, path, where)
        at = _after_space(text, at)
        yield row


def _of_array(text: str, at: int, path: Path, where: str) -> Iterator[Any]:
    at = _after_space(text, at + 1)
    ended = text[at : at + 1] == "]"
    while not ended:
        row, at = _value(text, at, path, where)
        yield row
        at = _after_space(text, at)
        ended = text[at : at + 1] == "]"
        if not ended and text[at : at + 1] != ",":
            raise _fault(text, at, "a comma or ] must follow a row", path, where)
        if not ended:
            at = _after_space(text, at + 1)
    if (at := _after_space(text, at + 1)) < len(text):
        raise _fault(text, at, "something follows the array", path, where)


def _value(text: str, at: int, path: Path, where: str) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends."""
    try:
        return _decode(text, at)
    except json.JSONDecodeError as error:
        cut_off = error.msg.startswith("Unterminated string")  # a line break would have been told as such
        raise _fault(text, len(text) if cut_off else error.pos, error.msg, path, where) from None
    except RecursionError:
        what, hint = "is nested too deeply", "write one object per row, whose fields are texts, numbers or lists"
    except _Twice as error:
        what, hint = str(error), "keep one of the two"
    except ValueError as error:  # a number of too many digits
        what, hint = f"cannot be read: {error}", "put long numbers in quotes"
    line = text.count("\n", 0, at) + 1
    raise UserError(f"{where}: {path}, the row that begins in line {line} {what}", hint)


def _fault(text: str, at: int, message: str, path: Path, where: str) -> UserError:
    """What is wrong at `at`, where the reader could not go on."""
    at = min(at, len(text.rstrip()))
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    what, hint = _told(text, at, message)
    return UserError(f"{where}: {path}, line {line} is not JSON: {what}, column {column}", hint)


def _told(text: str, at: int, message: str) -> tuple[str, str]:
    """The fault at `at` and what to do, in words of people who write files, not parsers."""
    before = text[:at].rstrip()
    if at == len(text.rstrip()):
        return "the file ends within a row", "it was cut off: copy or download it again"
    if text[at] == "\ufeff":
        return "a byte-order mark stands within the file", "files were joined: take the mark out"
    if _COMMA_BEFORE_END.match(text, at) and (text[at] == "," or before.endswith(",")):
        return "a comma stands before a closing bracket", "take the comma out"
    if text[at] == ",":
        return "a comma follows a row", "write one object per line without commas between them, or all of them in [ ]"
    if message.startswith("Invalid control character"):
        return "a line break or a tab stands in a text", r"write it as \n or \t; or a quote is missing before it"
    if not before and text[at] not in "{[":
        return "it begins with neither { nor [", "if it is a table, give the file the ending .csv or .tsv"
    return message, "each line must be one JSON object, or the file one array of them"


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _refuse_whole(row: dict[str, Any], settings: DataSettings, path: Path, where: str) -> None:
    """Refuse a file's only object where it is not a row, but holds the rows."""
    name, rows = shlex.quote(str(path)), f"rows{KINDS[0]}"
    asked = row.get(settings.question_field) or row.get(CONVERSATION)
    if isinstance(asked, list) and asked and isinstance(asked[0], dict):
        return
    if isinstance(row.get(settings.question_field), dict | list):
        raise UserError(
            f"{where}: {path} is one object that holds columns, expected rows",
            f"write an object per row; with pandas: pandas.read_json(...).to_json('{rows}', orient='records', lines=True)",
        )
    if settings.question_field in row:
        return
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        raise UserError(
            f"{where}: {path} is one object, expected rows; lists of objects are in its {', '.join(map(repr, lists))}",
            f"take one of them out: jq -c {shlex.quote(f'.[{json.dumps(lists[0])}][]')} {name} > {rows}",
        )
    if row and all(isinstance(value, dict) for value in row.values()):
        raise UserError(
            f"{where}: {path} is one object that holds rows by their ids, expected rows",
            f"write an object per row: jq -c 'to_entries[] | {{id: .key}} + .value' {name} > {rows}",
        )
