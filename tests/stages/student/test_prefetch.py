"""The background thread's results come in order, its errors at their place, and closing ends it."""

from __future__ import annotations

import itertools
import threading

import pytest

from duet.stages.student.prefetch import Prefetch


def test_items_come_in_order_and_end():
    prefetch = Prefetch(iter(range(20)), lambda n: n * n, depth=3)
    assert list(prefetch) == [n * n for n in range(20)]
    with pytest.raises(StopIteration):
        next(prefetch)


@pytest.mark.parametrize("place", ["iterator", "prepare"])
def test_an_error_is_raised_where_its_item_would_have_come(place):
    def items():
        yield from range(3)
        if place == "iterator":
            raise ValueError("shard 3 is damaged")
        yield 3

    def prepare(n: int) -> int:
        if n == 3:
            raise ValueError("shard 3 is damaged")
        return n

    prefetch = Prefetch(items(), prepare)
    assert [next(prefetch) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="shard 3 is damaged"):
        next(prefetch)
    with pytest.raises(StopIteration):
        next(prefetch)


def test_it_works_ahead_by_its_depth_and_no_further():
    made = threading.Semaphore(0)
    prefetch = Prefetch(itertools.count(), lambda n: made.release() or n, depth=2)
    for _ in range(3):  # two in the queue, a third in the thread's hand
        assert made.acquire(timeout=10)
    assert not made.acquire(timeout=0.3)
    assert next(prefetch) == 0
    assert made.acquire(timeout=10)
    prefetch.close()


def test_closing_ends_the_thread_and_the_items():
    before = threading.active_count()
    prefetch = Prefetch(itertools.count(), lambda n: n)
    assert next(prefetch) == 0
    prefetch.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(prefetch)


def test_stalls_are_counted():
    ready = threading.Event()
    prefetch = Prefetch(iter([1]), lambda n: ready.wait(10) and n)
    threading.Timer(0.05, ready.set).start()
    assert next(prefetch) == 1
    assert prefetch.stalls == 1
    assert prefetch.stall_s > 0
