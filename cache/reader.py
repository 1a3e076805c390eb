"""Reading a complete store: integrity first, then batches in an order that depends only on seed and epoch.

The order of an epoch is computed from row counts alone, so a cursor (epoch, batch) is enough to resume on the very
next batch without reading what came before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cache.arrow import ShardView
from cache.errors import UserError
from cache.files import sha256_file
from cache.manifest import Manifest, read_manifest
from cache.record import Record

# Rows are shuffled within groups of this many (shuffled) shards, so that reading stays near-sequential on big stores.
SHUFFLE_SHARDS = 8


@dataclass(frozen=True)
class Cursor:
    """The next batch to be read: `batch` counts from 0 within `epoch`."""

    epoch: int = 0
    batch: int = 0


class Store:
    """A complete store, opened for reading; `store[i]` is the plan's row i."""

    def __init__(self, store_dir: Path, verify: bool = True) -> None:
        """Read the manifest and check every shard: existence and size always, sha256 if `verify`."""
        self.dir = store_dir
        self.manifest: Manifest = read_manifest(store_dir)
        for fault in verify_shards(store_dir, self.manifest, hashes=verify):
            raise UserError(
                fault, "run `duet teacher-logits` with the same config: it writes only the damaged shards anew"
            )

    @cached_property
    def _views(self) -> list[ShardView]:
        return [ShardView(self.dir / shard.name, self.manifest.top_k) for shard in self.manifest.shards]

    @cached_property
    def _first_rows(self) -> np.ndarray:
        """Row number of each shard's first row, then the number of rows."""
        return np.concatenate([[0], np.cumsum([shard.rows for shard in self.manifest.shards])])

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self._views[shard][row - int(self._first_rows[shard])]

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers of one epoch, each exactly once: shards shuffled, then rows within groups of shards."""
        rng = np.random.default_rng([seed, epoch])
        shards = rng.permutation(len(self.manifest.shards))
        groups = [shards[i : i + SHUFFLE_SHARDS] for i in range(0, len(shards), SHUFFLE_SHARDS)]
        rows = [
            np.concatenate([np.arange(self._first_rows[s], self._first_rows[s + 1]) for s in group]) for group in groups
        ]
        return np.concatenate([rng.permutation(group) for group in rows])

    def num_batches(self, batch_size: int) -> int:
        """Batches per epoch; the last one may be smaller, no row is dropped."""
        return -(-len(self) // batch_size)

    def batches(self, batch_size: int, seed: int, cursor: Cursor = Cursor()) -> Iterator[tuple[Cursor, list[Record]]]:
        """Endless batches from `cursor` on, each with the cursor of the batch after it."""
        epoch, batch = cursor.epoch, cursor.batch
        while True:
            order = self.epoch_order(seed, epoch)
            while batch < self.num_batches(batch_size):
                rows = order[batch * batch_size : (batch + 1) * batch_size]
                batch += 1
                yield Cursor(epoch, batch), [self[int(row)] for row in rows]
            epoch, batch = epoch + 1, 0


def verify_shards(store_dir: Path, manifest: Manifest, hashes: bool = True) -> Iterator[str]:
    """Describe each shard that is missing, of another size, or of other bytes than the manifest says."""
    for shard in manifest.shards:
        path = store_dir / shard.name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != shard.bytes:
            yield f"{path} has {path.stat().st_size} bytes, the manifest says {shard.bytes}"
        elif hashes and (found := sha256_file(path)) != shard.sha256:
            yield f"{path} is damaged: sha256 {found[:16]}…, the manifest says {shard.sha256[:16]}…"
