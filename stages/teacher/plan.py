"""A prepared teacher and the store that holds its logits: the plan of that store, where it lies, how much of it is there."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from duet.cache.errors import UserError
from duet.cache.location import Location
from duet.cache.maintain import verify
from duet.cache.manifest import MANIFEST_NAME, Manifest, read_manifest
from duet.cache.plan import Plan, store_name
from duet.cache.record import subset_counts
from duet.stages.engines.choose import engine_order, engine_version
from duet.stages.engines.interface import Ask, EngineSpec, Request
from duet.stages.settings.teacher import StoreSettings, TeacherSettings


@dataclass(frozen=True)
class RenderedQuery:
    """One query, rendered for both sides."""

    row_id: str  # <subset>/<id>, of a further request <subset>/<request>/<id>, of broad rows broad/<source>/<id>
    subset: str
    request: str  # MAIN, or the name of a further one
    teacher_ids: array[int]  # 4 bytes a token: all rows are held while a teacher is asked
    student_ids: array[int]
    given_ids: array[int] | None = None  # the response to score, or a document; None: the teacher makes a response
    cut: bool = False  # a document of which the end is not read
    named_ids: tuple[array[int], ...] = ()  # that are kept at each position, or at all where it is one

    @property
    def is_document(self) -> bool:
        """Whether both sides read the text that is scored, as no query's is."""
        return self.subset == "broad" and self.given_ids is not None

    def positions(self, max_positions: int) -> int:
        """The most that can be supervised: of a response that the teacher makes, `max_positions`."""
        return max_positions if self.given_ids is None else len(self.given_ids)


@dataclass(frozen=True)
class Prepared:
    """All that is known before an engine starts. `provenance` lacks only the engine."""

    rows: list[RenderedQuery]  # in plan order
    tokenizer: Any
    spec: EngineSpec
    ask: Ask
    provenance: dict[str, Any]
    model: str
    seed: int  # of sampled responses and of sampled ids

    @property
    def max_positions(self) -> int:
        """The most positions that a row can have: documents may have more than responses."""
        return max(self.ask.max_positions, *(len(row.given_ids or ()) for row in self.rows))

    def request(self, number: int) -> Request:
        """The engine's request for row `number` of the plan. What is drawn for a row has a seed of its own."""
        row = self.rows[number]
        drawn = self.ask.ids == "sampled" or (self.ask.temperature and row.given_ids is None)
        seed = row_seed(self.seed, row.row_id) if drawn else None
        return Request(number, row.teacher_ids, row.given_ids, seed, row.named_ids)


def row_seed(seed: int, row_id: str) -> int:
    """The seed of one row's draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row_id}".encode()).digest()[:4])


@dataclass(frozen=True)
class StoreResult:
    """A store at the end of stage one."""

    location: Location
    manifest: Manifest | None  # None: other writers are not done
    rows_written: int = 0
    seconds: float = 0.0
    cached_share: float = 0.0  # of the prompt tokens, computed once and used again


@dataclass(frozen=True)
class TeacherStore:
    """A teacher, and its store under one engine ("vllm" or "transformers"), known before that engine starts."""

    name: str  # the teacher's
    settings: TeacherSettings
    prepared: Prepared
    options: StoreSettings  # how stores are kept
    root: Location  # the folder of all stores
    engine: str

    @staticmethod
    def expected(
        name: str, settings: TeacherSettings, prepared: Prepared, options: StoreSettings, root: Location
    ) -> TeacherStore:
        """Under the engine that is tried first."""
        return TeacherStore(name, settings, prepared, options, root, engine_order(settings.usable_engine)[0])

    def under(self, engine: str) -> TeacherStore:
        """The same teacher's store under another engine."""
        return self if engine == self.engine else replace(self, engine=engine)

    def of_each_engine(self) -> list[TeacherStore]:
        """Under each engine that the teacher's settings allow, best first."""
        return [self.under(engine) for engine in engine_order(self.settings.usable_engine)]

    @cached_property
    def plan(self) -> Plan:
        return plan_for(self.prepared, self.options, self.engine)

    @cached_property
    def location(self) -> Location:
        return self.root / store_name(self.plan.fingerprint, self.plan.format)

    @property
    def is_complete(self) -> bool:
        return self.location.size(MANIFEST_NAME) is not None

    def rows_there(self) -> int:
        """Rows in complete shards, whether the store is complete or not."""
        return self.plan.rows_of(self.plan.written(self.location.entries()))

    def find(self) -> StoreResult | None:
        """The complete store of the first engine that has one; UserError if it is damaged."""
        for one in self.of_each_engine():
            if not one.is_complete:
                continue
            manifest = read_manifest(one.location)
            for fault in verify(one.location, manifest, hashed=self.options.verify):
                raise UserError(fault, f"run: duet cache repair {one.location} --config FILE, with this config")
            return StoreResult(one.location, manifest)
        return None


def plan_for(prepared: Prepared, store: StoreSettings, engine: str) -> Plan:
    """The plan under an engine."""
    lossy = {"values": store.values} if store.values in ("float16", "linear16") else {}
    provenance = {**prepared.provenance, "engine": engine_version(engine), **lossy}
    return Plan(
        subsets=subset_counts(row.subset for row in prepared.rows),
        shard_rows=store.shard_rows,
        top_k=provenance["top_k"],
        max_positions=prepared.max_positions,
        vocab_size=prepared.spec.num_ids,
        provenance=provenance,
        format=store.format,
        compression=store.compression,
        values=store.values,
    )
