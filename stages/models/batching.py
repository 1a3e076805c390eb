"""Sequences of like length together, so that little of what a model reads is padding: for engines and students."""

from __future__ import annotations

import numpy as np

BATCH_TOKENS = 2**15  # of one batch, with all its answers: keys and values of 4 GiB for Llama-3-8B in bfloat16


def cut_by_length(lengths: np.ndarray, max_padding: float, pass_tokens: int) -> list[np.ndarray]:
    """Rows by length, ascending, cut into the fewest groups in which at most `max_padding` of all tokens is padding.

    A group that would hold more than `pass_tokens` tokens, padding included, is cut further, down to one row at least.
    """
    order = np.argsort(lengths, kind="stable")
    groups = []
    for group in np.split(order, _fewest_cuts(lengths[order], max_padding)):
        most = max(1, pass_tokens // int(lengths[group[-1]]))
        groups += np.array_split(group, -(-len(group) // most))
    return groups


def _fewest_cuts(ascending: np.ndarray, max_padding: float) -> list[int]:
    """Where to cut ascending lengths. Exact, by dynamic programming over the distinct lengths."""
    distinct, counts = np.unique(ascending, return_counts=True)
    ends = np.cumsum(counts)  # rows up to and including each length
    allowed = ascending.sum() / (1 - max_padding) if max_padding < 1 else np.inf
    # tokens[i, j]: of one group with lengths i to j; least[j]: of the cheapest groups so far that end with length j
    tokens = np.where(np.arange(len(distinct))[:, None] <= np.arange(len(distinct)), 0.0, np.inf)
    tokens += distinct[None, :] * (ends[None, :] - (ends - counts)[:, None])
    least, choices = tokens[0], []
    while least[-1] > allowed * (1 + 1e-12):
        with_one_more = least[:-1, None] + tokens[1:]
        choices.append(np.argmin(with_one_more, axis=0))
        least = with_one_more[choices[-1], np.arange(len(distinct))]
    cuts, last = [], len(distinct) - 1
    for choice in reversed(choices):
        last = int(choice[last])
        cuts.append(int(ends[last]))
    return cuts[::-1]


def rows_that_fit(tokens: int, most_rows: int) -> int:
    """Rows of a batch in which each has that many tokens, its answer with it: at most `most_rows`, at least one."""
    return max(1, min(most_rows, BATCH_TOKENS // tokens))
