"""The targets of a batch: the rows of one or several teachers' stores, brought together.

The stores hold the same rows, so the order, which depends on seed, epoch and row counts only, gives the same queries of each.
`mix` keeps every teacher's rows, each with its teacher's weight; `average` makes one target per position of them. With one
teacher a mix is the store as it is. Between the reader (`cache/reader.py`) and the forward passes (`passes.py`).

Shapes: T teachers, Q queries, R rows (of a mix T*Q, else Q), S tokens of all rows, N supervised positions of all rows, K ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duet.cache.codec import Block
from duet.cache.errors import UserError
from duet.cache.manifest import Manifest
from duet.cache.order import Cursor, Order, check_alike
from duet.cache.reader import ALONE, START, Rank, Store
from duet.cache.record import counts_of, join_offsets, offsets_of, prompt_and_response
from duet.stages.settings.student import TrainSettings, teacher_weights
from duet.stages.student.summary import TeacherShare

CHECKED_ROWS = 1024  # at once


@dataclass(frozen=True)
class Targets:
    """R rows, each with the content of those of `duet.cache.record.Rows`, but for the ids of `mask_NK`.

    Rows of one `sequence_R` are of one query and have the student read the same tokens: a single forward pass serves them.
    """

    subsets: np.ndarray  # uint8 [R]
    token_offsets: np.ndarray  # int64 [R+1]
    tokens_S: np.ndarray  # int32
    position_offsets: np.ndarray  # int64 [R+1]
    topk_ids_NK: np.ndarray  # int32, by logit, descending; those that do not count are last
    topk_logits_NK: np.ndarray  # float32, finite
    logsumexp_N: np.ndarray | None  # float32
    mask_NK: np.ndarray | None  # bool, which ids count; None: all
    share_NK: np.ndarray | None  # float32, each id's share of its position's draws; None where ids were not drawn
    weight_R: np.ndarray  # float32; those of a query sum to 1
    sequence_R: np.ndarray  # int64, from 0, in the order of their first rows
    row_ids: Sequence[str]


@dataclass(frozen=True)
class Teachers:
    """The stores that a student learns from, by the teachers' names in alphabetical order."""

    stores: dict[str, Store]
    weights: dict[str, float]  # sum 1
    combine: str | None  # "mix" or "average"; None of one teacher
    least_ids: int = 1  # that all must have at a position of an average: `Loss.least_ids` of the student's loss

    @staticmethod
    def of(stores: Mapping[str, Store], settings: TrainSettings) -> Teachers:
        """Those of a run's teachers that the settings name; UserError where they name others or do nothing."""
        weights = teacher_weights(settings, sorted(stores))
        used = {name: stores[name] for name in weights}
        check_alike({name: store.manifest for name, store in used.items()})
        return Teachers(used, weights, (settings.combine or "mix") if len(used) > 1 else None)

    @property
    def manifests(self) -> list[Manifest]:
        return [store.manifest for store in self.stores.values()]

    @property
    def first(self) -> Store:
        """Stands for all where they are the same: the rows that there are."""
        return next(iter(self.stores.values()))

    def order(self, settings: TrainSettings) -> Order:
        return self.first.order(settings.seed, settings.forget_share, settings.probe.holdout if settings.probe else 0.0)

    def batches(
        self, order: Order, batch_size: int, cursor: Cursor = START, rank: Rank = ALONE
    ) -> Iterator[tuple[Cursor, list[Block]]]:
        """As `Store.batches`, with a block of each teacher's store: the same rows of all."""
        each = [store.batches(order, batch_size, cursor, rank) for store in self.stores.values()]
        for parts in zip(*each, strict=True):
            yield parts[0][0], [block for _, block in parts]

    def blocks_of(self, rows: np.ndarray) -> list[Block]:
        """As `Store.block_of`, of each teacher's store."""
        return [store.block_of(rows) for store in self.stores.values()]

    def targets(self, blocks: Sequence[Block]) -> Targets:
        """The student's targets from the same rows of each store."""
        weights = list(self.weights.values())
        return averaged(blocks, weights, self.least_ids) if self.combine == "average" else mixed(blocks, weights)

    def shares(self) -> dict[str, TeacherShare]:
        """Each teacher's store and weight, for training.json."""
        return {
            name: TeacherShare(store.manifest.fingerprint, self.weights[name]) for name, store in self.stores.items()
        }

    def comparable(self) -> dict[str, float]:
        """Of an average: the share of the first teacher's positions that all teachers have, and how many ids they share.

        Reads the stores once; a row without enough common ids is a UserError before any training.
        """
        if self.combine != "average":
            return {}
        positions = ids = 0
        for first in range(0, len(self.first), CHECKED_ROWS):
            rows = np.arange(first, min(first + CHECKED_ROWS, len(self.first)))
            mask_NK = self.targets(self.blocks_of(rows)).mask_NK
            assert mask_NK is not None  # an average has one
            positions, ids = positions + len(mask_NK), ids + int(mask_NK.sum())
        return {"position_share": positions / self.first.manifest.positions, "ids_per_position": ids / positions}


def mixed(blocks: Sequence[Block], weights: Sequence[float]) -> Targets:
    """Every teacher's rows, one teacher after the other, of which each counts with its teacher's weight."""
    sums = [block.columns["logsumexp"] for block in blocks if "logsumexp" in block.columns]
    shares = [_shares(block) for block in blocks if block.layout.drawn]
    num_queries = len(blocks[0])
    numbers: dict[tuple[int, bytes], int] = {}
    sequence_R = []
    for block in blocks:
        for query in range(num_queries):
            read = block.tokens_S[block.token_offsets[query] : block.token_offsets[query + 1] - 1]
            sequence_R.append(numbers.setdefault((query, read.tobytes()), len(numbers)))
    return Targets(
        subsets=np.concatenate([block.subsets for block in blocks]),
        token_offsets=join_offsets([block.token_offsets for block in blocks]),
        tokens_S=np.concatenate([block.tokens_S for block in blocks]),
        position_offsets=join_offsets([block.position_offsets for block in blocks]),
        topk_ids_NK=np.concatenate([block.topk_ids() for block in blocks]),
        topk_logits_NK=np.concatenate([block.topk_logits() for block in blocks]),
        logsumexp_N=np.concatenate(sums) if len(sums) == len(blocks) else None,
        mask_NK=None,
        share_NK=np.concatenate(shares) if len(shares) == len(blocks) else None,
        weight_R=np.repeat(np.array(weights, np.float32), num_queries),
        sequence_R=np.array(sequence_R, np.int64),
        row_ids=[row_id for block in blocks for row_id in block.row_ids.to_pylist()],
    )


def averaged(blocks: Sequence[Block], weights: Sequence[float], least_ids: int = 1) -> Targets:
    """One target per position: the weighted mean of the teachers' logits at the ids that all of them kept there.

    Position j is there as long as all teachers have it after the same r_0..r_{j-1} and have kept `least_ids` common ids at
    each position up to it. UserError for a row with fewer at its first position.
    """
    first = blocks[0]
    counts_R = np.min([_agreeing(first, block) for block in blocks], axis=0)
    at_TN = [_ranges(block.position_offsets[:-1], counts_R) for block in blocks]
    ids_NK, mean_NK, mask_NK = _means(
        [block.topk_ids()[at_N] for block, at_N in zip(blocks, at_TN, strict=True)],
        [block.topk_logits()[at_N] for block, at_N in zip(blocks, at_TN, strict=True)],
        weights,
        first.layout.vocab_size,
    )
    kept_R, kept_N = _before_the_first_without(mask_NK.sum(axis=1) >= least_ids, counts_R)
    if not kept_R.all():
        row_id = first.row_ids[int((kept_R == 0).argmax())].as_py()
        raise UserError(
            f"row {row_id!r}: the teachers have fewer than {least_ids} of their {first.layout.top_k} ids in common at the "
            f"first position, {'nothing can be averaged' if least_ids == 1 else 'and this loss compares ids with each other'}",
            "set train.combine: mix, or make stores with a larger teacher.top_k",
        )
    prompts_R = counts_of(first.token_offsets) - counts_of(first.position_offsets)
    return Targets(
        subsets=first.subsets,
        token_offsets=offsets_of(prompts_R + kept_R),
        tokens_S=first.tokens_S[_ranges(first.token_offsets[:-1], prompts_R + kept_R)],
        position_offsets=offsets_of(kept_R),
        topk_ids_NK=ids_NK[kept_N],
        topk_logits_NK=mean_NK[kept_N],
        logsumexp_N=None,
        mask_NK=mask_NK[kept_N],
        share_NK=None,
        weight_R=np.ones(len(first), np.float32),
        sequence_R=np.arange(len(first)),
        row_ids=first.row_ids.to_pylist(),
    )


def _shares(block: Block) -> np.ndarray:
    return (block.columns["draws"] / np.float32(block.layout.top_k - 1)).astype(np.float32)


def _agreeing(a: Block, b: Block) -> np.ndarray:
    """int64 [Q]: positions that both have after the same response tokens; the first is always one."""
    counts = []
    for row in range(len(a)):
        (_, response_a), (_, response_b) = prompt_and_response(a, row), prompt_and_response(b, row)
        shorter = min(len(response_a), len(response_b))
        differing = np.flatnonzero(response_a[: shorter - 1] != response_b[: shorter - 1])
        counts.append(int(differing[0]) + 1 if len(differing) else shorter)
    return np.array(counts, np.int64)


def _means(
    ids_TNK: Sequence[np.ndarray], logits_TNK: Sequence[np.ndarray], weights: Sequence[float], vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, mean logits, which of them all teachers kept), each [N, K]: by mean, descending, with the common ids first.

    The logits of the others are 0. Computed in float64.
    """
    ids_NK = ids_TNK[0]
    base_N1 = np.arange(len(ids_NK))[:, None] * vocab_size  # makes an id at a position a number of its own
    mean_NK, mask_NK = weights[0] * logits_TNK[0].astype(np.float64), np.ones(ids_NK.shape, bool)
    for their_ids, their_logits, weight in zip(ids_TNK[1:], logits_TNK[1:], weights[1:], strict=True):
        order = np.argsort((base_N1 + their_ids).ravel(), kind="stable")
        numbers, wanted = (base_N1 + their_ids).ravel()[order], (base_N1 + ids_NK).ravel()
        at = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
        mask_NK &= (numbers[at] == wanted).reshape(mask_NK.shape)
        mean_NK += weight * their_logits.ravel()[order][at].astype(np.float64).reshape(mean_NK.shape)
    by_mean_NK = np.argsort(np.where(mask_NK, -mean_NK, np.inf), axis=1, kind="stable")
    ids_NK, mean_NK, mask_NK = (np.take_along_axis(a, by_mean_NK, axis=1) for a in (ids_NK, mean_NK, mask_NK))
    return ids_NK, np.where(mask_NK, mean_NK, 0).astype(np.float32), mask_NK


def _before_the_first_without(has_N: np.ndarray, counts_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions of each row before the first that has none, which positions these are as bool [N])."""
    row_N = np.repeat(np.arange(len(counts_R)), counts_R)
    lacking_N = np.cumsum(~has_N)
    before_R = np.concatenate([[0], lacking_N])[offsets_of(counts_R)[:-1]]
    kept_N = lacking_N == before_R[row_N]
    return np.bincount(row_N[kept_N], minlength=len(counts_R)), kept_N


def _ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers `first` to `first + count - 1` of each, one after the other."""
    return np.repeat(firsts - offsets_of(counts)[:-1], counts) + np.arange(counts.sum())
