"""Random lives of several writers and a reader of one store, beside a model that knows what must be there."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from support import FakeClock, make_plan, make_rows, same_rows

from duet.cache.errors import UserError
from duet.cache.location import Folder
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.order import Cursor
from duet.cache.reader import START, Store
from duet.cache.record import concat_rows
from duet.cache.writer import ShardWriter, StoreWriter, written_shard

ROWS = make_rows(range(10), positions=None, forget=4)
LEASE_S = 1000.0  # of the clock that the machine sets; the real heartbeats, every 250 s, never come


@dataclass(eq=False)
class Work:
    """A writer and the shard in its hands, which others take over from `dead_from` on."""

    writer: StoreWriter
    shard: ShardWriter | None = None
    dead_from: float = field(default=0.0)


class Lives(RuleBasedStateMachine):
    """Writers crash (nobody renews their leases any more) and may wake up later, as stopped processes do."""

    fmt: ClassVar[str]
    writers = Bundle("writers")

    def __init__(self) -> None:
        super().__init__()
        self.location = Folder(Path(tempfile.mkdtemp(prefix="duet-test-")) / "s")
        self.plan = make_plan(10, 4, format=self.fmt)
        self.clock = FakeClock()
        self.all: list[Work] = []
        self.published: dict[int, bytes | None] = {}  # index -> the file's bytes
        self.complete = False
        self.read: dict[Cursor, tuple[Cursor, list[str]]] = {}  # cursor -> the next one and the ids of the batch

    def teardown(self) -> None:
        for work in self.all:
            work.writer.__exit__()
        shutil.rmtree(self.location.path.parent)

    def holders(self, index: int) -> list[Work]:
        """Who holds a shard, alive."""
        return [
            work for work in self.all
            if work.shard and work.shard.index == index and work.dead_from >= self.clock.time
        ]  # fmt: skip

    @rule(target=writers)
    @precondition(lambda self: len(self.all) < 6)
    def open(self) -> Work:
        self.all.append(Work(StoreWriter(self.location, self.plan, {"tokenizer/t.json": b"{}"}, LEASE_S, self.clock)))
        return self.all[-1]

    @rule(work=writers)
    def claim(self, work: Work) -> None:
        if work.shard:
            return
        free = [
            index for index in range(self.plan.num_shards) if index not in self.published and not self.holders(index)
        ]
        work.shard = work.writer.claim()
        if work.shard is None:
            assert not free
            return
        assert work.shard.index in free
        work.dead_from = self.clock.time + LEASE_S

    @rule(work=writers, count=st.integers(1, 4))
    def append(self, work: Work, count: int) -> None:
        if work.shard:
            first = work.shard.range.start + work.shard.num_rows
            part = ROWS[first : min(first + count, work.shard.range.stop)]
            if len(part):
                work.shard.append(part)

    @rule(work=writers)
    def publish(self, work: Work) -> None:
        """Also one that was taken over in the meantime, without knowing it."""
        if work.shard is None:
            return
        first = work.shard.range.start + work.shard.num_rows
        if first < work.shard.range.stop:
            work.shard.append(ROWS[first : work.shard.range.stop])
        holds = work.shard.lease is not None and work.shard.lease.path.exists()
        assert holds or work.dead_from < self.clock.time  # a living lease is not lost
        work.writer.publish(work.shard)
        work.writer.wait()
        index, work.shard = work.shard.index, None
        if holds:
            assert index not in self.published
            self.published[index] = self.location.read(self.plan.shard_name(index))

    @rule(work=writers)
    def write_all_it_can(self, work: Work) -> None:
        self.claim(work)
        while work.shard:
            self.publish(work)
            self.claim(work)

    @rule(work=writers)
    def release(self, work: Work) -> None:
        if work.shard:
            work.writer.release(work.shard)
            work.shard = None

    @rule(work=consumes(writers))
    def crash(self, work: Work) -> None:
        """It is never heard of again; its lease runs out."""

    @rule(work=consumes(writers))
    def leave(self, work: Work) -> None:
        work.writer.__exit__()
        work.shard = None

    @rule(passes=st.sampled_from([LEASE_S / 3, LEASE_S * 1.1]))
    def time_passes(self, passes: float) -> None:
        self.clock.time += passes

    @rule(work=writers)
    def renew(self, work: Work) -> None:
        """The heart of a writer beats, as its thread would make it."""
        if work.shard and work.shard.lease and work.shard.lease.path.exists():
            self.clock.stamp(work.shard.lease.path.parent)
            work.dead_from = self.clock.time + LEASE_S

    @rule(work=writers)
    def finalise(self, work: Work) -> None:
        if len(self.published) < self.plan.num_shards:
            with pytest.raises(ValueError, match="are missing"):
                work.writer.finalise({"python": "3"})
            return
        work.writer.finalise({"python": "3"})
        self.complete = True
        assert sorted(path.name for path in self.location.path.iterdir() if path.is_dir()) == ["tokenizer"]

    @rule()
    def read_all(self) -> None:
        if self.complete:
            assert same_rows(concat_rows(list(Store(self.location).rows())), ROWS)
        else:
            with pytest.raises(UserError, match=r"incomplete|is not a store"):
                Store(self.location)

    @rule(batches=st.integers(1, 6), data=st.data())
    @precondition(lambda self: self.complete)
    def read_on(self, batches: int, data: st.DataObject) -> None:
        """From any cursor that was seen: always the batches that came there before."""
        store = Store(self.location)
        cursor = data.draw(st.sampled_from([START, *(after for after, _ in self.read.values())]))
        stream = store.batches(store.order(0), 3, cursor)
        for _ in range(batches):
            after, batch = next(stream)
            found = after, list(batch.row_ids.to_pylist())
            assert self.read.setdefault(cursor, found) == found
            cursor = after
        first = [self.read[cursor][1] for cursor in self.read if cursor.epoch == 0 and cursor.slot < len(ROWS)]
        assert set().union(*first) <= set(ROWS.row_ids)
        assert sum(map(len, first)) == len(set().union(*first))

    @invariant()
    def nothing_is_complete_before_its_time(self) -> None:
        assert (self.location.size(MANIFEST_NAME) is not None) == self.complete

    @invariant()
    def what_is_published_stays(self) -> None:
        for index, data in self.published.items():
            assert written_shard(self.location, self.plan, index)
            assert self.location.read(self.plan.shard_name(index)) == data

    @invariant()
    def a_shard_has_one_living_holder(self) -> None:
        for index in range(self.plan.num_shards):
            assert len(self.holders(index)) <= 1


class ArrowLives(Lives):
    fmt = "arrow"


class ZarrLives(Lives):
    fmt = "zarr"


BOUNDED = settings(max_examples=150, stateful_step_count=50)
TestArrowLives, TestZarrLives = ArrowLives.TestCase, ZarrLives.TestCase
TestArrowLives.settings, TestZarrLives.settings = BOUNDED, settings(BOUNDED, max_examples=60)
