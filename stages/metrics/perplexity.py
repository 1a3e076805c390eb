"""Perplexity on neutral text: does the model still speak, whatever it says about the topic?"""

from __future__ import annotations

import numpy as np

from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score, interval

METRIC = "neutral.perplexity"


def windows(ids: list[int], in_front: list[int], context: int) -> list[tuple[list[int], list[int]]]:
    """(what is only read, what is predicted) pairs that cover a document in the fewest windows of the context.

    With nothing in front, a window's first token is only read. A document of one token has none to predict then.
    """
    size = context - len(in_front)
    parts = [ids[first : first + size] for first in range(0, len(ids), size)]
    pairs = [(in_front, part) if in_front else (part[:1], part[1:]) for part in parts]
    return [pair for pair in pairs if pair[1]]


def perplexity(losses: np.ndarray, tokens: np.ndarray, seed: int = 0, resamples: int = 2000) -> Score:
    """exp of the summed losses over the summed tokens of all documents, with the interval of resampled documents.

    `losses` are each document's summed negative log-likelihoods in nats, `tokens` how many they are of, float64 or int [n].
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(losses), size=(resamples, len(losses)))
    ci95 = interval(np.exp(losses[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)))
    return Score(float(np.exp(losses.sum() / tokens.sum())), len(losses), ci95)


METRICS = (
    Metric(
        METRIC,
        perplexity,
        "exp of the mean negative log-likelihood per token of all documents of the neutral text, so that a document weighs by "
        "its tokens. n counts documents. Interval: documents are drawn with replacement, each with all its tokens, and the "
        "token-weighted mean is taken again. A document that is longer than the context is read in windows that do not "
        "overlap. A document's first token counts where something stands in front of it: the beginning-of-sequence token, or "
        "a teacher's prefix, which does not count itself.",
        better="as base's",
        range="1 upwards; 1 is perfect prediction",
    ),
)
