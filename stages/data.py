"""Query sets: from a file or a Hugging Face data set to checked rows. Nothing is dropped or mended on the way.

What a table of text (CSV) must look like, and how it is read, is in `tables.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import UserError
from stages.near import near_path
from stages.settings import DataSettings
from stages.tables import DELIMITERS, read_table, text_of

HUB_SCHEME = "hf://"
KINDS = (".jsonl", ".ndjson", ".parquet", *DELIMITERS)  # of files, by the ends of their names


@dataclass(frozen=True)
class Query:
    """One question. `answer` is None where the data has none, and the right choice where it has choices; what the further
    fields hold, and whether they do, the settings say."""

    row_id: str
    question: str
    answer: str | None
    paraphrased: str | None = None  # the answer in other words
    perturbed: tuple[str, ...] | None = None  # wrong answers, at least one
    choices: tuple[str, ...] = ()
    right: int | None = None  # number of the right choice, from 0


def load_queries(settings: DataSettings, where: str, need_answers: bool = False) -> list[Query]:
    """Read, check and select the rows of one query set; `where` is the config key that errors name."""
    rows = list(_read_rows(settings, where))
    if not rows:
        raise UserError(f"{where}: {settings.path} has no rows", "name a file with at least one question")
    queries = [_query(row, number, settings, where, need_answers) for number, row in enumerate(rows)]
    _check_unique(queries, settings, where)
    return [queries[i] for i in _selection(settings, len(queries), where)]


def _read_rows(settings: DataSettings, where: str) -> Iterator[Any]:
    if settings.path.startswith(HUB_SCHEME):
        return _read_hub(settings, where)
    path = Path(settings.path)
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in KINDS)
        there = f"name one of its files: {', '.join(files[:5])}" if files else f"name a file ({', '.join(KINDS)})"
        raise UserError(f"{where}.path: {settings.path} is a directory, expected a file", there)
    if not path.is_file():
        raise UserError(
            f"{where}.path: no such file: {settings.path}",
            near_path(settings.path)
            + "paths are relative to the current directory; a data set on the Hugging Face hub is hf://OWNER/NAME",
        )
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(path, where)
    if kind in (".jsonl", ".ndjson"):
        return _read_jsonl(path, where)
    if kind in DELIMITERS:
        return read_table(path, settings, where)
    raise UserError(
        f"{where}.path: unknown kind of file: {settings.path}", f"use {', '.join(KINDS)} or hf://OWNER/NAME"
    )


def _read_jsonl(path: Path, where: str) -> Iterator[Any]:
    for number, line in enumerate(io.StringIO(text_of(path, where), newline=None), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: {path}, line {number} is not JSON: {error.msg}, column {error.colno}",
                    "each line must be one JSON object",
                ) from None


def _read_parquet(path: Path, where: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: {path} is not a Parquet file: {error}", "write it with pyarrow or pandas") from None


def _read_hub(settings: DataSettings, where: str) -> Iterator[Any]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError(
            f"{where}: {settings.path} needs the package datasets", "pip install 'duet-unlearn[datasets]'"
        ) from None
    target = settings.path.removeprefix(HUB_SCHEME)
    try:
        yield from datasets.load_dataset(target, settings.name, split=settings.split)
    except (ValueError, OSError, DatasetsError) as error:
        raise UserError(
            f"{where}: cannot load {settings.path} (name {settings.name}, split {settings.split}): {error}",
            "check owner, name and split, and that the hub can be reached; or download it and name the .parquet file",
        ) from None


def _query(row: Any, number: int, settings: DataSettings, where: str, need_answers: bool) -> Query:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: row {number} of {settings.path} is {type(row).__name__}, expected an object",
            "write one object per row",
        )
    choices, right = (), None
    if settings.choices_field is not None:
        choices, right = _choices(row, number, settings, where)
        row = row | {settings.answer_field: choices[right]}
    question = _text(row, settings.question_field, "question_field", number, settings, where)
    has_answer = row.get(settings.answer_field) is not None
    answer = (
        _text(row, settings.answer_field, "answer_field", number, settings, where)
        if has_answer or need_answers
        else None
    )
    paraphrased = (
        _text(row, settings.paraphrased_field, "paraphrased_field", number, settings, where)
        if settings.paraphrased_field is not None
        else None
    )
    perturbed = _perturbed(row, number, settings, where)
    if settings.id_field is None:
        return Query(str(number), question, answer, paraphrased, perturbed, choices, right)
    if row.get(settings.id_field) is None:
        raise UserError(*_lacks(row, settings.id_field, "id_field", number, settings, where))
    return Query(str(row[settings.id_field]), question, answer, paraphrased, perturbed, choices, right)


def _text(row: dict[str, Any], field: str, setting: str, number: int, settings: DataSettings, where: str) -> str:
    if field not in row:
        raise UserError(*_lacks(row, field, setting, number, settings, where))
    if not isinstance(row[field], str) or not row[field].strip():
        raise UserError(
            f"{where}: row {number} of {settings.path} has {row[field]!r} in field {field!r}, expected text",
            f"mend the row, or name another field with {where}.{setting}",
        )
    return row[field]


def _perturbed(row: dict[str, Any], number: int, settings: DataSettings, where: str) -> tuple[str, ...] | None:
    """The wrong answers, if a field for them is named."""
    field = settings.perturbed_field
    if field is None:
        return None
    if field not in row:
        raise UserError(*_lacks(row, field, "perturbed_field", number, settings, where))
    found = row[field]
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise UserError(
            f"{where}: row {number} of {settings.path} has {found!r} in field {field!r}, expected a list of wrong answers",
            f"mend the row, or name another field with {where}.perturbed_field",
        )
    return tuple(found)


def _choices(row: dict[str, Any], number: int, settings: DataSettings, where: str) -> tuple[tuple[str, ...], int]:
    """The choices' texts and the number of the right one."""
    field = settings.choices_field or ""
    for name, setting in ((field, "choices_field"), (settings.answer_field, "answer_field")):
        if name not in row:
            raise UserError(*_lacks(row, name, setting, number, settings, where))
    choices, index = row[field], row[settings.answer_field]
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(
            f"{where}: row {number} of {settings.path} has {choices!r} in field {field!r}, expected a list of texts",
            f"mend the row, or name another field with {where}.choices_field",
        )
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise UserError(
            f"{where}: row {number} of {settings.path}: {index!r} is not an index into its choices {choices!r}",
            f"{where}.answer_field must hold the index (from 0) of the right entry of {field!r}",
        )
    return tuple(choices), index


def _lacks(
    row: dict[str, Any], field: str, setting: str, number: int, settings: DataSettings, where: str
) -> tuple[str, str]:
    return (
        f"{where}: row {number} of {settings.path} has no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}",
        f"name the field with {where}.{setting}",
    )


def _check_unique(queries: list[Query], settings: DataSettings, where: str) -> None:
    first: dict[str, int] = {}
    for number, query in enumerate(queries):
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
