"""Leases: one holder at a time, takeover of the dead, and nothing published by whoever was taken over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import ROOT, FakeClock, make_plan

from duet.cache import maintain
from duet.cache.errors import NotPermitted
from duet.cache.leases import OWNER_NAME, Clock, Heartbeat, Lease, LeaseLost, Leases
from duet.cache.location import Folder
from duet.cache.plan import PLAN_NAME
from duet.cache.writer import StoreWriter

LEASE_S = 100.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def leases(tmp_path, clock) -> Leases:
    return Leases(tmp_path / "leases", LEASE_S, clock)


def held(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cannot_publish(lease: Lease, target: Path) -> None:
    with pytest.raises(FileNotFoundError):
        (lease.path / "x").write_text("late")
    with pytest.raises(LeaseLost, match=lease.key):
        lease.publish("x", target)
    assert not target.exists()


def test_one_holder_at_a_time(leases):
    lease = held(leases.acquire("a"))
    assert leases.acquire("a") is None
    assert held(leases.acquire("b")).key == "b"
    assert leases.held() == ["a", "b"]
    leases.release(lease)
    assert leases.held() == ["b"]
    assert held(leases.acquire("a")).path != lease.path


def test_what_is_published_lies_at_the_target(leases, tmp_path):
    lease = held(leases.acquire("a"))
    (lease.path / "x").write_text("new")
    lease.publish("x", tmp_path / "target")
    leases.release(lease)
    assert (tmp_path / "target").read_text() == "new"
    assert not files_below(leases.dir)


def test_an_expired_lease_is_taken_over_and_its_holder_publishes_nothing(leases, clock, tmp_path):
    old = held(leases.acquire("a"))
    (old.path / "x").write_text("half")
    clock.time += LEASE_S
    assert leases.acquire("a") is None
    clock.time += 1
    assert leases.held() == []
    new = held(leases.acquire("a"))
    cannot_publish(old, tmp_path / "target")
    with pytest.raises(LeaseLost):
        leases.renew(old)
    (new.path / "x").write_text("new")
    before = files_below(leases.dir)
    leases.release(old)
    assert files_below(leases.dir) == before
    new.publish("x", tmp_path / "target")


def test_a_lost_lease_stays_lost_when_its_key_is_taken_anew(leases, clock, tmp_path):
    old = held(leases.acquire("a"))
    clock.time += LEASE_S + 1
    leases.release(held(leases.acquire("a")))
    new = held(leases.acquire("a"))
    assert new.path.parent == old.path.parent
    cannot_publish(old, tmp_path / "target")
    with pytest.raises(LeaseLost):
        leases.renew(old)
    leases.release(old)
    leases.renew(new)
    assert leases.acquire("a") is None


def test_a_renewed_lease_is_kept(leases, clock):
    lease = held(leases.acquire("a"))
    for _ in range(5):
        clock.time += LEASE_S * 0.9
        leases.renew(lease)
        assert leases.acquire("a") is None


def test_a_lease_ends_after_its_holders_time_not_after_that_of_who_looks(tmp_path, clock):
    patient, hasty = (Leases(tmp_path / "leases", lease_s, clock) for lease_s in (1000.0, 1.0))
    lease = held(patient.acquire("a"))
    clock.time += 999
    assert hasty.held() == ["a"]
    assert hasty.acquire("a") is None
    patient.renew(lease)
    clock.time += 1001
    assert hasty.acquire("a")


def test_who_is_slow_to_act_on_an_old_look_does_not_get_a_held_key(tmp_path, clock):
    """Both saw the same dead lease; one has taken it over, and lost it to a third, before the other acts."""
    leases = Leases(tmp_path / "leases", LEASE_S, clock)
    held(leases.acquire("a"))
    clock.time += LEASE_S + 1

    class SlowClock(FakeClock):
        def stamp(self, path: Path) -> None:  # the last thing before the lease is moved in
            super().stamp(path)
            for _ in range(2):
                winners.append(held(leases.acquire("a")))
                clock.time += LEASE_S + 1
            winners.append(held(leases.acquire("a")))

    winners: list[Lease] = []
    slow = SlowClock()
    slow.time = clock.time
    assert Leases(tmp_path / "leases", LEASE_S, slow).acquire("a") is None
    assert winners[-1].path.exists()
    assert [path.name for path in leases.dir.iterdir()] == [winners[-1].path.parent.name]


HOLDER = """
import sys
from pathlib import Path
from duet.cache.leases import Leases
assert Leases(Path(sys.argv[1]), 1e6).acquire("a")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_holder_on_this_machine_whose_process_has_ended_is_dead_at_once(tmp_path):
    leases = Leases(tmp_path / "leases", 1e6)
    command = [sys.executable, "-c", HOLDER, str(leases.dir)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        assert leases.acquire("a") is None
        process.kill()
        process.wait()
        assert leases.held() == []
        assert leases.acquire("a")


@pytest.mark.parametrize("change", [{"machine": "elsewhere/boot/1"}, {"machine": ""}])
def test_a_holder_of_another_machine_is_known_by_its_age_alone(leases, clock, change):
    lease = held(leases.acquire("a"))
    owner = lease.path.parent / OWNER_NAME
    owner.write_text(json.dumps(json.loads(owner.read_text()) | change | {"pid": 2**22 + 1}))
    leases.renew(lease)
    assert leases.acquire("a") is None
    clock.time += LEASE_S + 1
    assert leases.acquire("a")


def test_another_process_of_the_same_number_is_not_the_holder(leases):
    lease = held(leases.acquire("a"))
    owner = lease.path.parent / OWNER_NAME
    owner.write_text(json.dumps(json.loads(owner.read_text()) | {"started": "1"}))
    assert leases.acquire("a")


@pytest.mark.parametrize("damage", [lambda path: path.write_text(""), lambda path: path.unlink()])
def test_a_lease_that_does_not_name_its_holder_is_known_by_its_age_alone(leases, clock, damage):
    lease = held(leases.acquire("a"))
    damage(lease.path.parent / OWNER_NAME)
    leases.renew(lease)
    assert leases.acquire("a") is None
    clock.time += LEASE_S + 1
    assert leases.acquire("a")


def test_tidy_leaves_nothing_even_when_several_do_it(leases, clock, tmp_path):
    lease = held(leases.acquire("a"))
    (lease.path / "shard").write_text("half")
    (leases.dir / ".away-1").mkdir()
    (leases.dir / ".clock-1").touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: leases.tidy(), range(4)))
    leases.tidy()
    assert not leases.dir.exists()
    assert leases.stamps() == {}
    cannot_publish(lease, tmp_path / "target")


def test_a_store_that_is_written_right_now_can_be_listed(tmp_path):
    """Its writers' files come and go while they are looked at."""
    done = threading.Event()

    def claim_and_release() -> None:
        with StoreWriter(Folder(tmp_path / "s"), make_plan(10)) as writer:
            while not done.is_set():
                shard = writer.claim()
                assert shard
                writer.release(shard)

    StoreWriter(Folder(tmp_path / "s"), make_plan(10)).__exit__()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(claim_and_release)
        try:
            states = {found.state for _ in range(100) for found in maintain.find_stores(Folder(tmp_path))}
        finally:
            done.set()
        writing.result()
    assert states <= {"being written", "incomplete"}


HAMMER = """
import sys
from pathlib import Path
from duet.cache.leases import Leases
leases = Leases(Path(sys.argv[1]), 1e6)
print("ready", flush=True)
for key in sys.stdin:
    print(key.strip() if leases.acquire(key.strip()) else "", flush=True)
"""


@pytest.fixture
def not_ours() -> Iterator[Path]:
    """A folder in which we may only read, whoever runs the tests."""
    folder = Path(tempfile.mkdtemp(prefix="duet-test-"))
    (folder / "s").mkdir()
    yield folder / "s"
    os.seteuid(os.getuid())
    shutil.rmtree(folder)


def test_somebody_elses_unfinished_store_can_be_listed(not_ours):
    leases = Leases(not_ours / "leases", 60.0)
    with StoreWriter(Folder(not_ours), make_plan(10, 4)) as writer:
        assert writer.claim()
        for path in (not_ours.parent, not_ours, *not_ours.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if os.getuid() == 0:
            os.seteuid(65534)
        else:
            leases.dir.chmod(0o555)
        assert leases.held() == ["shard-00000"]
        assert [found.state for found in maintain.find_stores(Folder(not_ours))] == ["being written"]
        os.seteuid(os.getuid())
        leases.dir.chmod(0o755)


def test_a_store_that_may_not_be_read_is_not_called_damaged(not_ours):
    with StoreWriter(Folder(not_ours), make_plan(10, 4)):
        pass
    not_ours.parent.chmod(0o755)
    not_ours.chmod(0o755)
    (not_ours / PLAN_NAME).chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    assert [found.state for found in maintain.find_stores(Folder(not_ours))] == ["not readable"]
    with pytest.raises(NotPermitted, match=r"plan\.json"):
        maintain.check(Folder(not_ours))
    os.seteuid(os.getuid())
    (not_ours / PLAN_NAME).chmod(0o644)
    (not_ours / PLAN_NAME).write_text("{}")
    assert [found.state for found in maintain.find_stores(Folder(not_ours))] == ["damaged"]


def test_of_processes_that_race_for_a_key_exactly_one_wins(tmp_path):
    command = [sys.executable, "-c", HAMMER, str(tmp_path / "leases")]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipe) for _ in range(4)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for number in range(200):
            for process in processes:
                process.stdin.write(f"key-{number}\n")
            answers = sorted(process.stdout.readline().strip() for process in processes)
            assert answers == ["", "", "", f"key-{number}"]
    finally:
        for process in processes:
            process.communicate()


def test_of_threads_that_take_and_give_back_two_never_hold_a_key(tmp_path):
    """With what NFS calls an atomic rename as the only lock; every other lease ends by being taken over."""
    clock = FakeClock()
    leases, inside = Leases(tmp_path / "leases", LEASE_S, clock), threading.Lock()
    published: list[int] = []

    def work(number: int) -> int:
        won = 0
        for attempt in range(150):
            lease = leases.acquire("a")
            if lease is None:
                continue
            won += 1
            assert inside.acquire(blocking=False)
            (lease.path / "x").write_text(f"{number} {attempt}")
            lease.publish("x", tmp_path / "target")
            assert (tmp_path / "target").read_text() == f"{number} {attempt}"
            published.append(number)
            inside.release()
            leases.release(lease)
        return won

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(work, range(4)))
    assert sum(won) == len(published) > 0
    assert not list(leases.dir.iterdir())


class CountingLeases(Leases):
    """Real leases, with word of each renewal."""

    def __init__(self, directory: Path, lease_s: float) -> None:
        super().__init__(directory, lease_s)
        self.renewed = threading.Semaphore(0)

    def renew(self, lease: Lease) -> None:
        super().renew(lease)
        self.renewed.release()


def test_a_heartbeat_keeps_a_real_lease_alive(tmp_path):
    """The lease is made old by hand; after the next beat it is young. The beats never stop for good."""
    leases = CountingLeases(tmp_path / "leases", 0.5)
    heartbeat = Heartbeat(leases)
    lease, other = held(leases.acquire("a")), held(leases.acquire("b"))
    heartbeat.add(lease)
    heartbeat.add(other)
    try:
        for _ in range(3):
            os.utime(lease.path.parent, (0, 0))
            while lease.path.parent.stat().st_mtime == 0:
                leases.renewed.acquire()
        leases.release(other)  # as if it were taken over: no reason to stop
        os.utime(lease.path.parent, (0, 0))
        while lease.path.parent.stat().st_mtime == 0:
            leases.renewed.acquire()
        heartbeat.remove(lease)
    finally:
        heartbeat.close()
    os.utime(lease.path.parent, (0, 0))
    assert leases.acquire("a")


def test_a_heartbeat_goes_on_after_the_file_server_stumbled(tmp_path):
    class Stumbling(CountingLeases):
        faults = 2

        def renew(self, lease: Lease) -> None:
            if self.faults:
                self.faults -= 1
                raise OSError(116, "Stale file handle")
            super().renew(lease)

    leases = Stumbling(tmp_path / "leases", 0.1)
    heartbeat = Heartbeat(leases)
    heartbeat.add(held(leases.acquire("a")))
    try:
        assert leases.renewed.acquire(timeout=60)
    finally:
        heartbeat.close()


def test_giving_back_a_lost_lease_leaves_the_heart_of_a_newer_one_on_its_key(tmp_path):
    leases = CountingLeases(tmp_path / "leases", 0.2)
    heartbeat = Heartbeat(leases)
    old = held(leases.acquire("a"))
    heartbeat.add(old)
    leases.release(old)
    new = held(leases.acquire("a"))
    heartbeat.add(new)
    heartbeat.remove(old)
    try:
        os.utime(new.path.parent, (0, 0))
        while new.path.parent.stat().st_mtime == 0:
            assert leases.renewed.acquire(timeout=60)
    finally:
        heartbeat.close()


def test_the_file_servers_clock_is_that_of_new_files(tmp_path):
    """The real clock behind `FakeClock`: it never runs backwards, gives a new file's time, and leaves nothing behind."""
    clock = Clock(tmp_path / "leases")
    before = clock.now()
    (tmp_path / "file").touch()
    assert before <= (tmp_path / "file").stat().st_mtime <= clock.now()
    os.utime(tmp_path / "file", (0, 0))
    clock.stamp(tmp_path / "file")
    assert before <= (tmp_path / "file").stat().st_mtime <= clock.now()
    assert not list((tmp_path / "leases").iterdir())
