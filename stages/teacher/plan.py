"""A prepared teacher, and the plan of the store that holds what it says; stores that are already there."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from typing import Any

from duet.cache.errors import UserError
from duet.cache.location import Location
from duet.cache.maintain import verify
from duet.cache.manifest import MANIFEST_NAME, Manifest, read_manifest
from duet.cache.plan import Plan, store_name
from duet.cache.record import SUBSETS
from duet.stages.engines.choose import engine_order, engine_version
from duet.stages.engines.interface import Ask, EngineSpec, Request
from duet.stages.questions.prompts import Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.teacher import StoreSettings


@dataclass(frozen=True)
class RenderedQuery:
    """One query, rendered for both sides."""

    row_id: str  # <subset>/<id>, of a further request <subset>/<request>/<id>
    subset: str
    request: str  # MAIN, or the name of a further one
    teacher_ids: array[int]  # 4 bytes a token: all rows are held while a teacher is asked
    student_ids: array[int]
    given_ids: array[int] | None = None  # the response to score; None: the teacher makes one


@dataclass(frozen=True)
class Prepared:
    """All that is known before an engine starts. `provenance` lacks only the engine."""

    rows: list[RenderedQuery]  # in plan order
    tokenizer: Any
    spec: EngineSpec
    ask: Ask
    provenance: dict[str, Any]
    model: str

    def request(self, number: int) -> Request:
        """What an engine is asked for row `number` of the plan. A sampled response has a seed of its own."""
        row = self.rows[number]
        if not self.ask.temperature:
            return Request(number, row.teacher_ids, row.given_ids)
        digest = hashlib.sha256(f"{self.provenance['responses']['seed']} {row.row_id}".encode()).digest()
        return Request(number, row.teacher_ids, seed=int.from_bytes(digest[:4]))


@dataclass(frozen=True)
class StoreResult:
    """What stage one ended with."""

    location: Location
    manifest: Manifest | None  # None: other writers are not done
    engine: str
    reason: str  # why this engine
    rows_written: int
    seconds: float
    cached_share: float = 0.0  # of the prompt tokens, computed once and used again


@dataclass(frozen=True)
class Rendered:
    """What a teacher is asked, before any weight is read."""

    config: Any  # the model's
    renderer: Renderer
    prefixes: dict[str, str]  # by request
    queries: dict[str, dict[str, list[Query]]]  # by request and subset
    rows: list[RenderedQuery]  # in plan order
    num_ids: int  # ids of the tokenizer


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


def find_store(prepared: Prepared, store: StoreSettings, root: Location, engine: str) -> StoreResult | None:
    """A complete store of this fingerprint, for the first engine in order that has one; UserError if it is damaged."""
    for name in engine_order(engine):
        plan = plan_for(prepared, store, name)
        location = root / store_name(plan.fingerprint, plan.format)
        if location.size(MANIFEST_NAME) is None:
            continue
        manifest = read_manifest(location)
        for fault in verify(location, manifest, hashed=store.verify):
            raise UserError(fault, f"run: duet cache repair {location} --config FILE, with this config")
        return StoreResult(location, manifest, plan.provenance["engine"], "", 0, 0.0)
    return None


def rows_there(prepared: Prepared, store: StoreSettings, root: Location, engine: str) -> int:
    """Rows in complete shards of the store under an engine, whether it is complete or not."""
    plan = plan_for(prepared, store, engine)
    location = root / store_name(plan.fingerprint, plan.format)
    names = location.entries()
    return plan.rows_of(plan.written(names))
