"""Which shard a writer takes next, and the leases that keep the other writers of the store away from it.

A writer lists the store and the leases once. After that it probes shards one by one. Once it has met another writer it probes
in random order, so that writers spread out, and it lists the store again only after exponentially many failed probes. On
object storage there are no leases: two writers may compute the same shard, which costs time; the one that is done later throws
its own away, for another may have rounded its logits otherwise.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from duet.cache.leases import Heartbeat, Lease, Leases
from duet.cache.location import Location
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.plan import Plan

# Failed probes before the second listing. Each later listing takes four times as many as the one before it, so a thousand
# writers list the store a few times each, however many shards it has.
PATIENCE = 32


@dataclass(frozen=True)
class Claim:
    """A shard that this process writes; without a lease on object storage."""

    index: int
    lease: Lease | None


class Claims:
    """One writer's view of the shards: which are missing, which others hold, which to probe next, which it has in hand."""

    def __init__(self, location: Location, plan: Plan, leases: Leases | None) -> None:
        self._location, self._plan, self._leases = location, plan, leases
        self._heartbeat = Heartbeat(leases) if leases else None
        self._missing: set[int] = set()  # not known to be written
        self._held: dict[str, float] = {}  # leases of others: when renewed, by the last listing, or when met since then
        self._listings, self._failed_probes = 0, 0  # failed since the last listing
        self._walk: deque[int] = deque()  # shards to probe, the next one first
        self._in_hand: dict[int, Claim] = {}  # neither written nor released
        self._written: set[int] = set()  # by this process

    def missing(self) -> list[int]:
        """Indices of the shards that are not written, in plan order."""
        if not self._listings:
            self._list()
        elif self._missing and self._location.size(MANIFEST_NAME) is not None:
            self._missing.clear()
        else:
            for index in list(self._missing):
                self._is_written(index)
        return sorted(self._missing)

    def num_missing(self) -> int:
        """How many shards were missing when this process last looked."""
        if not self._listings:
            self._list()
        return len(self._missing)

    def take(self) -> Claim | None:
        """A shard that is neither written nor held by a living writer; None if there is none now."""
        if not self._listings:
            self._list()
        if claim := self._first_free():
            return claim
        self._walk = self._new_walk()  # shards that others held may be free by now
        return self._first_free()

    def wrote(self, index: int) -> None:
        """Remember that this process has written a shard."""
        self._written.add(index)

    def release(self, claim: Claim) -> None:
        """Let go of a shard, written or not."""
        self._in_hand.pop(claim.index, None)
        if claim.lease and self._leases and self._heartbeat:
            self._heartbeat.remove(claim.lease)
            self._leases.release(claim.lease)

    def close(self) -> None:
        """Let go of everything."""
        for claim in list(self._in_hand.values()):
            self.release(claim)
        if self._heartbeat:
            self._heartbeat.close()

    def _list(self) -> None:
        there = self._location.entries()
        self._held = self._leases.stamps() if self._leases else {}
        self._missing = set(range(self._plan.num_shards)) - set(self._plan.written(there))
        self._listings, self._failed_probes = self._listings + 1, 0

    def _new_walk(self) -> deque[int]:
        """All missing shards, in the order in which they are probed: first those that writers who died seem to have begun."""
        walk = sorted(self._missing - set(self._in_hand))
        if self._leases is None or self._held:
            random.shuffle(walk)
        if self._leases and self._held:
            expired = self._leases.now() - self._leases.lease_s
            walk.sort(key=lambda index: _rank(self._held.get(_key(index)), expired))
        return deque(walk)

    def _first_free(self) -> Claim | None:
        """Probe along the walk up to a shard that is free; None at its end."""
        now = self._leases.now() if self._leases and self._walk else 0.0
        while self._walk:
            if self._failed_probes >= PATIENCE * 4 ** (self._listings - 1):
                self._list()
                self._walk = self._new_walk()
                continue
            index = self._walk.popleft()
            if index not in self._in_hand and (claim := self._probe(index, now)):
                return claim
        return None

    def _probe(self, index: int, now: float) -> Claim | None:
        """Claim a shard if it is free. If it is not, and the last listing did not say so, the probe counts as failed."""
        if self._is_written(index):
            self._failed_probes += 1
            return None
        if self._leases is None:
            return self._hand(index, None)
        if not self._leases.alive(_key(index), now) and (lease := self._acquire(index, self._leases)):
            return self._hand(index, lease)
        if self._held.setdefault(_key(index), now) == now:
            self._failed_probes += 1
            if len(self._held) == 1:  # the first other writer that this one meets
                random.shuffle(self._walk)
        return None

    def _acquire(self, index: int, leases: Leases) -> Lease | None:
        lease = leases.acquire(_key(index))
        if lease and self._is_written(index):  # between the first look and the lease
            leases.release(lease)
            return None
        return lease

    def _hand(self, index: int, lease: Lease | None) -> Claim:
        if lease and self._heartbeat:
            self._heartbeat.add(lease)
        self._in_hand[index] = Claim(index, lease)
        return self._in_hand[index]

    def _is_written(self, index: int) -> bool:
        found = index in self._written or self._location.size(self._plan.side_name(index)) is not None
        if found:
            self._missing.discard(index)
        return found


def _key(index: int) -> str:
    """The name of a shard's lease."""
    return f"shard-{index:05d}"


def _rank(renewed: float | None, expired: float) -> int:
    """0: its lease has run out, 1: nobody holds it, 2: somebody seems to work on it."""
    if renewed is None:
        return 1
    return 0 if renewed < expired else 2
