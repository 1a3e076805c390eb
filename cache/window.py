"""The rows of a window, ready to be picked in any order: short ones from a copy in memory, long ones straight from the file.

Copying a window first makes picking short rows one indexed copy instead of many small ones; a long row is worth a copy of
its own, and then is copied once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from duet.cache.codec import Block, Columns, Layout, empty_columns
from duet.cache.record import join_offsets, offsets_of

LONG_ROW = 64  # positions


@dataclass(frozen=True)
class OpenWindow:
    """R rows, each known by its place 0..R-1 in the blocks, one after the other."""

    row_ids: pa.StringArray  # R
    subsets: np.ndarray  # uint8 [R]
    token_offsets: np.ndarray  # int64 [R+1]
    tokens_S: np.ndarray
    position_offsets: np.ndarray  # int64 [R+1]
    blocks: Sequence[Block]
    columns: dict[str, np.ndarray]  # a copy of the blocks'; empty where rows are long
    memory: np.ndarray | None  # what they lie in


def open_window(blocks: Sequence[Block], columns: Columns, memory: np.ndarray | None = None) -> OpenWindow:
    """The rows of all blocks, in order; a copy of short ones lies in `memory` where that is large enough."""
    offsets = join_offsets([block.position_offsets for block in blocks])
    copies: dict[str, np.ndarray] = {}
    if offsets[-1] <= LONG_ROW * (len(offsets) - 1):
        copies, memory = empty_columns(columns, int(offsets[-1]), memory)
        for name, copy in copies.items():
            np.concatenate([block.columns[name] for block in blocks], out=copy)
    return OpenWindow(
        row_ids=pa.concat_arrays([block.row_ids for block in blocks]),
        subsets=np.concatenate([block.subsets for block in blocks]),
        token_offsets=join_offsets([block.token_offsets for block in blocks]),
        tokens_S=np.concatenate([block.tokens_S for block in blocks]),
        position_offsets=offsets,
        blocks=blocks,
        columns=copies,
        memory=memory,
    )


class Recycler:
    """Memory of earlier batches that nothing refers to any more.

    Fresh memory comes from the system page by page, each cleared first. Measured on one core, with k = 64 and batches of 16,384
    positions in rows of 256: an epoch of packed batches takes 7 to 16 % longer without this class, one of padded batches 2 to
    5 %. Two plain buffers in turn would gain the same, but a caller who keeps batches would find them overwritten.
    """

    def __init__(self) -> None:
        self._memories: list[np.ndarray] = [np.empty(0, np.uint8)]
        self._unused = self._references()[0]  # asked, not known: it differs between versions of Python
        self._memories.clear()

    def _references(self) -> list[int]:
        """How often each is referred to; every array that lies in it counts."""
        return [sys.getrefcount(memory) for memory in self._memories]

    def take(self) -> np.ndarray | None:
        """Some of it, if there is any."""
        unused = (number for number, count in enumerate(self._references()) if count == self._unused)
        number = next(unused, None)
        return None if number is None else self._memories[number]

    def add(self, memory: np.ndarray) -> None:
        """What a batch lies in from now on."""
        others = [other for other in self._memories if other is not memory]
        self._memories = [*others[-3:], memory]


def gather(
    picks: Sequence[tuple[OpenWindow, np.ndarray]], layout: Layout, columns: Columns, recycler: Recycler
) -> Block:
    """The rows at these places of each window, one after the other."""
    position_offsets = offsets_of(np.concatenate([_counts(window.position_offsets, at) for window, at in picks]))
    token_offsets = offsets_of(np.concatenate([_counts(window.token_offsets, at) for window, at in picks]))
    targets, memory = empty_columns(columns, int(position_offsets[-1]), recycler.take())
    recycler.add(memory)
    tokens = np.empty(int(token_offsets[-1]), np.int32)
    row = 0
    for window, places in picks:
        end = row + len(places)
        part, text = slice(*position_offsets[[row, end]]), slice(*token_offsets[[row, end]])
        pick = _pick_copied if window.columns else _pick_long
        pick(window, places, {name: target[part] for name, target in targets.items()}, tokens[text])
        row = end
    return Block(
        layout=layout,
        row_ids=pa.concat_arrays([window.row_ids.take(pa.array(places)) for window, places in picks]),
        subsets=np.concatenate([window.subsets[places] for window, places in picks]),
        token_offsets=token_offsets,
        tokens_S=tokens,
        position_offsets=position_offsets,
        columns=targets,
    )


def _pick_copied(window: OpenWindow, places: np.ndarray, targets: dict[str, np.ndarray], tokens_S: np.ndarray) -> None:
    """All rows of a column with one indexed copy."""
    _take(window.tokens_S, _index(window.token_offsets, places), tokens_S)
    index = _index(window.position_offsets, places)
    for name, target in targets.items():
        _take(window.columns[name], index, target)


def _pick_long(window: OpenWindow, places: np.ndarray, targets: dict[str, np.ndarray], tokens_S: np.ndarray) -> None:
    """Each row of a column with a copy of its own."""
    texts = zip(window.token_offsets[places].tolist(), window.token_offsets[places + 1].tolist(), strict=True)
    np.concatenate([window.tokens_S[first:end] for first, end in texts], out=tokens_S)
    first_rows = offsets_of([len(block) for block in window.blocks])
    numbers = np.searchsorted(first_rows, places, side="right") - 1
    before = window.position_offsets[first_rows[numbers]]
    firsts, ends = window.position_offsets[places] - before, window.position_offsets[places + 1] - before
    parts = list(zip(numbers.tolist(), firsts.tolist(), ends.tolist(), strict=True))
    for name, target in targets.items():
        columns = [block.columns[name] for block in window.blocks]
        np.concatenate([columns[number][first:end] for number, first, end in parts], out=target)


def _counts(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return offsets[rows + 1] - offsets[rows]


def _index(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Numbers of all items of these rows, row by row."""
    counts = _counts(offsets, rows)
    return np.repeat(offsets[rows] - offsets_of(counts)[:-1], counts) + np.arange(counts.sum())


def _take(source: np.ndarray, index: np.ndarray, target: np.ndarray) -> None:
    np.take(source, index, axis=0, out=target, mode="clip")
