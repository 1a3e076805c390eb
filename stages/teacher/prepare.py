"""Stage one, before an engine starts: which prompts the prefixed teacher is asked.

`prepare` reads data, tokenizer and weights' hashes; `plan.py` makes a plan of them, with its fingerprint; `capture.py` has
an engine fill the store. The student's side imports none of this: the two meet through the store on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError, note
from duet.cache.files import sha256_json
from duet.stages.engines.interface import Ask, EngineSpec
from duet.stages.models.directory import load_config, resolve_model, text_config
from duet.stages.models.identity import text_sha256, weights_sha256
from duet.stages.models.limits import check_ids_within, check_length, context_length, vocab_width
from duet.stages.models.loading import pick_device
from duet.stages.models.tokenizers import tokenizer_sha256
from duet.stages.questions.prompts import Renderer, open_renderer
from duet.stages.questions.proof import prove
from duet.stages.questions.queries import Query
from duet.stages.questions.requests import BROAD, MAIN, broad_of, prefixes_of, queries_of
from duet.stages.settings.data import ForgetRequest, PromptSettings, TrainingData
from duet.stages.settings.teacher import TeacherSettings, ids_provenance
from duet.stages.teacher.named_ids import with_named_ids
from duet.stages.teacher.plan import Prepared, RenderedQuery
from duet.stages.teacher.rows import Asked, remarks_on, rows_of

SELF_TEST_TOKENS = 3  # positions that the self-test adds to a prompt


@dataclass(frozen=True)
class Questions:
    """What a run asks, the same of each of its teachers."""

    prompt: PromptSettings
    data: TrainingData
    topic: str
    requests: Sequence[ForgetRequest] = ()
    limit: int | None = None  # a trial: the number of first queries of each subset, and of each source of broad rows


@dataclass(frozen=True)
class Rendered:
    """What a teacher is asked, before any weight is read."""

    config: Any  # the model's
    renderer: Renderer
    asked: Asked
    rows: list[RenderedQuery]  # in plan order
    num_ids: int  # ids of the tokenizer


def render_rows(model_dir: Path, teacher: TeacherSettings, questions: Questions) -> Rendered:
    """Load, render and check every row; of the model, config and tokenizer are read."""
    config = load_config(model_dir, teacher.trust_remote_code)
    renderer = open_renderer(model_dir, questions.prompt, teacher.trust_remote_code)
    num_ids = max(renderer.tokenizer.get_vocab().values()) + 1
    if teacher.top_k > num_ids:
        raise UserError(
            f"teacher.top_k is {teacher.top_k}, the vocabulary of {teacher.model} has {num_ids} ids",
            f"set teacher.top_k to at most {num_ids}",
        )
    given = teacher.responses == "given"
    if questions.prompt.answer is not None and not given:
        raise UserError(
            "prompt.answer does nothing with generated responses", "leave it out, or set teacher.responses: given"
        )
    prefixes = prefixes_of(teacher.prefix, questions.topic, questions.requests)
    queries = {
        request: {subset: found[: questions.limit] for subset, found in by_subset.items()}
        for request, by_subset in queries_of(questions.data, questions.requests, need_answers=given).items()
    }
    broad = {source: found[: questions.limit] for source, found in broad_of(questions.data).items()}
    asked = Asked(prefixes, queries, broad, questions.data.broad)
    prove(
        renderer,
        asked.sets,
        {f"the prefix of {request}" if request else "teacher.prefix": text for request, text in prefixes.items()},
        ("question", "answer") if given else ("question",),
    )
    context = context_length(config)
    rows = rows_of(asked, renderer, teacher, context)
    if teacher.ids_from is not None:
        rows = with_named_ids(rows, teacher, num_ids, tokenizer_sha256(renderer.tokenizer))
    for row in rows:
        if not row.is_document:  # those are cut
            check_length(row.teacher_ids, teacher.max_positions, context, row.row_id, "teacher")
        check_ids_within([*row.teacher_ids, *(row.given_ids or ())], vocab_width(config), row.row_id, "the teacher")
    return Rendered(config, renderer, asked, rows, num_ids)


def prepare(teacher: TeacherSettings, questions: Questions, device: str) -> Prepared:
    """`render_rows`, and a hash of everything that can change the numbers but the engine.

    A trial has a fingerprint of its own.
    """
    model_dir = resolve_model(teacher.model, "teacher.model")
    found = render_rows(model_dir, teacher, questions)
    renderer, tokenizer, rows = found.renderer, found.renderer.tokenizer, found.rows
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = renderer.chat.source if renderer.chat else None  # the store has the one that is used
    if renderer.chat and renderer.chat.asks_the_clock:
        note(
            f"the chat template asks for the day: it is told {renderer.chat.date}, in every stage; prompt.date sets it"
        )
    for text in remarks_on(found.asked, rows):
        note(text)
    longest = max(len(row.teacher_ids) + max(teacher.max_positions, len(row.given_ids or ())) for row in rows)
    spec = engine_spec(model_dir, teacher, renderer, longest, device)
    asked = {
        name: {"prefix": text, "data": _data_provenance(found.asked.queries[name])}
        for name, text in found.asked.prefixes.items()
    }
    if found.asked.broad:
        asked[MAIN]["data"][BROAD] = _data_provenance(found.asked.broad)
    chosen = teacher.prefix_on != "all" and any(found.asked.prefixes.values())  # nothing to choose without a prefix
    prefix_on = {"prefix_on": teacher.prefix_on} if chosen else {}
    provenance = {
        "weights_sha256": weights_sha256(model_dir),
        "dtype": spec.dtype,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": text_sha256(renderer.chat.source if renderer.chat else ""),
        "eos_ids": list(spec.eos_ids),
        **asked.pop(MAIN),
        **prefix_on,
        **({"requests": asked} if asked else {}),
        "prompt": renderer.provenance,
        "prompts_sha256": _prompts_sha256(rows),
        "top_k": teacher.top_k,
        "max_positions": teacher.max_positions,
        **_ids_provenance(teacher, rows),
        "responses": _responses(teacher),
        "logsumexp": teacher.logsumexp,
        "quantization": teacher.quantization,
    }
    ask = Ask(teacher.top_k, teacher.max_positions, teacher.logsumexp, teacher.temperature, teacher.ids)
    return Prepared(rows, tokenizer, spec, ask, provenance, str(teacher.model), teacher.seed or 0)


def engine_spec(model_dir: Path, teacher: TeacherSettings, renderer: Renderer, longest: int, device: str) -> EngineSpec:
    """How a teacher's engine is opened for prompts with their responses of up to `longest` tokens."""
    config = load_config(model_dir, teacher.trust_remote_code)
    num_ids = max(renderer.tokenizer.get_vocab().values()) + 1
    return EngineSpec(
        model_dir=model_dir,
        dtype=_resolve_dtype(teacher.dtype, config),
        num_ids=min(num_ids, vocab_width(config)),
        context=min(context_length(config), longest + SELF_TEST_TOKENS),
        eos_ids=tuple(renderer.stop_ids),
        device=pick_device(device),
        trust_remote_code=teacher.trust_remote_code,
        batch_size=teacher.batch_size,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
        tensor_parallel=teacher.tensor_parallel,
        pipeline_parallel=teacher.pipeline_parallel,
        quantization=teacher.quantization,
    )


def _responses(teacher: TeacherSettings) -> str | dict[str, float]:
    """Where the responses come from, for the record: "greedy", "given", or how they were sampled."""
    if teacher.temperature is not None:
        return {"temperature": teacher.temperature, "seed": teacher.seed or 0}
    return "given" if teacher.responses == "given" else "greedy"


def check_alike(prepared: Mapping[str, Prepared]) -> None:
    """Refuse teachers, by name, from whose rows a student could not learn side by side, and two that are the same."""
    (first, expected), *others = prepared.items()
    for name, found in others:
        if found.provenance["tokenizer_sha256"] != expected.provenance["tokenizer_sha256"]:
            raise UserError(
                f"teachers {first} and {name}: {expected.model} and {found.model} have different tokenizers",
                "take models of one tokenizer: a student has only one",
            )
        if [row.student_ids for row in found.rows] != [row.student_ids for row in expected.rows]:
            raise UserError(
                f"teachers {first} and {name}: {expected.model} and {found.model} render the same questions differently",
                "give both models the same chat template, or set prompt.format: plain",
            )
    names: dict[str, str] = {}
    for name, found in prepared.items():
        same = names.setdefault(sha256_json(found.provenance), name)
        if same != name:
            raise UserError(f"teachers {same} and {name} are the same", "give them different prefixes or models")


def _data_provenance(queries: Mapping[str, list[Query]]) -> dict[str, Any]:
    """Of each set of queries, rows and hash."""
    return {
        subset: {"rows": len(found), "sha256": sha256_json([[query.row_id, query.question] for query in found])}
        for subset, found in queries.items()
    }


def _prompts_sha256(rows: Sequence[RenderedQuery]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        ids = (row.teacher_ids, row.student_ids, row.given_ids or ())
        digest.update(sha256_json([row.row_id, *map(list, ids)]).encode())
    return digest.hexdigest()


def _ids_provenance(teacher: TeacherSettings, rows: Sequence[RenderedQuery]) -> dict[str, Any]:
    found = ids_provenance(teacher)
    if teacher.ids == "given":
        named = [[row.row_id, [list(ids) for ids in row.named_ids]] for row in rows]
        found["ids"]["sha256"] = sha256_json(named)
    return found


def _resolve_dtype(dtype: str, config: Any) -> str:
    if dtype != "auto":
        return dtype
    return str(getattr(text_config(config), "dtype", None) or config.dtype or "float32").removeprefix("torch.")
