"""A folder in which one process at a time trains: another that is to train there waits until that has ended or died.

Two at once would remove each other's checkpoints. They meet where `duet run` is killed and called again, while the stage that
it had started is still at work, and where a scheduler starts a job again somewhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from duet.cache.errors import UserError, note
from duet.cache.files import telling_of_full_disks
from duet.cache.leases import Heartbeat, Lease, Leases
from duet.cache.watch import Watch
from duet.stages.student.job import StudentJob
from duet.stages.student.ranks import Processes
from duet.stages.student.summary import is_trained

LEASES_NAME = ".training"  # beside the folder; no student is named so
LEASE_S = 120.0  # after which a process that gives no sign counts as dead; on the same machine that is known at once
WAIT_S = 0.5


@contextmanager
def alone_in(folder: Path, name: str, watch: Watch) -> Iterator[Watch]:
    """Hold a folder; yields a watch that raises UserError once another process has taken it over. Interrupted while waiting."""
    leases = Leases(folder.parent / LEASES_NAME, LEASE_S)
    lease = _acquired(leases, folder, name, watch)
    heartbeat = Heartbeat(leases)
    heartbeat.add(lease)

    def should_stop() -> bool:
        if folder.exists() and not lease.path.exists():
            raise UserError(
                f"{name}: another process trains in {folder} now: this one gave no sign for {LEASE_S:g} s",
                "run the same command again: it waits for the other one",
            )
        return watch.should_stop()

    try:
        yield replace(watch, should_stop=should_stop)
    finally:
        heartbeat.close()
        leases.release(lease)
        with suppress(OSError):  # others have leases there
            leases.dir.rmdir()


@contextmanager
def one_launch(job: StudentJob, processes: Processes, watch: Watch) -> Iterator[Watch]:
    """`alone_in` a student's folder for all processes of a launch: the first holds it; nobody where the student is done."""
    with ExitStack() as held:
        with processes.first_first():
            if processes.first and not is_trained(job.student_dir):
                watch = held.enter_context(alone_in(job.student_dir, f"student {job.name}", watch))
        yield watch


def _acquired(leases: Leases, folder: Path, name: str, watch: Watch) -> Lease:
    is_said = False
    while True:
        with telling_of_full_disks(folder):
            if lease := leases.acquire(folder.name):
                return lease
        if not is_said and leases.alive(folder.name):
            note(f"{name}: another process trains in {folder}; this one waits for it")
            is_said = True
        watch.pause(name)
        time.sleep(WAIT_S)
