"""A thousand tasks of an array on one store, some killed, some preempted: what they write, and what they ask for.

No engine, one row per shard, a clock that we set. The tasks take turns, drawn, in one thread of this process; a task that is
killed can change nothing any more from some file operation on, and its leases run out. Counted are the calls of `os`.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import FakeClock, make_plan, make_rows, read_all, same_rows

from duet.cache import claims, writer
from duet.cache.leases import Lease, Leases
from duet.cache.location import Folder
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.plan import Plan
from duet.cache.record import Rows
from duet.cache.writer import ShardWriter, StoreWriter

LEASE_S = 1000.0  # of the clock that we set
CHANGES = ("rename", "replace", "mkdir", "rmdir", "unlink")
LOOKS = ("stat", "lstat", "open", "utime")

LARGE = int(os.environ.get("DUET_TASKS", "300"))  # tasks of the larger array; `make soak-store` takes 1,000


class Killed(Exception):
    pass


@dataclass
class Task:
    """One life of an array's task; `dies_at` is the change of the file system at which it is killed."""

    dies_at: int | None = None
    preempted: bool = False
    dead: bool = False
    writer: StoreWriter | None = None
    shard: ShardWriter | None = None
    count: Counter[str] = field(default_factory=Counter)
    steps: Iterator[None] = field(default_factory=lambda: iter(()))


class Listing(Iterator[Any]):
    """What `os.scandir` gave, read to its end."""

    def __init__(self, entries: list[Any]) -> None:
        self._entries = iter(entries)

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    close = __exit__


class Inline(Executor):
    """The thread that publishes, without the thread."""

    def submit(self, work: Callable[..., Any], *arguments: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **more))
        except Killed as error:
            future.set_exception(error)
        return future


class NoHeart:
    """Leases are renewed by `Array.run`, by the clock that we set."""

    def __init__(self, leases: Leases) -> None:
        pass

    def add(self, lease: Lease) -> None:
        pass

    remove = add

    def close(self) -> None:
        pass


class FileServer:
    """Counts what the task whose turn it is asks for, and kills it when its time has come."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.task = Task()
        self.renamed: Counter[str] = Counter()  # files of the store, by name
        for name in (*CHANGES, *LOOKS):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        opened = io.open
        counted_open = self._counted("open", opened)

        @functools.cache
        def of_a_process(path: Any) -> str:
            with opened(path) as file:
                return file.read()

        def counting_open(path: Any, *arguments: Any, **more: Any) -> Any:
            if str(path).startswith("/proc/"):  # of this process, which is every task's: not the file server's work
                return io.StringIO(of_a_process(path))
            return counted_open(path, *arguments, **more)

        for module in (io, builtins):
            patch.setattr(module, "open", counting_open)
        listdir, scandir = os.listdir, os.scandir

        def counting_scandir(path: Any = ".") -> Listing:
            with scandir(path) as found:
                entries = list(found)
            self._note_listing(len(entries))
            return Listing(entries)

        def counting_listdir(path: Any = ".") -> list[str]:
            entries = listdir(path)
            self._note_listing(len(entries))
            return entries

        patch.setattr(os, "scandir", counting_scandir)
        patch.setattr(os, "listdir", counting_listdir)
        patch.setattr(os, "fsync", lambda handle: None)

    def _note_listing(self, entries: int) -> None:
        self.task.count["listings"] += 1
        self.task.count["entries"] += entries

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            task = self.task
            if name in LOOKS:
                task.count["looks"] += type(arguments[0]) is not int  # a handle is of a file that was counted
                return original(*arguments, **more)
            if task.dead:
                raise Killed
            task.count["changes"] += 1
            task.dead = task.count["changes"] == task.dies_at
            if task.dead and task.count["changes"] % 2:
                raise Killed  # before it
            result = original(*arguments, **more)
            if name in ("rename", "replace"):
                self.renamed[Path(arguments[1]).name] += 1
                task.count["ends"] += ".away-" in str(arguments[1])  # of leases, whose folders are listed to be removed
                task.count["manifest"] += Path(arguments[1]).name == MANIFEST_NAME
            if task.dead:
                raise Killed  # after it
            return result

        return call


@dataclass
class Array:
    """The tasks of one store, and what became of them."""

    folder: Path
    plan: Plan
    rows: Rows
    server: FileServer
    rng: random.Random
    clock: FakeClock = field(default_factory=FakeClock)
    lives: list[Task] = field(default_factory=list)
    in_flight: set[int] = field(default_factory=set)  # shards that a killed task had in hand

    def begin(self, **of_task: Any) -> Task:
        task = Task(**of_task)
        task.steps = self.life(task)
        self.lives.append(task)
        return task

    def life(self, task: Task) -> Iterator[None]:
        hand = task.writer = StoreWriter(
            Folder(self.folder), self.plan, {"tokenizer/t.json": b"{}"}, LEASE_S, self.clock
        )
        yield
        while missing := hand.missing():
            yield
            while shard := hand.claim():
                task.shard = shard
                yield
                if task.preempted:
                    hand.__exit__()
                    return
                shard.append(self.rows[shard.range.start : shard.range.stop])
                hand.publish(shard)
                hand.wait()
                task.shard = None
                yield
            self.clock.time += LEASE_S / 500
            for _ in range(len(missing) // 20):  # as `duet.stages.teacher.capture` waits: the longer, the more is left
                yield
        if not (self.folder / MANIFEST_NAME).exists():  # to read it is one file for each of the others
            hand.finalise({"python": "3"})
        hand.__exit__()

    def run(self, waiting: list[Task]) -> None:
        """Until every task has ended; one that was killed or preempted is queued again, to live to the end."""
        beat = self.clock.time
        while waiting:
            at = self.rng.randrange(len(waiting))
            task = self.server.task = waiting[at]
            self.clock.time += LEASE_S / 2000
            if self.clock.time > beat + LEASE_S / 4:
                beat = self.clock.time
                for living in waiting:
                    if living.shard and living.shard.lease and living.shard.lease.path.exists():
                        self.clock.stamp(living.shard.lease.path.parent)
            try:
                next(task.steps)
                continue
            except StopIteration:
                ended_early = task.preempted
            except Killed:
                ended_early = True
                self.in_flight |= {task.shard.index} if task.shard else set()
            waiting[at] = waiting[-1]
            waiting.pop()
            if ended_early:
                waiting.append(self.begin())


def tiny_rows(count: int) -> Rows:
    return make_rows(range(count), positions=1)


def run_array(folder: Path, tasks: int, shards: int, killed: int, preempted: int, seed: int) -> Array:
    rows, rng = tiny_rows(shards), random.Random(seed)
    random.seed(seed)
    plan = make_plan(shards, shard_rows=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ThreadPoolExecutor", lambda **_: Inline())
        patch.setattr(claims, "Heartbeat", NoHeart)
        array = Array(folder, plan, rows, FileServer(patch), rng)
        waiting = [array.begin(dies_at=rng.randint(1, 60)) for _ in range(killed)]
        waiting += [array.begin(preempted=True) for _ in range(preempted)]
        waiting += [array.begin() for _ in range(tasks - killed - preempted)]
        array.run(waiting)
    for task in array.lives:
        if task.writer:
            task.writer.__exit__()  # a killed one's threads
    return array


def check_what_was_written(array: Array) -> None:
    assert same_rows(read_all(array.folder), array.rows)
    plan, renamed = array.plan, array.server.renamed
    for index in range(plan.num_shards):
        assert renamed[plan.side_name(index)] == 1
        assert renamed[plan.shard_name(index)] <= 1 + (index in array.in_flight)
    assert array.in_flight, "no task was killed with a shard in hand"
    assert sorted(path.name for path in array.folder.iterdir() if path.is_dir()) == ["tokenizer"]


def check_what_was_asked(array: Array, tasks: int) -> None:
    """Three times at most a task has listed the store and the leases, beside the folders of leases that it has ended."""
    once = 2 * array.plan.num_shards + tasks + 10  # shards, side files, leases, what lies beside them
    for task in array.lives:
        if not task.count["manifest"]:  # that task tidied up, too
            assert task.count["listings"] <= 2 * 3 + 2 * task.count["ends"]
            assert task.count["entries"] <= 3 * once


@pytest.mark.parametrize(("tasks", "shards"), [(100, 250), (LARGE, 2 * LARGE)])
def test_tasks_of_an_array_write_every_shard_once_and_list_no_more_where_there_are_more(tmp_path, tasks, shards):
    array = run_array(tmp_path / "s", tasks, shards, killed=tasks // 10, preempted=tasks // 20, seed=0)
    check_what_was_written(array)
    check_what_was_asked(array, tasks)
    total = sum((task.count for task in array.lives), Counter())
    assert total["looks"] <= tasks * shards
    assert total["changes"] <= 12 * (shards + tasks)


def finalising(folder: Path, shards: int) -> Counter[str]:
    """What a process asks that finds all shards written by others."""
    rows = tiny_rows(shards)
    with pytest.MonkeyPatch.context() as patch:
        server = FileServer(patch)
        with StoreWriter(Folder(folder), make_plan(shards, shard_rows=1)) as first:
            while shard := first.claim():
                shard.append(rows[shard.range.start : shard.range.stop])
                first.publish(shard)
            first.wait()
        server.task = Task()
        with StoreWriter(Folder(folder), make_plan(shards, shard_rows=1)) as last:
            assert last.missing() == []
            last.finalise({"python": "3"})
        return server.task.count


def test_the_work_of_the_manifest_grows_with_the_shards_and_no_faster(tmp_path):
    small, large = (finalising(tmp_path / str(shards), shards) for shards in (200, 400))
    assert large["looks"] - small["looks"] == 200 * 3  # a side file is found and read, its shard is found
    assert large["listings"] == small["listings"]
    assert large["entries"] - small["entries"] == 200 * 2 * 2  # once to see what is missing, once to tidy up
    assert large["changes"] == small["changes"]
