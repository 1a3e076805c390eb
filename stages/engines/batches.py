"""Which prompts an engine decodes together, and which of them share the computation of what they begin with.

Decoding costs the tokens that are read, padding included, and a fixed price for every forward pass, however few rows it
has. So batches are filled first; prompts go into batches of their own only where what these save in tokens is more than
what their passes cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from duet.stages.models.batching import rows_that_fit

# What a forward pass costs beside its tokens, in tokens. Measured on two CPU cores, a step of one row beside a token among
# many: 42 for a model of Llama's kind with 135 million parameters, 84 with 3 million, 120 with 1 million.
PASS_TOKENS = 64


def by_beginning(prompts: Sequence[Sequence[int]], batch_price: float) -> list[tuple[int, np.ndarray]]:
    """(shared, rows): prompts that begin with the same `shared` tokens, whose keys and values are computed for one of them.

    Prompts share a beginning where that saves more tokens than `batch_price`, which another batch costs. Every prompt keeps
    one token at least that is not shared, for its own logits. Rows are int64 and cover all prompts once.
    """
    order = np.array(sorted(range(len(prompts)), key=lambda row: list(prompts[row])), np.int64)
    ascending = [prompts[row] for row in order]
    lengths = np.array([len(prompt) for prompt in ascending])
    alike = np.array([_alike(a, b) for a, b in pairwise(ascending)], np.int64)
    groups: list[tuple[int, list[np.ndarray]]] = [(0, [])]
    waiting = [(0, len(order), 0)]  # neighbours in that order, and the group that they join unless they share more
    while waiting:
        first, end, group = waiting.pop()
        own, others = lengths[first:end], end - first - 1
        if (own.max() - groups[group][0]) * others <= batch_price:
            groups[group][1].append(order[first:end])
            continue
        between = alike[first : end - 1]
        shared = min(int(between.min()), int(own.min()) - 1)
        if (shared - groups[group][0]) * others > batch_price:
            groups.append((shared, []))
            group = len(groups) - 1
        cuts = [first, *(first + 1 + np.flatnonzero(between == between.min())).tolist(), end]
        waiting += [(a, b, group) for a, b in pairwise(cuts)]
    return [(shared, np.concatenate(rows)) for shared, rows in groups if rows]


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


def filled(lengths: np.ndarray, more: int, most_rows: int, batch_price: float) -> list[np.ndarray]:
    """Rows by length in the batches that cost least; exact, by dynamic programming.

    A batch costs its tokens, all rows padded to the longest, and `batch_price`. It holds `rows_that_fit`, each of `more`
    tokens beside its length.
    """
    order = np.argsort(lengths, kind="stable")
    ascending, count = lengths[order], len(lengths)
    least, starts = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):
        first = max(0, end - rows_that_fit(int(ascending[end - 1]) + more, most_rows))
        prices = least[first:end] + np.arange(end - first, 0, -1) * ascending[end - 1]
        starts[end] = first + int(np.argmin(prices))
        least[end] = prices.min() + batch_price
    batches, end = [], count
    while end:
        batches.append(order[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


def of_one_length(lengths: np.ndarray, more: int, most_rows: int) -> list[np.ndarray]:
    """Rows in batches without any padding; they hold what `filled` lets them hold."""
    order, batches = np.argsort(lengths, kind="stable"), []
    for group in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        most = rows_that_fit(int(lengths[group[0]]) + more, most_rows)
        batches += np.array_split(group, -(-len(group) // most))
    return batches


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 [B, T], with padding on the left, so that the last column is every row's last token."""
    width = max(map(len, rows))
    ids_BT, mask_BT = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, ids in enumerate(rows):
        ids_BT[row, width - len(ids) :] = torch.tensor(list(ids))
        mask_BT[row, width - len(ids) :] = 1
    return ids_BT, mask_BT
