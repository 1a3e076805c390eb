"""Reading a complete store: nothing is handed out before its shard was checked, memory stays constant, the order is fixed.

A step takes the same rows and a cursor resumes on the very next one, whatever the number of ranks was before and is now.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from duet.cache.arrow_format import ArrowShard
from duet.cache.codec import Block, concat_blocks, position_columns
from duet.cache.errors import DamagedStore, UserError
from duet.cache.location import Folder, Location, damaged, wrong_size
from duet.cache.manifest import MANIFEST_NAME, Manifest, read_manifest
from duet.cache.order import GROUP_SHARDS, Cursor, Order, Window
from duet.cache.record import Rows
from duet.cache.window import OpenWindow, Recycler, gather, open_window
from duet.cache.zarr_format import ZarrShard

REPAIR_HINT = "`duet cache repair` with the store's config writes only the damaged shards again"
FORMAT_READERS = {"arrow": ArrowShard, "zarr": ZarrShard}
NOTE_S = 3600.0  # between notes of a use: a training may take days
_checked: set[tuple[str, int, int, str]] = set()  # (file, its inode, its time of change, sha256) hashed by this process


@dataclass(frozen=True)
class Rank:
    """Which of several readers of the same order this one is."""

    number: int = 0
    world: int = 1


START, ALONE = Cursor(), Rank()


class Store:
    """A complete store, opened for reading."""

    def __init__(self, location: Location, verify: bool = True) -> None:
        """Read the manifest and check that every shard is there with its size; `verify`: and its sha256 at its first use."""
        self.location = location
        self.manifest: Manifest = read_manifest(location)
        self._verify = verify
        self._shards: dict[int, ArrowShard | ZarrShard] = {}  # least recently used first
        self._columns = position_columns(self.manifest.layout, self.manifest.value_dtype, self.manifest.logsumexp)
        sizes = location.sizes()
        for shard in self.manifest.shards:
            if fault := wrong_size(location, shard.name, sizes.get(shard.name), shard.bytes):
                raise DamagedStore(fault, REPAIR_HINT)
        self._note_use()

    def _note_use(self) -> None:
        """Note when the store was last used; `duet cache gc` asks."""
        self._used = time.monotonic()
        if isinstance(self.location, Folder):
            with suppress(OSError):  # somebody else's store, in which we may only read
                os.utime(self.location.path / MANIFEST_NAME)

    def __len__(self) -> int:
        return self.manifest.rows

    def order(self, seed: int, forget_share: float | None = None, holdout: float = 0.0) -> Order:
        """The order of its rows under a seed; see `Order`."""
        return Order(self.manifest, seed, forget_share, holdout)

    def batches(
        self, order: Order, batch_size: int, cursor: Cursor = START, rank: Rank = ALONE
    ) -> Iterator[tuple[Cursor, Block]]:
        """Endless batches of this rank from `cursor` on, each with the cursor of what comes after it.

        A step takes `batch_size` rows over all ranks, fewer at the end of an epoch, and each rank an equal part of
        them to within one row, perhaps none. In a batch, the rows of a subset lie together, in the order of `SUBSETS`.
        """
        held: dict[int, tuple[Window, OpenWindow]] = {}  # the last window of each stream
        recycler = Recycler()
        while True:
            while cursor.slot < order.num_slots:
                if time.monotonic() > self._used + NOTE_S:
                    self._note_use()
                num_rows = min(batch_size, order.num_slots - cursor.slot)
                first, end = (cursor.slot + num_rows * part // rank.world for part in (rank.number, rank.number + 1))
                picks: list[tuple[OpenWindow, np.ndarray]] = []
                for window, places in order.draw(Cursor(cursor.epoch, first), end - first):
                    last, rows = held.get(window.stream, (None, None))
                    if rows is None or last != window:
                        memory = rows.memory if rows and all(rows is not picked for picked, _ in picks) else None
                        rows = open_window(self._blocks(order.ranges(window)), self._columns, memory)
                        held[window.stream] = window, rows
                        self._release()
                    picks.append((rows, places))
                cursor = Cursor(cursor.epoch, cursor.slot + num_rows)
                yield cursor, self._gather(picks, recycler)
            cursor = Cursor(cursor.epoch + 1, 0)

    def block_of(self, rows: np.ndarray) -> Block:
        """These rows of the plan as one block, in this order; ascending numbers read each stored block once."""
        parts = []
        for (shard, block), members in groupby(map(self._locate, rows.tolist()), key=lambda found: found[:2]):
            window = open_window([self.block(shard, block)], self._columns)
            parts.append(self._gather([(window, np.array([inside for *_, inside in members]))], Recycler()))
            self._release()
        return concat_blocks(parts) if parts else self._gather([], Recycler())

    def _gather(self, picks: list[tuple[OpenWindow, np.ndarray]], recycler: Recycler) -> Block:
        picks = picks or [(open_window([self.block(0, 0)[:0]], self._columns), np.arange(0))]
        return gather(picks, self.manifest.layout, self._columns, recycler)

    def _blocks(self, ranges: np.ndarray) -> list[Block]:
        """The rows of these ranges, each within a block."""
        blocks = []
        for first, end in ranges.tolist():
            shard, block, inside = self._locate(first)
            blocks.append(self.block(shard, block)[inside : inside + end - first])
        return blocks

    def _release(self) -> None:
        for shard in self._shards.values():
            shard.release()

    def rows(self, first: int = 0, end: int | None = None) -> Iterator[Rows]:
        """Rows `first` to `end`-1 in plan order, decoded, block by block."""
        end = len(self) if end is None else end
        while first < end:
            shard, block, inside = self._locate(first)
            stored = self.block(shard, block)
            count = min(len(stored) - inside, end - first)
            yield stored.decoded()[inside : inside + count]
            first += count

    def _locate(self, row: int) -> tuple[int, int, int]:
        shard, inside = divmod(row, self.manifest.shard_rows)
        return shard, *divmod(inside, self.manifest.block_rows)

    def blocks(self, shard: int) -> list[Block]:
        """All blocks of a shard."""
        with self._parsing(shard):
            return [self.block(shard, index) for index in range(self._shard(shard).num_blocks)]

    def each_block(self, shard: int) -> Iterator[Block]:
        """The blocks of a shard one at a time; the memory of one is given back when the next is asked for."""
        with self._parsing(shard):
            count = self._shard(shard).num_blocks
        for index in range(count):
            yield self.block(shard, index)
            self._release()

    def block(self, shard: int, index: int) -> Block:
        """Block `index` of a shard, of an uncompressed Arrow store as views into the memory map."""
        with self._parsing(shard):
            return self._shard(shard).block(index)

    @contextmanager
    def _parsing(self, shard: int) -> Iterator[None]:
        """A shard may have the right hash and yet be no shard, where somebody made its manifest so."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            name = self.location.name_of(self.manifest.shards[shard].name)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedStore(f"{name} is not a shard of this store: {reason}", "write the store again") from error

    def _shard(self, index: int) -> ArrowShard | ZarrShard:
        shard = self._shards.pop(index, None) or self._open(index)
        self._shards[index] = shard
        if len(self._shards) > 4 * GROUP_SHARDS:
            del self._shards[next(iter(self._shards))]
        return shard

    def _open(self, index: int) -> ArrowShard | ZarrShard:
        entry, manifest = self.manifest.shards[index], self.manifest
        name = self.location.name_of(entry.name)
        with self.location.open(entry.name, entry.bytes, entry.sha256) as file:
            found = os.fstat(file.fileno())
            if fault := wrong_size(self.location, entry.name, found.st_size, entry.bytes):
                raise DamagedStore(fault, REPAIR_HINT)
            key = (name, found.st_ino, found.st_mtime_ns, entry.sha256)
            if self._verify and key not in _checked:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != entry.sha256:
                    self.location.drop(entry.sha256)
                    raise DamagedStore(damaged(self.location, entry.name, digest, entry.sha256), REPAIR_HINT)
                _checked.add(key)
            columns = position_columns(manifest.layout, entry.value_dtype, entry.logsumexp)
            return FORMAT_READERS[manifest.format](file, manifest.layout, columns, manifest.block_rows)
