"""The rows of a store, rendered for both sides: every query and document, in plan order, and what no two of them may be.

The teacher reads a row to be forgotten behind its prefix. A row to be kept it reads as the student does, so that its logits are
those of its model alone, unless the settings put the prefix before all rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duet.cache.errors import UserError
from duet.cache.record import MAIN_SUBSETS
from duet.stages.models.tokenizers import token_ids
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.questions.requests import BROAD, MAIN, subset_of
from duet.stages.settings.data import BroadSettings, DocumentSettings
from duet.stages.settings.teacher import TeacherSettings
from duet.stages.teacher.plan import RenderedQuery


@dataclass(frozen=True)
class Asked:
    """The queries of a teacher's rows, and the prefixes."""

    prefixes: Mapping[str, str]  # by request
    queries: Mapping[str, Mapping[str, list[Query]]]  # by request and subset
    broad: Mapping[str, list[Query]]  # by source; of documents the texts
    sources: Mapping[str, BroadSettings]  # of the broad rows

    @property
    def sets(self) -> dict[str, list[Query]]:
        """All queries, by what row ids and errors call their sets."""
        main = {subset_of(s, request): self.queries[request][s] for s in MAIN_SUBSETS for request in self.prefixes}
        return main | {f"{BROAD}/{source}": found for source, found in self.broad.items()}


def rows_of(asked: Asked, renderer: Renderer, teacher: TeacherSettings, context: int) -> list[RenderedQuery]:
    """All rows in plan order; `context` is what the teacher can read."""
    rows: list[RenderedQuery] = []
    for subset in MAIN_SUBSETS:
        for request, prefix in asked.prefixes.items():
            before = _in_front(teacher, subset, prefix)
            for query in asked.queries[request][subset]:
                prompt = Prompt.plain(query, before)
                given_ids = _given_ids(renderer, prompt, teacher) if teacher.responses == "given" else None
                row_id = f"{subset_of(subset, request)}/{query.row_id}"
                rows.append(_row(row_id, subset, request, prompt, renderer, given_ids))
    before = _in_front(teacher, BROAD, asked.prefixes[MAIN])
    for source, queries in asked.broad.items():
        settings = asked.sources[source]
        for query in queries:
            row_id, prompt = f"{BROAD}/{source}/{query.row_id}", Prompt.plain(query, before)
            if isinstance(settings, DocumentSettings):
                rows.extend(_document(row_id, prompt, renderer, settings, context))
            else:
                rows.append(_row(row_id, BROAD, MAIN, prompt, renderer, None))
    _check_apart(rows)
    return rows


def _in_front(teacher: TeacherSettings, subset: str, prefix: str) -> str:
    """What stands before a row of this subset, of a request with this prefix, on the teacher's side."""
    return prefix if teacher.prefix_on == "all" or subset == "forget" else ""


def _row(
    row_id: str, subset: str, request: str, prompt: Prompt, renderer: Renderer, given_ids: array[int] | None
) -> RenderedQuery:
    return RenderedQuery(
        row_id=row_id,
        subset=subset,
        request=request,
        teacher_ids=array("i", renderer.prompt(prompt)),
        student_ids=array("i", renderer.prompt(Prompt.plain(prompt.query))),
        given_ids=given_ids,
    )


def _given_ids(renderer: Renderer, prompt: Prompt, teacher: TeacherSettings) -> array[int]:
    return array("i", renderer.answer(prompt, prompt.query.answer or "").ids[: teacher.max_positions])


def _document(
    row_id: str, prompt: Prompt, renderer: Renderer, settings: DocumentSettings, context: int
) -> Iterator[RenderedQuery]:
    """A text that both sides read, cut to what the teacher can, or in parts; with nothing in front, the first token of each is
    only read."""
    teacher_ids, student_ids = renderer.in_front_of_text(prompt.prefix), renderer.in_front_of_text("")
    only_read = 0 if student_ids else 1
    room = context - len(teacher_ids)
    whole = token_ids(renderer.tokenizer, prompt.question)
    most = max(min(settings.max_tokens or room, room), 0)
    split = settings.longer == "split" and len(whole) > most > only_read
    parts = np.array_split(whole, -(-len(whole) // most)) if split else [np.array(whole[:most], int)]
    for number, part in enumerate(parts):
        text = part.tolist()
        if len(text) <= only_read:
            raise UserError(
                f"row {row_id!r} has {len(text)} tokens behind the {len(teacher_ids)} in front of it, "
                f"{only_read + 1} are needed at least",
                "take the document out" if room > only_read else "shorten the prefix, or set teacher.prefix_on: forget",
            )
        yield RenderedQuery(
            row_id=f"{row_id}/{number}" if split else row_id,
            subset=BROAD,
            request=MAIN,
            teacher_ids=array("i", [*teacher_ids, *text[:only_read]]),
            student_ids=array("i", [*student_ids, *text[:only_read]]),
            given_ids=array("i", text[only_read:]),
            cut=not split and len(text) < len(whole),
        )


def _check_apart(rows: Sequence[RenderedQuery]) -> None:
    """Refuse ids that are not unique over all requests, and a query that is to be forgotten here and kept there.

    Within a request that is refused where the teacher would answer the two rows differently.
    """
    seen: set[str] = set()
    forgotten = {tuple(row.student_ids): row for row in rows if row.subset == "forget"}
    for row in rows:
        if row.row_id in seen:
            raise UserError(
                f"the row id {row.row_id!r} occurs in two requests",
                "give the request another name, or the row another id",
            )
        seen.add(row.row_id)
        other = forgotten.get(tuple(row.student_ids))
        if other and row.subset == "retain" and (row.request, row.teacher_ids) != (other.request, other.teacher_ids):
            raise UserError(
                f"the same query is to be kept and to be forgotten: {row.row_id!r} and {other.row_id!r}",
                "take it out of the retain set, or out of the forget set",
            )
        if other and row.subset == BROAD and not row.is_document:
            raise UserError(
                f"the same query is among the broad ones and to be forgotten: {row.row_id!r} and {other.row_id!r}",
                f"take it out of data.{BROAD}, or out of the forget set",
            )


def remarks_on(asked: Asked, rows: Sequence[RenderedQuery]) -> Iterator[str]:
    """What stops nothing: broad queries that are retain queries too, and documents of which the end is not read."""
    kept = {tuple(row.student_ids) for row in rows if row.subset == "retain"}
    twice = [row for row in rows if row.subset == BROAD and not row.is_document and tuple(row.student_ids) in kept]
    if twice:
        yield f"{len(twice)} broad queries are retain queries too, the first {twice[0].row_id!r}: students learn them twice"
    for source, queries in asked.broad.items():
        cut = sum(row.cut for row in rows if row.row_id.startswith(f"{BROAD}/{source}/"))
        if cut:
            yield f"data.{BROAD}.{source}: {cut} of {len(queries)} documents are longer than is read, their ends are left out"
