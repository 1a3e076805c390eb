"""Who writes which shard: leases on a shared file system, by nothing but `rename`, which NFS keeps atomic too.

A lease on a key is a directory KEY with one folder in it, of a random name: the holder's. Both are made aside and renamed
into place together; a directory that is not empty is never replaced, so one process gets it. The holder writes only in its
folder and publishes by renaming a file out of it. It keeps KEY's modification time young; whoever finds it older than its
holder's `lease_s` may take over: move the holder's folder away and delete it, which one process can, since no other folder
ever has that name. From that moment the old holder's paths are gone: whatever it still does, it cannot publish. A holder on
this machine whose process has ended is known to be dead at once.

Who holds it stands in KEY, beside the folder, so that a look at a lease lists no directory, and again in the folder: who
clears a KEY whose folder is gone may be slow, and remove the first of another who has moved in meanwhile.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
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
_FOLDER = re.compile("[0-9a-f]{32}")


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

    def now(self) -> float:
        """The file server's time."""
        return self._clock.now()

    def acquire(self, key: str) -> Lease | None:
        """A lease if nobody has a living one on `key`."""
        if self.alive(key):
            return None
        if (self.dir / key).exists():
            folder = self._folder(key)
            if self.alive(key):  # or the folder might be that of another, who has moved in after our first look
                return None
            self._end(key, folder)
        lease = Lease(key, self.dir / key / uuid.uuid4().hex)
        self._move_in(lease)
        return lease if lease.path.exists() else None  # else another process was quicker

    def alive(self, key: str, now: float | None = None) -> bool:
        """Whether somebody alive holds a key, at a time that may have passed: then some of the dead count as alive."""
        owner = self._owner(key)
        try:
            stamp = os.stat(
                f"{self.dir}/{key}"
            ).st_mtime  # after we know whose it is, or it might be that of one before
        except FileNotFoundError:
            return False
        age = (self.now() if now is None else now) - stamp
        return age <= owner.get("lease_s", self.lease_s) and not _known_dead(owner)

    def _move_in(self, lease: Lease) -> None:
        """Put the lease in its place if that is free. Whether it got there, its path says, even if an answer was lost."""
        aside = self.dir / f".new-{lease.path.name}"
        try:
            (aside / lease.path.name).mkdir(parents=True)
            owner = json.dumps(_this_process() | {"lease_s": self.lease_s})
            for folder in (aside, aside / lease.path.name):
                (folder / OWNER_NAME).write_text(owner)
            self._clock.stamp(aside)
            os.rename(aside, lease.path.parent)
        except OSError as error:  # FileNotFoundError: all shards were written and somebody tidied
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _folder(self, key: str) -> str | None:
        """The name of the holder's folder."""
        with suppress(FileNotFoundError, PermissionError):
            return next(filter(_FOLDER.fullmatch, os.listdir(self.dir / key)), None)
        return None

    def _owner(self, key: str) -> dict[str, Any]:
        """What a lease's holder wrote about itself; nothing where there is none, or a power failure took it."""
        owner = _read_owner(f"{self.dir}/{key}")
        if owner is None and (self.dir / key).exists() and (folder := self._folder(key)):
            owner = _read_owner(f"{self.dir}/{key}/{folder}")
        return owner or {}

    def _end(self, key: str, folder: str | None) -> None:
        """Make a holder's paths invalid at once, and the key free, then delete what lies there; nothing if another did."""
        away = self.dir / f".away-{uuid.uuid4().hex}"
        try:
            if folder:
                os.rename(self.dir / key / folder, away)
        except FileNotFoundError:
            return
        (self.dir / key / OWNER_NAME).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has moved in
            (self.dir / key).rmdir()
        shutil.rmtree(away, ignore_errors=True)

    def renew(self, lease: Lease) -> None:
        """Keep a lease young; raises LeaseLost if somebody took over."""
        try:
            lease.path.stat()
            self._clock.stamp(lease.path.parent)
        except FileNotFoundError:
            raise LeaseLost(lease.key) from None

    def release(self, lease: Lease) -> None:
        """Give a lease back, with what lies in it; one that was taken over belongs to another writer."""
        self._end(lease.key, lease.path.name)

    def stamps(self) -> dict[str, float]:
        """Keys with a lease, alive or not, and when each was last renewed. One listing."""
        found = {}
        for entry in self._entries():
            if entry.name[0] != "." and entry.is_dir():
                with suppress(FileNotFoundError):
                    found[entry.name] = entry.stat().st_mtime
        return found

    def tidy(self) -> None:
        """Remove what crashed and slow writers left; only when nothing is left to be written."""
        for entry in self._entries():
            if not entry.is_dir():
                Path(entry).unlink(missing_ok=True)
                continue
            away = self.dir / f".away-{uuid.uuid4().hex}"
            with suppress(FileNotFoundError):
                os.rename(entry, away)
            shutil.rmtree(away, ignore_errors=True)
        with suppress(OSError):  # others tidy too
            self.dir.rmdir()

    def held(self) -> list[str]:
        """Keys that somebody alive holds."""
        return sorted(key for key in self.stamps() if self.alive(key))

    def num_holders(self) -> int:
        """Living processes that hold a key."""
        owners = [self._owner(key) for key in self.held()]
        return len({tuple(owner.get(name) for name in ("machine", "pid", "started")) for owner in owners})

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.dir) as entries:
                return list(entries)
        except (FileNotFoundError, PermissionError):  # one who may not look will be told when it is to write
            return []


def _this_process() -> dict[str, str | int]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _read_owner(folder: str) -> dict[str, Any] | None:
    try:
        with open(f"{folder}/{OWNER_NAME}", "rb") as file:
            owner = json.loads(file.read())
    except (FileNotFoundError, PermissionError, ValueError):
        return None
    kinds = {"machine": str, "pid": int, "started": str, "lease_s": (int, float)}
    whole = isinstance(owner, dict) and all(isinstance(owner.get(name), kind) for name, kind in kinds.items())
    return owner if whole else None


def _known_dead(owner: dict[str, Any]) -> bool:
    """Whether a lease's owner ran on this machine and runs no more."""
    machine = owner.get("machine")
    return bool(machine) and machine == _machine() and _start_of(owner["pid"]) != owner["started"]


@functools.cache
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
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
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
