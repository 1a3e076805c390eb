"""What the engine transformers keeps of its steps: ids and logits of every position, and each response once it is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from duet.stages.engines.interface import Ask, Request, Scored
from duet.stages.engines.topk import drawn_ids, named_ids, top_k


class Collected:
    """Top-k of every step, until the rows of a batch are asked for."""

    def __init__(self, ask: Ask, num_ids: int, requests: Sequence[Request]) -> None:
        self._ask, self._num_ids, self._requests = ask, num_ids, requests
        # Of each: rows, tokens, ids, logits, log-sum-exps, draws; None: not asked for.
        self._steps: list[list[np.ndarray | None]] = []

    def __call__(
        self, rows: np.ndarray, positions: np.ndarray, tokens_B: torch.Tensor, logits_BV: torch.Tensor
    ) -> None:
        ask, num_ids, draws = self._ask, self._num_ids, None
        ids, values, sums = top_k(logits_BV, ask.top_k if ask.ids == "top_k" else 1, num_ids, ask.logsumexp)
        asked = [self._requests[row] for row in rows]
        if ask.ids == "sampled":
            seeds = [request.seed or 0 for request in asked]
            ids, values, draws = drawn_ids(logits_BV, ask.top_k, num_ids, seeds, positions.tolist())
        elif ask.ids == "given":
            named = [r.named_ids[min(at, len(r.named_ids) - 1)] for r, at in zip(asked, positions, strict=True)]
            ids, values = named_ids(logits_BV, ask.top_k, num_ids, named)
        found = (tokens_B.int(), ids, values, sums, draws)
        self._steps.append([rows, *(None if tensor is None else tensor.cpu().numpy() for tensor in found)])

    def results(self) -> Iterator[tuple[int, Scored]]:
        """(row, its response), in the order of the rows: step by step to row by row."""
        columns = [None if column[0] is None else np.concatenate(column) for column in zip(*self._steps, strict=True)]
        rows = columns[0]
        assert rows is not None
        order = np.argsort(rows, kind="stable")
        starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
        for at in np.split(order, starts[1:]):
            found: list[Any] = [None if column is None else column[at] for column in columns[1:]]
            yield int(rows[at[0]]), Scored(*found)
