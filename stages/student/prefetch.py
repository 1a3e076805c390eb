"""Doing the next piece of work in the background while the caller uses the last one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Prefetch(Generic[T, U]):
    """Iterates over `prepare(item)` of an iterator's items, up to `depth` of them made ahead by a thread.

    An error in the thread is raised in the caller, at the place where its item would have come. `stalls` counts how often
    the caller had to wait and `stall_s` for how long: a reader that keeps up has few.
    """

    def __init__(self, items: Iterator[T], prepare: Callable[[T], U], depth: int = 2) -> None:
        self.stalls, self.stall_s = 0, 0.0
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items, prepare), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[T, U]:
        return self

    def __next__(self) -> U:
        if self._closed.is_set():
            raise StopIteration
        started = time.perf_counter()
        waited = self._queue.empty()
        kind, value = self._queue.get()
        if waited:
            self.stalls, self.stall_s = self.stalls + 1, self.stall_s + time.perf_counter() - started
        if kind == "item":
            return value
        self._closed.set()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop the items that it made ahead."""
        self._closed.set()
        self._thread.join()

    def _run(self, items: Iterator[T], prepare: Callable[[T], U]) -> None:
        try:
            for item in items:
                if not self._put("item", prepare(item)):
                    return
            self._put("end", None)
        except BaseException as error:  # handed to the caller, who raises it
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> bool:
        """False if the caller has closed."""
        while not self._closed.is_set():
            try:
                self._queue.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
