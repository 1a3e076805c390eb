"""The ids that `teacher.ids_from` names for each row: those of another model's store, or of a file of JSON rows.

A row of a store names its own ids at each position, so its response must be the one that the teacher is given, unless only the
first position is kept. A row of a file names the same ids for all positions.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from duet.cache.errors import UserError
from duet.cache.location import is_url, location_of
from duet.cache.reader import Store
from duet.cache.record import prompt_and_response
from duet.stages.questions.json_rows import KINDS, read_json_rows
from duet.stages.settings.data import DataSettings
from duet.stages.settings.teacher import TeacherSettings
from duet.stages.teacher.plan import RenderedQuery

WHERE = "teacher.ids_from"


def with_named_ids(
    rows: Sequence[RenderedQuery], teacher: TeacherSettings, num_ids: int, tokenizer_sha256: str
) -> list[RenderedQuery]:
    """The rows with the ids that are named for them; UserError where a row has none, too many, or ids that there are not."""
    source = str(teacher.ids_from)
    if not is_url(source) and source.endswith(KINDS):
        named = _of_file(Path(source))
    else:
        named = _of_store(source, rows, teacher, tokenizer_sha256)
    for row in rows:
        if row.row_id not in named:
            raise UserError(f"{WHERE}: {source} names no ids for row {row.row_id!r}", "name some for every row")
        for ids in named[row.row_id]:
            if not 1 <= len(set(ids)) == len(ids) < teacher.top_k:
                raise UserError(
                    f"{WHERE}: row {row.row_id!r} has {len(ids)} ids, {len(set(ids))} of them different, at a position",
                    f"name 1 to {teacher.top_k - 1} different ones, or set a larger teacher.top_k: one is the likeliest's",
                )
            if not 0 <= min(ids) <= max(ids) < num_ids:
                raise UserError(f"{WHERE}: row {row.row_id!r} names an id outside 0..{num_ids - 1}", "name token ids")
    return [replace(row, named_ids=named[row.row_id]) for row in rows]


def _of_file(path: Path) -> dict[str, tuple[array[int], ...]]:
    named: dict[str, tuple[array[int], ...]] = {}
    for number, row in enumerate(read_json_rows(path, DataSettings(path=str(path)), WHERE), 1):
        row_id, ids = (row.get("row_id"), row.get("ids")) if isinstance(row, dict) else (None, None)
        if not isinstance(row_id, str) or not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise UserError(
                f"{WHERE}: {path}, row {number} is not a row_id with its ids",
                'write rows such as {"row_id": "forget/0", "ids": [17, 4]}',
            )
        if row_id in named:
            raise UserError(f"{WHERE}: {path} has the row {row_id!r} twice", "keep one of the two")
        try:
            named[row_id] = (array("i", ids),)
        except OverflowError:
            raise UserError(f"{WHERE}: row {row_id!r} names an id that is too large", "name token ids") from None
    return named


def _of_store(
    source: str, rows: Sequence[RenderedQuery], teacher: TeacherSettings, tokenizer_sha256: str
) -> Mapping[str, tuple[array[int], ...]]:
    store = Store(location_of(source))
    if store.manifest.provenance.get("tokenizer_sha256") != tokenizer_sha256:
        raise UserError(
            f"{WHERE}: {source} was made with another tokenizer, whose ids mean other tokens",
            "name a store of a model with the teacher's tokenizer",
        )
    given = {row.row_id: row.given_ids for row in rows}
    named: dict[str, tuple[array[int], ...]] = {}
    for part in store.rows():
        for number, row_id in enumerate(part.row_ids):
            first, end = part.position_offsets[number : number + 2]
            if row_id not in given:
                continue
            response, theirs = given[row_id], prompt_and_response(part, number)[1]
            if response is None and teacher.max_positions > 1:
                raise UserError(
                    f"{WHERE}: the store {source} names ids for its own responses, and row {row_id!r} gets another here",
                    "set teacher.max_positions: 1, or teacher.responses: given in both",
                )
            if response is not None and theirs.tolist() != list(response):
                raise UserError(
                    f"{WHERE}: row {row_id!r} has another response in {source}, of {len(theirs)} tokens",
                    "make that store with the same data, teacher.responses and teacher.max_positions",
                )
            used = end if response is not None else first + 1
            named[row_id] = tuple(array("i", ids) for ids in part.topk_ids_NK[first:used].tolist())
    return named
