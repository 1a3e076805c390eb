"""Each row once an epoch and equal steps for any number of ranks, on any path of interruptions; shares and held-out rows."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import make_plan, make_rows, same_rows, write_store

from duet.cache.codec import concat_blocks
from duet.cache.errors import UserError
from duet.cache.location import Folder
from duet.cache.manifest import Manifest
from duet.cache.order import Cursor, Order, check_alike
from duet.cache.reader import Rank, Store
from duet.cache.window import Recycler


def manifest(forget: int, retain: int, shard_rows: int = 7, block_rows: int = 3) -> Manifest:
    fields = {"subsets": {"forget": forget, "retain": retain}, "shard_rows": shard_rows, "block_rows": block_rows}
    return cast(Any, SimpleNamespace(**fields))


def slots(order: Order, epoch: int, first: int = 0, count: int = 10**9) -> list[int]:
    """Row numbers of the plan."""
    rows: list[int] = []
    for window, places in order.draw(Cursor(epoch, first), count):
        rows += np.concatenate([np.arange(*bounds) for bounds in order.ranges(window)])[places].tolist()
    return rows


SIZES = st.integers(0, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 12), st.integers(0, 3)


@given(*SIZES)
def test_an_epoch_holds_each_row_once(forget, retain, shard_rows, block_rows, epoch):
    order = Order(manifest(forget, retain, shard_rows, block_rows), seed=1)
    assert sorted(slots(order, epoch)) == list(range(forget + retain))
    pieces = [row for first in range(0, forget + retain, 5) for row in slots(order, epoch, first, 5)]
    assert sorted(pieces) == list(range(forget + retain))


def test_epochs_and_seeds_differ_and_repeat():
    one, two = (Order(manifest(100, 300), seed) for seed in (1, 2))
    assert slots(one, 0) != slots(one, 1)
    assert slots(one, 0) != slots(two, 0)
    assert slots(one, 1) == slots(Order(manifest(100, 300), 1), 1)


def test_every_stretch_has_the_stored_share():
    order = Order(manifest(100, 300), seed=0)
    for first in range(0, 400, 20):
        assert sum(row < 100 for row in slots(order, 0, first, 20)) == 5


def of_three(forget: int, retain: int, broad: int, **more: int) -> Manifest:
    found = manifest(forget, retain, **more)
    found.subsets["broad"] = broad
    return found


@given(*SIZES[:2], st.integers(1, 90), *SIZES[2:], st.sampled_from([0.0, 0.3]))
def test_an_epoch_of_three_subsets_holds_each_row_once(forget, retain, broad, shard_rows, block_rows, epoch, holdout):
    assume(not holdout or 1 not in (forget, retain, broad))
    order = Order(of_three(forget, retain, broad, shard_rows=shard_rows, block_rows=block_rows), 1, holdout=holdout)
    rows = list(range(forget + retain + broad))
    pieces = [row for first in range(0, order.num_slots, 5) for row in slots(order, epoch, first, 5)]
    assert sorted(pieces + order.held_out.tolist()) == rows
    assert sorted(slots(order, epoch)) == sorted(pieces)


@pytest.mark.parametrize("share", [None, 0.5, 0.0, 1.0])
def test_retain_and_broad_rows_share_what_is_left_as_they_do_in_the_store(share):
    order = Order(of_three(30, 40, 80), seed=0, forget_share=share)
    for epoch in range(3):
        rows = slots(order, epoch)
        counts = [sum(first <= row < end for row in rows) for first, end in ((0, 30), (30, 70), (70, 150))]
        wanted = 0.2 if share is None else share
        for count, part in zip(counts, (wanted, (1 - wanted) / 3, 2 * (1 - wanted) / 3), strict=True):
            assert count == pytest.approx(part * order.num_slots, abs=1)
        assert set(rows) == set(range(30 if share == 0 else 0, 30 if share == 1 else 150)), "a row never came"
        firsts = range(0, order.num_slots - 29, 30)
        stretches = [sum(row >= 70 for row in slots(order, epoch, first, 30)) for first in firsts]
        assert max(stretches) - min(stretches) <= 2, "broad rows come in lumps"


def test_the_order_of_two_subsets_is_that_of_the_first_version():
    """Students of old stores resume, and repeat, on the same rows: these are written down, not computed."""
    order = Order(manifest(5, 9), seed=3, forget_share=0.5, holdout=0.2)
    assert order.held_out.tolist() == [4, 9, 13]
    assert [slots(order, epoch) for epoch in (0, 1)] == [
        [2, 1, 0, 3, 2, 0, 1, 8, 7, 10, 6, 11, 12, 5],
        [3, 0, 1, 2, 3, 0, 3, 8, 7, 5, 10, 12, 6, 11],
    ]


@pytest.mark.parametrize("holdout", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.8, 1.0, 0.0])
def test_a_share_is_kept_and_every_row_comes(share, holdout):
    order = Order(manifest(30, 90), seed=0, forget_share=share, holdout=holdout)
    for epoch in range(4):
        rows = Counter(slots(order, epoch))
        forget = sum(count for row, count in rows.items() if row < 30)
        assert forget == pytest.approx(share * order.num_slots, abs=1)
        assert set(rows) == set(range(30 if share == 0 else 0, 30 if share == 1 else 120)) - set(order.held_out)
    both = [row for epoch in range(6) for row in slots(order, epoch)]
    counts = [count for row, count in Counter(both).items() if row >= 30]
    assert not counts or max(counts) - min(counts) <= 1  # no retain row comes twice before the others


def test_stores_of_other_plans_do_not_stand_side_by_side():
    def of(forget: int = 5, shard_rows: int = 7, block_rows: int = 3, top_k: int = 4) -> Manifest:
        found = manifest(forget, 10 - forget, shard_rows, block_rows)
        found.__dict__["top_k"] = top_k
        return found

    check_alike({"a": of()})
    check_alike({"a": of(), "b": of()})
    for other, key in ((of(4), "subsets"), (of(shard_rows=6), "shard_rows"), (of(block_rows=2), "block_rows"),
                       (of(top_k=5), "top_k")):  # fmt: skip
        with pytest.raises(UserError, match=f"the stores of a and c differ in {key}"):
            check_alike({"a": of(), "b": of(), "c": other})


def test_a_share_that_cannot_be_is_refused():
    Order(of_three(5, 0, 5), seed=0, forget_share=0.5)
    with pytest.raises(UserError, match=r"forget share of 0\.5"):
        Order(manifest(0, 10), seed=0, forget_share=0.5)


@given(*SIZES, st.integers(1, 99))
@example(2, 90, 40, 1, 0, 95)  # whole windows are held out
def test_held_out_rows_never_come_and_the_others_once(forget, retain, shard_rows, block_rows, epoch, percent):
    assume(1 not in (forget, retain))
    order = Order(manifest(forget, retain, shard_rows, block_rows), seed=1, holdout=percent / 100)
    held = order.held_out.tolist()
    sizes = [sum(row < forget for row in held), sum(row >= forget for row in held)]
    assert sizes == [
        min(max(1, (2 * count * percent + 100) // 200), count - 1) if count else 0 for count in (forget, retain)
    ]
    assert held == sorted(held)
    assert sorted(slots(order, epoch) + held) == list(range(forget + retain))
    pieces = [row for first in range(0, order.num_slots, 5) for row in slots(order, epoch, first, 5)]
    assert sorted(pieces) == sorted(slots(order, epoch))


def test_what_is_held_out_depends_on_the_counts_and_the_share_alone():
    def held_out(seed: int, forget: int = 100, holdout: float = 0.1, shard_rows: int = 7) -> list[int]:
        return Order(manifest(forget, 300, shard_rows), seed, 0.5, holdout).held_out.tolist()

    assert held_out(1) == held_out(2) == held_out(1, shard_rows=9)
    assert len(held_out(1)) == 10 + 30
    assert held_out(1) != held_out(1, forget=110)
    assert held_out(1) != held_out(1, holdout=0.2)
    assert not held_out(1, holdout=0.0)


def test_the_only_row_of_a_subset_is_not_held_out():
    assert len(Order(manifest(0, 2), 0, holdout=0.99).held_out) == 1
    for counts, subset in (((1, 10), "forget"), ((10, 1), "retain")):
        with pytest.raises(UserError, match=f"of the {subset} rows cannot be held out") as caught:
            Order(manifest(*counts), seed=0, holdout=0.1)
        assert caught.value.hint


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("order") / "s"
    write_store(folder, make_plan(53, forget=20, shard_rows=7), make_rows(range(53), positions=None, forget=20))
    return Store(Folder(folder))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=8))
def test_any_ranks_and_any_resumes_read_each_row_once(store, legs):
    """Each leg is a run with a number of ranks, a batch size and some steps; the next one resumes where it stopped."""
    order, cursor, seen = store.order(seed=5), Cursor(), []
    for world, batch_size, steps in [*legs, (1, 60, 2)]:
        cursors = set()
        for number in range(world):
            batches = itertools.islice(store.batches(order, batch_size, cursor, Rank(number, world)), steps)
            read = [(after, block.decoded().row_ids) for after, block in batches]
            seen += [(after.epoch, row_id) for after, ids in read for row_id in ids]
            cursors.add(read[-1][0])
        assert len(cursors) == 1  # all ranks stand at the same place
        cursor = cursors.pop()
    epochs = Counter(epoch for epoch, _ in seen)
    assert len(set(seen)) == len(seen)
    assert all(epochs[epoch] == len(store) for epoch in range(cursor.epoch))


@given(
    seed=st.integers(0, 9),
    share=st.sampled_from([None, 0.1, 0.5, 1.0]),
    holdout=st.sampled_from([0.0, 0.25]),
    batch_size=st.integers(1, 30),
    legs=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_a_step_is_the_same_for_any_ranks_and_any_resumes(store, seed, share, holdout, batch_size, legs):
    """Each leg is a run with a number of ranks and some steps; the next one resumes where it stopped."""
    order, cursor = store.order(seed, share, holdout), Cursor()
    alone = store.batches(order, batch_size)
    for world, steps in legs:
        ranks = [store.batches(order, batch_size, cursor, Rank(number, world)) for number in range(world)]
        for _ in range(steps):
            cursor, whole = next(alone)
            parts = [next(rank) for rank in ranks]
            assert {after for after, _ in parts} == {cursor}
            sizes = [len(part) for _, part in parts]
            assert max(sizes) - min(sizes) <= 1
            union = concat_blocks([part for _, part in parts])
            ids = np.array(union.row_ids.to_pylist())[np.argsort(union.subsets, kind="stable")]
            assert ids.tolist() == whole.row_ids.to_pylist()  # in order, once forget rows lie before retain rows


def test_memory_is_used_again_only_when_nobody_refers_to_it():
    recycler = Recycler()
    assert recycler.take() is None
    memory = np.zeros(64, np.uint8)
    recycler.add(memory)
    users = [memory[8:16].view(np.float32), memoryview(memory), torch.from_numpy(memory[:4].view(np.int16))]
    del memory
    while users:
        assert recycler.take() is None
        users.pop()
    assert recycler.take() is not None


def test_batches_that_are_kept_stay_as_they_were(store):
    stream = store.batches(store.order(0), 8)
    kept = [next(stream)[1] for _ in range(20)]
    again = store.batches(store.order(0), 8)
    for block in kept:
        assert same_rows(block.decoded(), next(again)[1].decoded())


def test_a_batch_is_the_rows_it_names(store):
    rows = make_rows(range(53), positions=None, forget=20)
    for _, block in itertools.islice(store.batches(store.order(0), 8), 20):
        got = block.decoded()
        wanted = [int(row_id.split("/")[1]) for row_id in got.row_ids]
        assert same_rows(got, make_rows(wanted, positions=None, forget=20))
        assert got.row_ids == [rows.row_ids[number] for number in wanted]
