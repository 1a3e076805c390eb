"""Membership inference: can one tell from likelihoods which answers a model was trained on?

Six attacks, each a number per answer that is higher where the answer looks more like a training example, from the
log-probabilities of its tokens after its question. An attack's strength is the AUC: the chance that a random member scores
higher than a random non-member, where equal scores count half (Mann-Whitney). 0.5 tells nothing; well above, the members are
still known; well below, they are shunned, which also tells them apart.

All functions are pure: `exam/reading.py` has a model make the numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score, interval, widened
from duet.stages.models.token_scores import TokenScores

STD_FLOOR = (
    1e-6  # where a distribution is all on one token, its log-probability is its mean, and the difference rounding
)
NEITHER = "0.5; above, members are recognised, below, they are shunned"


def loss(logprobs: np.ndarray) -> float:
    """Mean log-probability of the tokens: minus the loss."""
    return float(logprobs.mean())


def zlib_ratio(logprobs: np.ndarray, text: str) -> float:
    """Mean log-probability of the tokens, divided by the number of bytes that zlib makes of the text."""
    return float(logprobs.mean()) / len(zlib.compress(text.encode()))


def min_k(values: np.ndarray, share: float) -> float:
    """Mean of the lowest values, a share of all; their number is rounded up, and at least one."""
    count = max(1, math.ceil(share * len(values) - 1e-9))  # 0.2 * 5 is a little more than 1
    return float(np.sort(values)[:count].mean())


def min_k_plus(scores: TokenScores, share: float) -> float:
    """`min_k` of the log-probabilities, each standardised under the model's own distribution at its position."""
    return min_k((scores.logprob - scores.mean) / np.maximum(scores.std, STD_FLOOR), share)


def gradient(norm: float) -> float:
    """Minus the Euclidean norm of a gradient."""
    return -norm


def reference(logprobs: np.ndarray, reference_loss: float) -> float:
    """Mean log-probability less the reference model's, `reference_loss`, which is what `loss` gives for that."""
    return loss(logprobs) - reference_loss


def auc(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """Chance that a member scores higher than a non-member, by ranks; equal scores count half."""
    pooled = np.concatenate([members, nonmembers])
    _, number, counts = np.unique(pooled, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[number]  # from 1; equals share their mean rank
    wins = rank[: len(members)].sum() - len(members) * (len(members) + 1) / 2
    return float(wins / (len(members) * len(nonmembers)))


def auc_score(
    members: np.ndarray,
    nonmembers: np.ndarray,
    clusters: tuple[Sequence[object], Sequence[object]] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Score:
    """AUC with its 95 % percentile bootstrap interval; n counts both sets.

    Members and non-members are resampled separately; items of a set with equal cluster labels are drawn together.
    """
    wins_MN = (members[:, None] > nonmembers) + 0.5 * (members[:, None] == nonmembers)

    def ends(labels: tuple[Sequence[object], Sequence[object]]) -> tuple[float, float]:
        rng, drawn = np.random.default_rng(seed), np.empty(resamples)
        numbers = [np.unique([str(label) for label in of_set], return_inverse=True)[1] for of_set in labels]
        for i in range(resamples):
            weight_M, weight_N = (_times_drawn(number, rng) for number in numbers)
            drawn[i] = weight_M @ wins_MN @ weight_N / (weight_M.sum() * weight_N.sum())
        return interval(drawn)

    singles = (range(len(members)), range(len(nonmembers)))
    labels = clusters or singles
    ci95 = widened(ends(labels), lambda: ends(singles), min(len(set(of_set)) for of_set in labels))
    return Score(auc(members, nonmembers), len(members) + len(nonmembers), ci95)


def _times_drawn(cluster_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each item is in one bootstrap sample of whole clusters."""
    count = int(cluster_of.max()) + 1
    return np.bincount(rng.integers(count, size=count), minlength=count)[cluster_of].astype(np.float64)


def privleak(of_model: Score, retrained_auc: float) -> Score:
    """MUSE's PrivLeak from an AUC in which members score high, which is one less MUSE's; its interval is that of the AUC.

    `retrained_auc` is counted in the same way and must be below 1.
    """
    low, high = of_model.ci95
    ends = [(retrained_auc - value) / (1 - retrained_auc) for value in (of_model.value, high, low)]
    return Score(ends[0], of_model.n, (ends[1], ends[2]))


METRICS = (
    Metric(
        "mia.loss",
        loss,
        "AUC of minus the mean negative log-likelihood of the answer's tokens (Yeom et al. 2018, arXiv 1709.01604).",
        better=NEITHER,
    ),
    Metric(
        "mia.zlib",
        zlib_ratio,
        "AUC of minus the mean negative log-likelihood of the answer's tokens, divided by the number of bytes that zlib makes "
        "of its text (Carlini et al. 2021, arXiv 2012.07805).",
        better=NEITHER,
    ),
    Metric(
        "mia.min_k",
        min_k,
        "AUC of the mean log-probability of the least likely tokens of the answer, a share `min_k` of them, one at least "
        "(Min-K% Prob, Shi et al. 2024, arXiv 2310.16789, equation 1).",
        better=NEITHER,
    ),
    Metric(
        "mia.min_k_plus",
        min_k_plus,
        "AUC of the mean of the lowest of (log-probability - mean) / standard deviation, both of the log-probability under "
        "the model's own distribution at that position, a share `min_k` of them (Min-K%++, Zhang et al. 2024, "
        "arXiv 2404.02936).",
        better=NEITHER,
    ),
    Metric(
        "mia.gradient",
        gradient,
        "AUC of minus the Euclidean norm of the gradient, by all weights, of the answer's mean negative log-likelihood "
        "(Wang et al. 2024, arXiv 2402.17012).",
        better=NEITHER,
    ),
    Metric(
        "mia.reference",
        reference,
        "AUC of the answer's mean log-probability less that under a reference model that saw neither set, each with its own "
        "tokenizer (Carlini et al. 2021, arXiv 2012.07805).",
        better=NEITHER,
    ),
    Metric(
        "mia.privleak",
        privleak,
        "MUSE's PrivLeak (arXiv 2407.06460, section 3, C3): (AUC - AUC of the retrained model) / AUC of the retrained model, "
        "for min-k, where AUC is the chance that a NON-member looks more like a training example, as MUSE counts it. Below 0 "
        "the members are still known, above 0 they are shunned. The interval is that of the AUC; the retrained model's is "
        "taken as exact.",
        better="0",
        range="-1 upwards",
    ),
)
