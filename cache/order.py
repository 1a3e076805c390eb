"""The order in which rows are read: a function of the seed, the epoch, the shares and the store's row counts alone.

Each subset is a stream: its shards are shuffled and taken in groups; the blocks of a group's shards are shuffled and taken
in windows; the rows of a window's blocks are shuffled. So a reader holds a window, opens each shard once an epoch, and
knows any later row without reading what comes before. The streams are then merged by fixed shares, as evenly as whole
rows allow. A slot is a place in the merged order of an epoch. Rows that are held out have no slot in any epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from duet.cache.errors import UserError
from duet.cache.manifest import Manifest
from duet.cache.record import SUBSETS

WINDOW_BLOCKS = 8  # blocks of up to 4096 positions: some 9 MB at k = 64
GROUP_SHARDS = 8
HOLDOUT_SEED = 0  # whatever the order's seed is


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
    """The rows of subset `number` that are not held out, `num_rows` of them, in an endless order of epochs."""

    def __init__(self, manifest: Manifest, number: int, seed: int, holdout: float) -> None:
        counts = [manifest.subsets.get(subset, 0) for subset in SUBSETS]
        first, end = sum(counts[:number]), sum(counts[: number + 1])
        self.held_out = first + draw_held_out(number, counts[number], holdout)
        self.num_rows = counts[number] - len(self.held_out)
        self._first, self._end, self._number, self._seed = first, end, number, seed
        self._shard_rows, self._block_rows = manifest.shard_rows, manifest.block_rows
        self._shards = np.arange(first // self._shard_rows, -(-end // self._shard_rows) if end > first else 0)
        self._windows = lru_cache(maxsize=2)(self._make_windows)
        self._shuffle = lru_cache(maxsize=2)(self._make_shuffle)

    def take(self, drawn: int, count: int) -> Iterator[tuple[Window, np.ndarray]]:
        """Draws `drawn` to `drawn+count`-1 since the first epoch began: each window with places in its rows."""
        while count > 0:
            epoch, slot = divmod(drawn, self.num_rows)
            starts, _ = self._windows(epoch)
            number = int(np.searchsorted(starts, slot, side="right")) - 1  # of equal starts the last: it is not empty
            places = self._shuffle(epoch, number)[slot - int(starts[number]) :][:count]
            yield Window(self._number, epoch, number), places
            drawn, count = drawn + len(places), count - len(places)

    def ranges(self, window: Window) -> np.ndarray:
        """See `Order.ranges`."""
        return self._windows(window.epoch)[1][window.number]

    def _blocks(self, shard: int) -> np.ndarray:
        """[blocks, 2]: first and end row of each block of a shard, as far as they are this stream's."""
        shard_first = shard * self._shard_rows
        shard_end = min(shard_first + self._shard_rows, self._end)
        firsts = np.arange(shard_first, shard_end, self._block_rows)
        blocks = np.stack([firsts, np.minimum(firsts + self._block_rows, shard_end)], axis=1)
        blocks[:, 0] = np.maximum(blocks[:, 0], self._first)
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
        sizes = [int(np.diff(self._kept_before(blocks)).sum()) for blocks in windows]
        return np.concatenate([[0], np.cumsum(sizes)])[:-1], windows

    def _make_shuffle(self, epoch: int, number: int) -> np.ndarray:
        """Places of a window's rows, but of those held out, in the order in which they come."""
        rows = np.concatenate([np.arange(*block) for block in self._windows(epoch)[1][number].tolist()])
        rng = np.random.default_rng([self._seed, self._number, epoch, number])
        return rng.permutation(np.flatnonzero(self._kept_before(rows + 1) > self._kept_before(rows)))

    def _kept_before(self, rows: np.ndarray) -> np.ndarray:
        """How many rows of the plan before each of these are not held out of this stream."""
        return rows - np.searchsorted(self.held_out, rows)


def check_alike(manifests: Mapping[str, Manifest]) -> None:
    """Refuse stores, by a name that the user knows, that cannot be read side by side: the same order needs the same plan."""
    (first, expected), *others = manifests.items()
    for name, manifest in others:
        for key in ("subsets", "shard_rows", "block_rows", "top_k"):
            if getattr(manifest, key) != getattr(expected, key):
                raise UserError(
                    f"the stores of {first} and {name} differ in {key}: {getattr(expected, key)} and {getattr(manifest, key)}",
                    "make both with one config; where one of them is another run's, in a folder of their own: store.dir",
                )


def draw_held_out(number: int, count: int, holdout: float) -> np.ndarray:
    """int64, ascending: which of the `count` rows of subset `number` are held out; of some at least one, never all.

    UserError where there is but one row and some are to be held out.
    """
    if holdout == 0 or count == 0:
        return np.empty(0, np.int64)
    if count == 1:
        raise UserError(
            f"a share of {holdout:g} of the {SUBSETS[number]} rows cannot be held out: there is only 1",
            f"hold out 0, or make a store with more {SUBSETS[number]} rows",
        )
    size = min(max(1, rounded(count * as_fraction(holdout))), count - 1)
    return np.sort(np.random.default_rng([HOLDOUT_SEED, number]).choice(count, size, replace=False))


def as_fraction(share: float) -> Fraction:
    """The share as it was written: 0.1 is 1/10."""
    return Fraction(share).limit_denominator(10**6)


def rounded(number: Fraction) -> int:
    """To the nearest, halves up."""
    return math.floor(number + Fraction(1, 2))


class Order:
    """The merged order of a store's rows, but for those held out.

    `held_out` are the plan's numbers of these, int64, ascending.
    """

    def __init__(self, manifest: Manifest, seed: int, forget_share: float | None = None, holdout: float = 0.0) -> None:
        """`forget_share` is the share of forget rows in every stretch of an epoch; None leaves it as stored.

        The rest is of the other subsets, in proportion of their rows. With a share that is not the stored one, an epoch
        ends when every row of all subsets has come at least once.
        `holdout`, at least 0 and below 1, is the share of each subset's rows that never come. Which these are depends on
        it and on the row counts, not on the seed: runs with different seeds can be compared on the same rows.
        """
        self._streams = [Stream(manifest, number, seed, holdout) for number in range(len(SUBSETS))]
        self.held_out = np.concatenate([stream.held_out for stream in self._streams])
        counts = [stream.num_rows for stream in self._streams]
        others = sum(counts[1:])
        share = Fraction(counts[0], sum(counts)) if forget_share is None else as_fraction(forget_share)
        if (counts[0] == 0 and share > 0) or (others == 0 and share < 1):
            rows = ", ".join(f"{count} {subset}" for subset, count in zip(SUBSETS, counts, strict=True))
            raise UserError(
                f"a forget share of {float(share):g} of a store with rows: {rows}",
                "leave the share out, or make a store with forget rows and others",
            )
        self._share = share
        self._retain_share = Fraction(counts[1], others or 1)  # of the rows that are not forget rows
        needed = [count / part for count, part in ((counts[0], share), (others, 1 - share)) if part > 0]
        self.num_slots = max(-(-part.numerator // part.denominator) for part in needed)

    def ranges(self, window: Window) -> np.ndarray:
        """[blocks, 2]: first and end row of the plan of each block of a window. A place counts their rows from 0 on."""
        return self._streams[window.stream].ranges(window)

    def draw(self, cursor: Cursor, count: int) -> list[tuple[Window, np.ndarray]]:
        """`count` slots from the cursor on, not beyond the epoch's end: windows and places in their rows."""
        first, end = cursor.slot, min(cursor.slot + count, self.num_slots)
        each = zip(self._streams, self._before(first), self._before(end), self._before(self.num_slots), strict=True)
        return [
            part
            for stream, begin, stop, per_epoch in each
            for part in stream.take(cursor.epoch * per_epoch + begin, stop - begin)
        ]

    def _before(self, slot: int) -> tuple[int, int, int]:
        """Rows of each subset among the first `slot` slots of an epoch."""
        forget = rounded(slot * self._share)
        retain = rounded((slot - forget) * self._retain_share)
        return forget, retain, slot - forget - retain
