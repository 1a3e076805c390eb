"""Stage one, with an engine: every prompt goes through it once, and its logits go to the store, shard by shard.

The engine is fed from all free shards as one stream, so that it never waits for the end of one. Rows come back as they are
finished, are put in plan order, checked and packed, and written in the background.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.errors import Interrupted
from duet.cache.plan import Plan
from duet.cache.record import SUBSETS, Rows, check_distinct, offsets_of
from duet.cache.watch import Watch
from duet.cache.writer import ShardWriter, StoreWriter
from duet.stages.engines.choose import open_engine
from duet.stages.engines.interface import Engine, Request, Scored
from duet.stages.engines.self_test import self_test
from duet.stages.engines.topk import order_ties
from duet.stages.models.tokenizers import tokenizer_files
from duet.stages.teacher.plan import Prepared, RenderedQuery, StoreResult, TeacherStore
from duet.stages.teacher.prepare import SELF_TEST_TOKENS

WAIT_S, SHARDS_PER_WAIT = 0.5, 20  # between looks at what other writers have finished


@dataclass
class CaptureProgress:
    """How far a store is. `rows` counts those of other writers too, the rest is the work of this process."""

    rows: int
    total: int
    own_rows: int = 0
    positions: int = 0
    cached_share: float = 0.0  # of the prompt tokens


def write_stores(stores: Sequence[TeacherStore], engine: str, watch: Watch, wait: bool = True) -> list[StoreResult]:
    """Have one model fill its stores, which differ in prefixes and queries; any number of processes can do this at once.

    `engine` is as in the settings: with "auto" the stores are those of the engine that starts. `watch.on_progress` gets
    CaptureProgress. Raises Interrupted when `watch` stops it or the engine has died: complete shards stay, and the next call
    goes on after them. Without `wait` it ends once every remaining shard is claimed by another writer, with a result that has
    no manifest, and starts no engine if there is nothing for it to do.
    """
    if not wait and not any(_has_free(store) for store in stores):
        return [StoreResult(store.root, None) for store in stores]
    longest = max((store.prepared for store in stores), key=lambda one: one.spec.context)
    opened, reason = open_engine(longest.spec, engine)
    watch.on_engine(opened.name, reason)
    try:
        for one in (store.prepared for store in stores):
            self_test(opened, _tried(one), one.ask, one.spec.num_ids, one.model)
        return [fill_store(store, opened, watch, wait) for store in stores]
    finally:
        opened.close()


def _has_free(store: TeacherStore) -> bool:
    """Whether a shard could be claimed now; a store that is not there yet is begun."""
    with _writer(store) as writer:
        return writer.claim() is not None


def _writer(store: TeacherStore) -> StoreWriter:
    return StoreWriter(store.location, store.plan, tokenizer_files(store.prepared.tokenizer), store.options.lease_s)


def _tried(prepared: Prepared) -> list[Request]:
    """The shortest, a middle and the longest prompt, for the self-test."""
    by_length = sorted(range(len(prepared.rows)), key=lambda number: len(prepared.rows[number].teacher_ids))
    room = prepared.spec.context - SELF_TEST_TOKENS
    tried = [prepared.request(by_length[at]) for at in (0, len(by_length) // 2, -1)]
    return [
        replace(
            request,
            key=key,
            prompt_ids=request.prompt_ids[:room],
            given_ids=request.given_ids and request.given_ids[:2],
        )
        for key, request in enumerate(tried)
    ]


def fill_store(store: TeacherStore, engine: Engine, watch: Watch, wait: bool = True) -> StoreResult:
    """Fill the shards of one store that nobody has written, and publish the manifest, with an engine that is tested.

    Without `wait`, the result has no manifest where other writers are not done.
    """
    started, before, manifest = time.monotonic(), replace(engine.usage), None
    with _writer(store.under(engine.name.split()[0])) as writer:
        plan, location = writer.plan, writer.location
        progress = CaptureProgress(0, plan.rows)
        while missing := writer.missing():
            if watch.should_stop():
                writer.wait()
                raise Interrupted(f"{_rows_but(plan, writer.missing())} of {plan.rows} rows are in {location}")
            progress.rows = _rows_but(plan, missing)
            for scored in _fill(writer, engine, store.prepared, watch):
                progress.rows, progress.own_rows = progress.rows + 1, progress.own_rows + 1
                progress.positions += len(scored.response_ids)
                progress.cached_share = engine.usage.since(before).cached_share
                watch.on_progress(progress)
            writer.wait()
            if (left := writer.missing()) and not wait and not watch.should_stop():
                break
            _wait_for_others(len(left), watch)
        else:
            manifest = writer.finalise(_environment(store.prepared, engine))
    seconds = time.monotonic() - started
    return StoreResult(location, manifest, progress.own_rows, seconds, progress.cached_share)


def _wait_for_others(num_missing: int, watch: Watch) -> None:
    """The more shards they have in hand, the longer: so a thousand waiting processes ask little of a file server."""
    for _ in range(-(-num_missing // SHARDS_PER_WAIT)):
        if watch.should_stop():
            return
        time.sleep(WAIT_S)


def _rows_but(plan: Plan, missing: list[int]) -> int:
    return plan.rows - sum(len(plan.shard_range(index)) for index in set(missing))


class _Filling:
    """A shard whose rows come back in any order."""

    def __init__(self, shard: ShardWriter, block_rows: int) -> None:
        self.shard = shard
        self._block_rows = block_rows
        self._scored: dict[int, Scored] = {}
        self._ready = 0  # rows without a gap that are not handed on yet

    def add(self, number: int, scored: Scored, rows: list[RenderedQuery]) -> bool:
        """Take row `number` of the plan; True if it was the last."""
        self._scored[number] = scored
        first = self.shard.range.start + self.shard.num_rows
        while first + self._ready in self._scored:
            self._ready += 1
        full = self.shard.num_rows + self._ready == len(self.shard.range)
        if full or self._ready >= self._block_rows:
            numbers = range(first, first + self._ready)
            self.shard.append(_columns([rows[n] for n in numbers], [self._scored.pop(n) for n in numbers]))
            self._ready = 0
        return full


def _fill(writer: StoreWriter, engine: Engine, prepared: Prepared, watch: Watch) -> Iterator[Scored]:
    """Have the engine score all shards that are free now, and publish those that are full; yields each row's result."""
    fillings: dict[int, _Filling] = {}

    def feed() -> Iterator[Request]:
        while not watch.should_stop() and (shard := writer.claim()):
            fillings[shard.index] = _Filling(shard, writer.plan.block_rows)
            for number in shard.range:
                if watch.should_stop():
                    return
                yield prepared.request(number)

    with closing(engine.stream(feed(), prepared.ask)) as results:
        for number, scored in results:
            index = number // writer.plan.shard_rows
            if fillings[index].add(number, scored, prepared.rows):
                writer.publish(fillings.pop(index).shard)
            yield scored
            if watch.should_stop():
                break
    for filling in fillings.values():
        writer.release(filling.shard)


def _columns(rows: list[RenderedQuery], scored: list[Scored]) -> Rows:
    """Rows of the plan and their results, as columns."""
    tokens = [part for row, result in zip(rows, scored, strict=True) for part in (row.student_ids, result.response_ids)]
    sums = [result.logsumexp_P for result in scored if result.logsumexp_P is not None]
    draws = [result.draws_PK for result in scored if result.draws_PK is not None]
    batch = Rows(
        row_ids=[row.row_id for row in rows],
        subsets=np.array([SUBSETS.index(row.subset) for row in rows], np.uint8),
        token_offsets=offsets_of([len(a) + len(b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]),
        tokens_S=np.concatenate(tokens).astype(np.int32),
        position_offsets=offsets_of([len(result.response_ids) for result in scored]),
        topk_ids_NK=np.concatenate([result.topk_ids_PK for result in scored]),
        topk_logits_NK=np.concatenate([result.topk_logits_PK for result in scored]),
        logsumexp_N=np.concatenate(sums) if sums else None,
        draws_NK=np.concatenate(draws) if draws else None,
    )
    order_ties(batch.topk_ids_NK, batch.topk_logits_NK, batch.draws_NK)
    check_distinct(batch)
    return batch


def _environment(prepared: Prepared, engine: Engine) -> dict[str, Any]:
    """Who wrote the store, beyond the fingerprint; a private absolute path is reduced to its last part."""
    model = Path(prepared.model).name if Path(prepared.model).is_absolute() else prepared.model
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pyarrow", "numpy")}
    return {"teacher_model": model, "route": engine.route, "python": platform.python_version(), **versions}
