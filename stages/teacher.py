"""Stage one: the prefixed teacher answers every query once, and its top-k raw logits go to a store.

`prepare` reads data, tokenizer and weights' hashes and needs no engine; `write_store` opens one, tests it and fills the
shards that are missing. Nothing here is imported by the student's side: the two meet through the store on disk.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache import writer
from cache.errors import Interrupted, UserError
from cache.files import sha256_json
from cache.manifest import MANIFEST_NAME, Manifest, Plan, read_manifest, store_dir_of
from cache.reader import verify_shards
from cache.record import SUBSETS, Record
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
    tokenizer_sha256,
    vocab_width,
    weights_sha256,
)
from stages.prompts import check_length, check_prompt_settings, render
from stages.settings import PromptSettings, StoreSettings, TeacherSettings, TrainingData

SELF_TEST_TOKENS = 3  # positions that the self-test adds to a prompt


@dataclass(frozen=True)
class Row:
    """One query, rendered for both sides."""

    row_id: str
    subset: str
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

    store_dir: Path
    manifest: Manifest
    engine: str
    reason: str  # why this engine
    reused: bool
    rows_written: int
    seconds: float


def prepare(teacher: TeacherSettings, prompt: PromptSettings, data: TrainingData, topic: str, device: str) -> Prepared:
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
    prefix = fill_prefix(teacher.prefix, topic)
    queries = {subset: load_queries(getattr(data, subset), f"data.{subset}") for subset in SUBSETS}
    context = context_length(config)
    rows = [_row(subset, query, tokenizer, prefix, prompt) for subset, query in interleave(queries)]
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
    provenance = {
        "weights_sha256": weights_sha256(model_dir),
        "dtype": spec.dtype,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": text_sha256(str(tokenizer.chat_template or "")),
        "eos_ids": list(spec.eos_ids),
        "prefix": prefix,
        "prompt": prompt.model_dump(),
        "data": {subset: {"rows": len(q), "sha256": _queries_sha256(q)} for subset, q in queries.items()},
        "prompts_sha256": sha256_json([[row.row_id, row.teacher_ids, row.student_ids] for row in rows]),
        "top_k": teacher.top_k,
        "max_positions": teacher.max_positions,
        "responses": "greedy",
    }
    return Prepared(rows, tokenizer, spec, provenance, teacher.model)


def fill_prefix(prefix: str, topic: str) -> str:
    """The prefix with the topic in place."""
    return prefix.replace("{topic}", topic)


def interleave(queries: dict[str, list[Query]]) -> list[tuple[str, Query]]:
    """All queries in one order in which every stretch holds the subsets in their overall proportion."""
    placed = [
        ((number + 0.5) / len(subset_queries), subset, query)
        for subset, subset_queries in queries.items()
        for number, query in enumerate(subset_queries)
    ]
    return [(subset, query) for _, subset, query in sorted(placed, key=lambda item: item[:2])]


def _row(subset: str, query: Query, tokenizer: Any, prefix: str, prompt: PromptSettings) -> Row:
    return Row(
        row_id=f"{subset}/{query.row_id}",
        subset=subset,
        teacher_ids=render(tokenizer, query.question, prefix, prompt),
        student_ids=render(tokenizer, query.question, "", prompt),
    )


def _queries_sha256(queries: list[Query]) -> str:
    return sha256_json([[query.row_id, query.question] for query in queries])


def _resolve_dtype(dtype: str, config: Any) -> str:
    if dtype != "auto":
        return dtype
    return str(getattr(text_config(config), "dtype", None) or config.dtype or "float32").removeprefix("torch.")


def plan_for(prepared: Prepared, store: StoreSettings, engine: str) -> Plan:
    """The plan under an engine ("vllm" or "transformers"), known before that engine starts."""
    provenance = {**prepared.provenance, "engine": engine_version(engine), "format": store.format}
    return Plan(
        rows=len(prepared.rows),
        shard_rows=store.shard_rows,
        top_k=provenance["top_k"],
        max_positions=provenance["max_positions"],
        vocab_size=prepared.spec.num_ids,
        provenance=provenance,
        format=store.format,
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


def find_store(prepared: Prepared, store: StoreSettings, root: Path, engine: str) -> StoreResult | None:
    """A complete, undamaged store of this fingerprint, for the first engine in order that has one."""
    for name in engine_order(engine):
        plan = plan_for(prepared, store, name)
        directory = store_dir_of(root, plan.fingerprint)
        if not (directory / MANIFEST_NAME).is_file():
            continue
        manifest = read_manifest(directory)
        if not list(verify_shards(directory, manifest, hashes=store.verify)):
            return StoreResult(directory, manifest, plan.provenance["engine"], "", True, 0, 0.0)
    return None


def write_store(
    prepared: Prepared,
    teacher: TeacherSettings,
    store: StoreSettings,
    root: Path,
    on_engine: Callable[[str, str], None],
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> StoreResult:
    """Fill the missing shards and publish the manifest.

    `on_engine(name, reason)` is told once which engine runs; `on_progress(done, total)` counts rows. Raises Interrupted
    between engine calls when `should_stop()` is true: complete shards stay, the next call goes on after them.
    """
    engine, reason = open_engine(prepared.spec, teacher.engine)
    on_engine(engine.name, reason)
    plan = plan_for(prepared, store, engine.name.split()[0])
    store_dir = store_dir_of(root, plan.fingerprint)
    started = time.monotonic()
    try:
        _self_test(engine, prepared)
        writer.open_for_writing(store_dir, plan)
        prepared.tokenizer.save_pretrained(store_dir / "tokenizer")
        missing = writer.missing_shards(store_dir, plan)
        done = len(prepared.rows) - sum(len(plan.shard_range(index)) for index in missing)
        written = 0
        for index in missing:
            records: list[Record] = []
            numbers = plan.shard_range(index)
            for first in range(numbers.start, numbers.stop, teacher.batch_size):
                if should_stop():
                    raise Interrupted(f"{done + written} of {plan.rows} rows are in {store_dir}")
                rows = prepared.rows[first : min(first + teacher.batch_size, numbers.stop)]
                records += _score(engine, rows, teacher)
                on_progress(done + written + len(records), plan.rows)
            writer.write_shard(store_dir, plan, index, records)
            written += len(records)
    finally:
        engine.close()
    manifest = writer.finalise(store_dir, plan, _environment(prepared))
    return StoreResult(store_dir, manifest, engine.name, reason, False, written, time.monotonic() - started)


def _self_test(engine: Engine, prepared: Prepared) -> None:
    """Run the engine's self-test on the shortest, a middle and the longest prompt."""
    by_length = sorted((row.teacher_ids for row in prepared.rows), key=len)
    chosen = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
    room = prepared.spec.context - SELF_TEST_TOKENS
    self_test(engine, [ids[:room] for ids in chosen], prepared.provenance["top_k"], prepared.spec.num_ids)


def _score(engine: Engine, rows: list[Row], teacher: TeacherSettings) -> list[Record]:
    scored = engine.score([row.teacher_ids for row in rows], teacher.top_k, teacher.max_positions)
    return [
        Record(
            row_id=row.row_id,
            subset=row.subset,
            prompt_ids=np.asarray(row.student_ids, np.int32),
            response_ids=result.response_ids,
            topk_ids_PK=result.topk_ids_PK,
            topk_logits_PK=result.topk_logits_PK,
            logsumexp_P=result.logsumexp_P,
        )
        for row, result in zip(rows, scored, strict=True)
    ]


def _environment(prepared: Prepared) -> dict[str, Any]:
    """Who wrote the store, beyond the fingerprint; a private absolute path is reduced to its last part."""
    model = Path(prepared.model).name if Path(prepared.model).is_absolute() else prepared.model
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pyarrow", "numpy")}
    return {"teacher_model": model, "python": platform.python_version(), **versions}
