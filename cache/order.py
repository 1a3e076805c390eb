"""The order in which rows are read: a function of the seed, the epoch and the store's row counts, and of nothing else.

Each subset is a stream: its shards are shuffled and taken in groups; the blocks of a group's shards are shuffled and taken
in windows; the rows of a window's blocks are shuffled. So a reader holds a window, opens each shard once an epoch, and
knows any later row without reading what comes before. The two streams are then merged by a fixed share, as evenly as
whole rows allow. A slot is a place in the merged order of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from cache.errors import UserError
from cache.manifest import Manifest
from cache.record import SUBSETS

WINDOW_BLOCKS = 8  # blocks of up to 4096 positions: some 9 MB at k = 64
GROUP_SHARDS = 8


@dataclass(frozen=True)
class Cursor:
    """The next row to be read: `slot` counts rows from 0 within `epoch`, over all ranks together."""

    epoch: int = 0
    slot: int = 0


@dataclass(frozen=True)
class Window:
    """Some blocks of one subset that are read together, in one epoch; `number` counts them there."""

    stream: int
    epoch: int
    number: int


class Stream:
    """One subset's rows `first` to `end`-1 of the plan, in an endless order of epochs."""

    def __init__(self, number: int, first: int, end: int, shard_rows: int, block_rows: int, seed: int) -> None:
        self.first, self.num_rows = first, end - first
        self._number, self._shard_rows, self._block_rows, self._seed = number, shard_rows, block_rows, seed
        self._shards = np.arange(first // shard_rows, -(-end // shard_rows)) if end > first else np.arange(0)
        self._windows = lru_cache(maxsize=2)(self._make_windows)
        self._shuffle = lru_cache(maxsize=2)(self._make_shuffle)

    def take(self, drawn: int, count: int) -> Iterator[tuple[Window, np.ndarray]]:
        """Draws `drawn` to `drawn+count`-1 since the first epoch began: each window with places in its rows."""
        while count > 0:
            epoch, slot = divmod(drawn, self.num_rows)
            starts, _ = self._windows(epoch)
            number = int(np.searchsorted(starts, slot, side="right")) - 1
            places = self._shuffle(epoch, number)[slot - int(starts[number]) :][:count]
            yield Window(self._number, epoch, number), places
            drawn, count = drawn + len(places), count - len(places)

    def ranges(self, window: Window) -> np.ndarray:
        """See `Order.ranges`."""
        return self._windows(window.epoch)[1][window.number]

    def _blocks(self, shard: int) -> np.ndarray:
        """[blocks, 2]: first and end row of each block of a shard, as far as they are this stream's."""
        shard_first = shard * self._shard_rows
        shard_end = min(shard_first + self._shard_rows, self.first + self.num_rows)
        firsts = np.arange(shard_first, shard_end, self._block_rows)
        blocks = np.stack([firsts, np.minimum(firsts + self._block_rows, shard_end)], axis=1)
        blocks[:, 0] = np.maximum(blocks[:, 0], self.first)
        return blocks[blocks[:, 0] < blocks[:, 1]]

    def _make_windows(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """(first slot of each window, blocks [n, 2] of each window) of an epoch."""
        rng = np.random.default_rng([self._seed, self._number, epoch])
        per_shard = -(-self._shard_rows // self._block_rows)
        group_shards = max(GROUP_SHARDS, -(-WINDOW_BLOCKS // per_shard))
        shards = rng.permutation(self._shards)
        windows = []
        for first in range(0, len(shards), group_shards):
            group = np.concatenate([self._blocks(int(shard)) for shard in shards[first : first + group_shards]])
            blocks = rng.permutation(group)
            windows += [blocks[at : at + WINDOW_BLOCKS] for at in range(0, len(blocks), WINDOW_BLOCKS)]
        sizes = [int((blocks[:, 1] - blocks[:, 0]).sum()) for blocks in windows]
        return np.concatenate([[0], np.cumsum(sizes)])[:-1], windows

    def _make_shuffle(self, epoch: int, number: int) -> np.ndarray:
        blocks = self._windows(epoch)[1][number]
        rng = np.random.default_rng([self._seed, self._number, epoch, number])
        return rng.permutation(int((blocks[:, 1] - blocks[:, 0]).sum()))


class Order:
    """The merged order of a store's forget and retain rows."""

    def __init__(self, manifest: Manifest, seed: int, forget_share: float | None = None) -> None:
        """`forget_share` is the share of forget rows in every stretch of an epoch; None leaves it as stored.

        With a share that is not the stored one, an epoch ends when every row of both subsets has come at least once.
        """
        counts = [manifest.subsets[subset] for subset in SUBSETS]
        firsts = [0, counts[0]]
        self._streams = [
            Stream(number, first, first + count, manifest.shard_rows, manifest.block_rows, seed)
            for number, (first, count) in enumerate(zip(firsts, counts, strict=True))
        ]
        natural = Fraction(counts[0], sum(counts))
        share = natural if forget_share is None else Fraction(forget_share).limit_denominator(10**6)
        if (counts[0] == 0 and share > 0) or (counts[1] == 0 and share < 1):
            raise UserError(
                f"a forget share of {float(share):g} of a store with {counts[0]} forget and {counts[1]} retain rows",
                "leave the share out, or make a store with both subsets",
            )
        self._share = share
        needed = [count / part for count, part in zip(counts, (share, 1 - share), strict=True) if part > 0]
        self.num_slots = max(-(-part.numerator // part.denominator) for part in needed)

    def ranges(self, window: Window) -> np.ndarray:
        """[blocks, 2]: first and end row of the plan of each block of a window. A place counts their rows from 0 on."""
        return self._streams[window.stream].ranges(window)

    def places(self, cursor: Cursor, count: int) -> list[tuple[Window, np.ndarray]]:
        """`count` slots from the cursor on, not beyond the epoch's end: windows and places in their rows."""
        first, end = cursor.slot, min(cursor.slot + count, self.num_slots)
        begin, stop = self._forget(first), self._forget(end)
        per_epoch = self._forget(self.num_slots)
        draws = (
            (cursor.epoch * per_epoch + begin, stop - begin),
            (cursor.epoch * (self.num_slots - per_epoch) + first - begin, (end - first) - (stop - begin)),
        )
        return [part for stream, draw in zip(self._streams, draws, strict=True) for part in stream.take(*draw)]

    def _forget(self, slot: int) -> int:
        """Forget rows among the first `slot` slots of an epoch, rounded to the nearest."""
        return (2 * slot * self._share.numerator + self._share.denominator) // (2 * self._share.denominator)
