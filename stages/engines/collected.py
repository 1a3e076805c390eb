"""What the engine transformers keeps of its steps: ids and logits of every position, and each response once it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from duet.stages.engines.interface import Ask, Scored
from duet.stages.engines.topk import drawn_ids, top_k


class Collected:
    """Top-k of every step, until the rows of a batch are asked for."""

    def __init__(self, ask: Ask, num_ids: int, seeds: Sequence[int]) -> None:
        self._ask, self._num_ids, self._seeds = ask, num_ids, seeds
        self._steps: list[
            list[np.ndarray | None]
        ] = []  # rows, tokens, ids, logits, log-sum-exps, draws; None: not asked for

    def __call__(
        self, rows: np.ndarray, positions: np.ndarray, tokens_B: torch.Tensor, logits_BV: torch.Tensor
    ) -> None:
        ask, draws = self._ask, None
        ids, values, sums = top_k(logits_BV, 1 if ask.sampled_ids else ask.top_k, self._num_ids, ask.logsumexp)
        if ask.sampled_ids:
            seeds = [self._seeds[row] for row in rows]
            ids, values, draws = drawn_ids(logits_BV, ask.top_k, self._num_ids, seeds, positions.tolist())
        found = (tokens_B.int(), ids, values, sums, draws)
        self._steps.append([rows, *(None if tensor is None else tensor.cpu().numpy() for tensor in found)])

    def results(self) -> Iterator[tuple[int, Scored]]:
        """(row, its response), in the order of the rows: step by step to row by row."""
        rows, *columns = (
            None if column[0] is None else np.concatenate(column) for column in zip(*self._steps, strict=True)
        )
        order = np.argsort(rows, kind="stable")
        starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
        for at in np.split(order, starts[1:]):
            yield int(rows[at[0]]), Scored(*(None if column is None else column[at] for column in columns))
