"""Who writes which shard: leases on a shared file system, by nothing but `rename`, which NFS keeps atomic too.

A lease on a key is a directory `KEY-GENERATION`, filled aside and renamed into place: one that is not empty is never
replaced, so one process gets it. Its holder writes only in a folder of its own inside it and publishes by renaming a file
out of it. It keeps the directory's modification time young; whoever finds it older than its holder's `lease_s` may take
over: make the next generation, then move the old directory away and delete it. From that moment the old holder's paths are
gone: whatever it still does, it cannot publish. (The folder inside has a random name, so that this stays true when a
generation's number comes back.) A holder on this machine whose process has ended is known to be dead at once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWNER_NAME = "owner.json"


class LeaseLost(Exception):
    """Somebody else took over what this process was working on: its work on that shard is thrown away."""


class Clock:
    """The file server's clock, asked through a file of our own, so that no two machines' clocks need agree."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f".clock-{uuid.uuid4().hex}"

    def now(self) -> float:
        """Where we may only look, this machine's time."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "w") as file:
                now = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:  # somebody tidied between the two
            return self.now()
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return time.time()
            raise
        self._path.unlink(missing_ok=True)
        return now

    def stamp(self, path: Path) -> None:
        os.utime(path)


@dataclass(frozen=True)
class Lease:
    """A key that this process holds as long as `path`, its own folder, exists."""

    key: str
    path: Path

    def publish(self, name: str, target: Path) -> None:
        """Rename a file of the lease's folder to `target`; raises LeaseLost if somebody took over. The caller syncs."""
        try:
            os.rename(self.path / name, target)
        except FileNotFoundError:
            raise LeaseLost(self.key) from None


class Leases:
    """The leases in one directory, which is made at the first `acquire`."""

    def __init__(self, directory: Path, lease_s: float, clock: Clock | None = None) -> None:
        self.dir = directory
        self.lease_s = lease_s
        self._clock = clock or Clock(directory)

    def acquire(self, key: str) -> Lease | None:
        """A lease if nobody has a living one on `key`."""
        generations = self._generations(key)
        if generations and self._alive(self._path(key, generations[-1])):
            return None
        mine = generations[-1] + 1 if generations else 0
        lease = Lease(key, self._path(key, mine) / uuid.uuid4().hex)
        self._move_in(lease)
        others = [generation for generation in self._generations(key) if generation != mine]
        if any(other > mine or self._alive(self._path(key, other)) for other in others):
            self.release(lease)  # our look at the directory was an old one
        if not lease.path.exists():  # another process was quicker
            return None
        for other in others:
            _remove(self._path(key, other))
        return lease

    def _move_in(self, lease: Lease) -> None:
        """Put the lease in its place if that is free. Whether it got there, its path says, even if an answer was lost."""
        aside = self.dir / f".new-{lease.path.name}"
        try:
            (aside / lease.path.name).mkdir(parents=True)
            (aside / OWNER_NAME).write_text(json.dumps(_this_process() | {"lease_s": self.lease_s}))
            self._clock.stamp(aside)
            os.rename(aside, lease.path.parent)
        except OSError as error:  # FileNotFoundError: all shards were written and somebody tidied
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def renew(self, lease: Lease) -> None:
        """Keep a lease young; raises LeaseLost if somebody took over."""
        try:
            lease.path.stat()
            self._clock.stamp(lease.path.parent)
        except FileNotFoundError:
            raise LeaseLost(lease.key) from None

    def release(self, lease: Lease) -> None:
        """Give a lease back, with what lies in it; one that was taken over is not ours to touch."""
        if lease.path.exists():
            _remove(lease.path.parent)

    def keys(self) -> set[str]:
        """Keys with a lease, alive or not."""
        return {path.name.rpartition("-")[0] for path in self._lease_dirs()}

    def tidy(self) -> None:
        """Remove what crashed and slow writers left; only when nothing is left to be written."""
        for path in self._entries():
            _remove(path) if path.is_dir() else path.unlink(missing_ok=True)
        with suppress(OSError):  # others tidy too
            self.dir.rmdir()

    def held(self) -> list[str]:
        """Keys that somebody alive holds."""
        return sorted({path.name.rpartition("-")[0] for path in self._lease_dirs() if self._alive(path)})

    def _entries(self) -> list[Path]:
        try:
            return list(self.dir.iterdir())
        except FileNotFoundError:
            return []

    def _lease_dirs(self) -> list[Path]:
        found = self._entries()
        return [path for path in found if path.name.rpartition("-")[2].isdigit() and path.name[0] != "."]

    def _generations(self, key: str) -> list[int]:
        names = (path.name.rpartition("-") for path in self._lease_dirs())
        return sorted(int(generation) for found, _, generation in names if found == key)

    def _path(self, key: str, generation: int) -> Path:
        return self.dir / f"{key}-{generation}"

    def _alive(self, path: Path) -> bool:
        try:
            age = self._clock.now() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        owner = _owner(path)
        return age <= owner.get("lease_s", self.lease_s) and not _known_dead(owner)


def _remove(path: Path) -> None:
    """Make a lease's paths invalid at once, then delete what lies there."""
    away = path.with_name(f".away-{uuid.uuid4().hex}")
    try:
        os.rename(path, away)
    except FileNotFoundError:
        return
    shutil.rmtree(away, ignore_errors=True)


def _this_process() -> dict[str, str | int]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _owner(path: Path) -> dict[str, Any]:
    """What a lease's holder wrote about itself; nothing where a power failure took it."""
    try:
        return json.loads((path / OWNER_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _known_dead(owner: dict[str, Any]) -> bool:
    """Whether a lease's owner ran on this machine and runs no more."""
    machine = owner.get("machine")
    return bool(machine) and machine == _machine() and _start_of(owner["pid"]) != owner["started"]


def _machine() -> str:
    """This boot of this machine and its space of process numbers; empty where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a running process of this machine started, in clock ticks since boot; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


class Heartbeat:
    """Renews leases in the background."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._held: set[Lease] = set()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._held.add(lease)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
            self._thread.start()

    def remove(self, lease: Lease) -> None:
        with self._lock:
            self._held.discard(lease)

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._leases.lease_s / 4):
            with self._lock:
                held = list(self._held)
            for lease in held:
                try:
                    self._leases.renew(lease)
                except LeaseLost:
                    self.remove(lease)
                except OSError:  # the file server stumbled: tried again, and one that stays old is taken over
                    continue
