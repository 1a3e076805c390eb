"""Stage one: the prefixed teacher answers every query once, and its top-k raw logits go to a store.

`prepare` reads data, tokenizer and weights' hashes and needs no engine; `write_store` opens one, tests it and fills the
shards that are missing. Nothing here is imported by the student's side: the two meet through the store on disk.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import Interrupted, UserError
from cache.files import sha256_json
from cache.maintain import verify
from cache.manifest import MANIFEST_NAME, Manifest, Plan, read_manifest, store_name
from cache.places import Place
from cache.record import SUBSETS, Rows, check_distinct, offsets_of
from cache.writer import ShardWriter, StoreWriter
from stages.data import Query, load_queries
from stages.engine import Engine, EngineSpec, open_engine, self_test, vllm_fault
from stages.models import (
    context_length,
    eos_ids,
    load_config,
    load_tokenizer,
    pick_device,
    resolve_model,
    text_config,
    text_sha256,
    tokenizer_files,
    tokenizer_sha256,
    vocab_width,
    weights_sha256,
)
from stages.prompts import check_length, check_prompt_settings, render
from stages.settings import PromptSettings, RequestData, RequestSettings, StoreSettings, TeacherSettings, TrainingData

SELF_TEST_TOKENS = 3  # positions that the self-test adds to a prompt
WAIT_S = 0.5  # between looks at what other writers have finished
MAIN = ""  # the request of `topic`, `data` and the teacher's prefix, which has no name


@dataclass(frozen=True)
class Row:
    """One query, rendered for both sides."""

    row_id: str  # <subset>/<id>, of a further request <subset>/<request>/<id>
    subset: str
    request: str  # MAIN, or the name of a further one
    teacher_ids: list[int]
    student_ids: list[int]


@dataclass(frozen=True)
class Prepared:
    """All that is known before an engine starts. `provenance` lacks only the engine."""

    rows: list[Row]  # in plan order
    tokenizer: Any
    spec: EngineSpec
    provenance: dict[str, Any]
    model: str


@dataclass(frozen=True)
class StoreResult:
    """What stage one ended with."""

    place: Place
    manifest: Manifest
    engine: str
    reason: str  # why this engine
    rows_written: int
    seconds: float


def prepare(
    teacher: TeacherSettings,
    prompt: PromptSettings,
    data: TrainingData,
    topic: str,
    device: str,
    requests: Sequence[RequestSettings] = (),
) -> Prepared:
    """Load, render and check every row, and hash everything that can change the numbers but the engine."""
    model_dir = resolve_model(teacher.model, "teacher.model")
    config = load_config(model_dir, teacher.trust_remote_code)
    tokenizer = load_tokenizer(model_dir, teacher.trust_remote_code)
    check_prompt_settings(tokenizer, prompt)
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if teacher.top_k > num_ids:
        raise UserError(
            f"teacher.top_k is {teacher.top_k}, the vocabulary of {teacher.model} has {num_ids} ids",
            f"set teacher.top_k to at most {num_ids}",
        )
    prefixes, queries = prefixes_of(teacher.prefix, topic, requests), queries_of(data, requests)
    context = context_length(config)
    rows = [
        _row(subset, request, query, tokenizer, prefix, prompt)
        for subset in SUBSETS
        for request, prefix in prefixes.items()
        for query in queries[request][subset]
    ]
    _check_requests(rows)
    for row in rows:
        check_length(row.teacher_ids, teacher.max_positions, context, row.row_id, "teacher")
    longest = max(len(row.teacher_ids) for row in rows) + teacher.max_positions
    spec = EngineSpec(
        model_dir=model_dir,
        dtype=_resolve_dtype(teacher.dtype, config),
        num_ids=min(num_ids, vocab_width(config)),
        context=min(context, longest + SELF_TEST_TOKENS),
        eos_ids=tuple(eos_ids(model_dir, config, tokenizer)),
        device=pick_device(device),
        trust_remote_code=teacher.trust_remote_code,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
    )
    asked = {name: {"prefix": prefixes[name], "data": _data_provenance(queries[name])} for name in prefixes}
    provenance = {
        "weights_sha256": weights_sha256(model_dir),
        "dtype": spec.dtype,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": text_sha256(str(tokenizer.chat_template or "")),
        "eos_ids": list(spec.eos_ids),
        **asked.pop(MAIN),
        **({"requests": asked} if asked else {}),
        "prompt": prompt.model_dump(),
        "prompts_sha256": sha256_json([[row.row_id, row.teacher_ids, row.student_ids] for row in rows]),
        "top_k": teacher.top_k,
        "max_positions": teacher.max_positions,
        "responses": "greedy",
    }
    return Prepared(rows, tokenizer, spec, provenance, teacher.model)


def fill_prefix(prefix: str, topic: str) -> str:
    """The prefix with the topic in place."""
    return prefix.replace("{topic}", topic)


def prefixes_of(prefix: str, topic: str, requests: Sequence[RequestSettings]) -> dict[str, str]:
    """What stands before the queries of each request, by its name, of a teacher with this prefix."""
    further = {request.name: fill_prefix(request.prefix or prefix, request.topic) for request in requests}
    return {MAIN: fill_prefix(prefix, topic), **further}


def queries_of(
    data: TrainingData, requests: Sequence[RequestSettings], need_answers: bool = False
) -> dict[str, dict[str, list[Query]]]:
    """The queries of both subsets of each request, by its name; a request without a retain set has none there."""
    further = {
        request.name: _queries(request.data, f"requests.{number}.data", need_answers)
        for number, request in enumerate(requests)
    }
    return {MAIN: _queries(data, "data", need_answers), **further}


def _queries(data: TrainingData | RequestData, key: str, need_answers: bool) -> dict[str, list[Query]]:
    found = {subset: getattr(data, subset) for subset in SUBSETS}
    return {
        subset: load_queries(settings, f"{key}.{subset}", need_answers) if settings else []
        for subset, settings in found.items()
    }


def _check_requests(rows: Sequence[Row]) -> None:
    """Refuse ids that are not unique over all requests, and a query that one request forgets and another keeps."""
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
        if other and row.subset == "retain" and row.request != other.request:
            raise UserError(
                f"the same query is to be kept and to be forgotten: {row.row_id!r} and {other.row_id!r}",
                "take it out of the one request's retain set or out of the other's forget set",
            )


def check_alike(prepared: Mapping[str, Prepared]) -> None:
    """Refuse teachers, by name, whose rows a student could not learn from side by side, and two that are the same."""
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


def _row(subset: str, request: str, query: Query, tokenizer: Any, prefix: str, prompt: PromptSettings) -> Row:
    return Row(
        row_id=f"{subset}/{query.row_id}" if request == MAIN else f"{subset}/{request}/{query.row_id}",
        subset=subset,
        request=request,
        teacher_ids=render(tokenizer, query.question, prefix, prompt),
        student_ids=render(tokenizer, query.question, "", prompt),
    )


def _data_provenance(queries: Mapping[str, list[Query]]) -> dict[str, Any]:
    return {
        subset: {"rows": len(found), "sha256": sha256_json([[query.row_id, query.question] for query in found])}
        for subset, found in queries.items()
    }


def _resolve_dtype(dtype: str, config: Any) -> str:
    if dtype != "auto":
        return dtype
    return str(getattr(text_config(config), "dtype", None) or config.dtype or "float32").removeprefix("torch.")


def plan_for(prepared: Prepared, store: StoreSettings, engine: str) -> Plan:
    """The plan under an engine ("vllm" or "transformers"), known before that engine starts."""
    lossy = {"values": store.values} if store.values in ("float16", "linear16") else {}
    provenance = {**prepared.provenance, "engine": engine_version(engine), **lossy}
    return Plan(
        subsets={subset: sum(row.subset == subset for row in prepared.rows) for subset in SUBSETS},
        shard_rows=store.shard_rows,
        top_k=provenance["top_k"],
        max_positions=provenance["max_positions"],
        vocab_size=prepared.spec.num_ids,
        provenance=provenance,
        format=store.format,
        compression=store.compression,
        values=store.values,
    )


def engine_version(engine: str) -> str:
    """Engine name and installed version, without importing it."""
    for package in (engine, f"{engine}-cpu"):
        try:
            return f"{engine} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{engine} not installed"


def engine_order(engine: str) -> list[str]:
    """Engines to be tried for a setting, best first."""
    if engine != "auto":
        return [engine]
    return ["transformers"] if vllm_fault() else ["vllm", "transformers"]


def find_store(prepared: Prepared, store: StoreSettings, root: Place, engine: str) -> StoreResult | None:
    """A complete store of this fingerprint, for the first engine in order that has one; UserError if it is damaged."""
    for name in engine_order(engine):
        plan = plan_for(prepared, store, name)
        place = root / store_name(plan.fingerprint, plan.format)
        if place.size(MANIFEST_NAME) is None:
            continue
        manifest = read_manifest(place)
        for fault in verify(place, manifest, hashed=store.verify):
            raise UserError(fault, f"run: duet cache repair {place} --config FILE, with this config")
        return StoreResult(place, manifest, plan.provenance["engine"], "", 0, 0.0)
    return None


def write_store(
    prepared: Prepared,
    teacher: TeacherSettings,
    store: StoreSettings,
    root: Place,
    on_engine: Callable[[str, str], None],
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> StoreResult:
    """Fill the shards that nobody has written and publish the manifest; any number of processes can do this at once.

    `on_engine(name, reason)` is told once which engine runs; `on_progress(done, total)` counts rows, those of other
    processes too. Raises Interrupted between engine calls when `should_stop()` is true: complete shards stay, the next
    call goes on after them.
    """
    engine, reason = open_engine(prepared.spec, teacher.engine)
    on_engine(engine.name, reason)
    plan = plan_for(prepared, store, engine.name.split()[0])
    place = root / store_name(plan.fingerprint, plan.format)
    started, written = time.monotonic(), 0
    try:
        _self_test(engine, prepared)
        with StoreWriter(place, plan, tokenizer_files(prepared.tokenizer), store.lease_s) as writer:
            while missing := writer.missing():
                if should_stop():
                    writer.wait()
                    raise Interrupted(f"{_rows_but(plan, writer.missing())} of {plan.rows} rows are in {place}")
                shard = writer.claim()
                if shard is None:  # what is left is being written, by us or by others
                    writer.wait()
                    time.sleep(WAIT_S if writer.missing() else 0)
                    continue
                done = _rows_but(plan, [*missing, shard.index])
                _fill(
                    shard, engine, prepared, teacher, lambda n, done=done: on_progress(done + n, plan.rows), should_stop
                )
                if shard.num_rows < len(shard.range):
                    writer.release(shard)
                    continue
                writer.publish(shard)
                written += shard.num_rows
            manifest = writer.finalise(_environment(prepared))
    finally:
        engine.close()
    return StoreResult(place, manifest, engine.name, reason, written, time.monotonic() - started)


def _rows_but(plan: Plan, missing: list[int]) -> int:
    return plan.rows - sum(len(plan.shard_range(index)) for index in set(missing))


def _fill(
    shard: ShardWriter,
    engine: Engine,
    prepared: Prepared,
    teacher: TeacherSettings,
    on_rows: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> None:
    """Score a shard's rows, as far as `should_stop` lets."""
    for first in range(shard.range.start, shard.range.stop, teacher.batch_size):
        if should_stop():
            return
        shard.append(_score(engine, prepared.rows[first : min(first + teacher.batch_size, shard.range.stop)], teacher))
        on_rows(shard.num_rows)


def _self_test(engine: Engine, prepared: Prepared) -> None:
    """Run the engine's self-test on the shortest, a middle and the longest prompt."""
    by_length = sorted((row.teacher_ids for row in prepared.rows), key=len)
    chosen = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
    room = prepared.spec.context - SELF_TEST_TOKENS
    self_test(engine, [ids[:room] for ids in chosen], prepared.provenance["top_k"], prepared.spec.num_ids)


def _score(engine: Engine, rows: list[Row], teacher: TeacherSettings) -> Rows:
    """One engine call's results, columnar."""
    scored = engine.score([row.teacher_ids for row in rows], teacher.top_k, teacher.max_positions)
    tokens = [part for row, result in zip(rows, scored, strict=True) for part in (row.student_ids, result.response_ids)]
    sums = [result.logsumexp_P for result in scored if result.logsumexp_P is not None]
    batch = Rows(
        row_ids=[row.row_id for row in rows],
        subsets=np.array([SUBSETS.index(row.subset) for row in rows], np.uint8),
        token_offsets=offsets_of([len(a) + len(b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]),
        tokens_S=np.concatenate(tokens).astype(np.int32),
        position_offsets=offsets_of([len(result.response_ids) for result in scored]),
        topk_ids_NK=np.concatenate([result.topk_ids_PK for result in scored]),
        topk_logits_NK=np.concatenate([result.topk_logits_PK for result in scored]),
        logsumexp_N=np.concatenate(sums) if sums else None,
    )
    check_distinct(batch)
    return batch


def _environment(prepared: Prepared) -> dict[str, Any]:
    """Who wrote the store, beyond the fingerprint; a private absolute path is reduced to its last part."""
    model = Path(prepared.model).name if Path(prepared.model).is_absolute() else prepared.model
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pyarrow", "numpy")}
    return {"teacher_model": model, "python": platform.python_version(), **versions}
