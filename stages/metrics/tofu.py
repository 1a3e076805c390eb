"""TOFU's metrics (Maini et al. 2024, arXiv 2401.06121) as pure functions of per-item numbers; no model, no files.

Throughout, the log-probability of an answer is the mean over its tokens, the end of the sequence among them, of the natural
log of the token's probability after the question and the answer before it: minus the loss that TOFU's own logs hold.
`exam/reading.py` gets them from models, `evaluate/tofu.py` puts a run's together. Both published variants of the truth ratio
are here because they differ: the authors' aggregation script and open-unlearning average losses ("geo"), the paper's formula
averages probabilities ("arith").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from duet.stages.metrics.metric import Metric

VARIANTS = ("geo", "arith")
CONFIDENCE = 0.95


def probability(answer_N: np.ndarray) -> np.ndarray:
    """Per item, the probability of an answer per token, from its log-probability."""
    return np.exp(answer_N)


def choice_probability(answer_N: np.ndarray, wrong: list[np.ndarray]) -> np.ndarray:
    """Per item, the right answer's share of the probability of all options.

    From log-probabilities, of the right answer and of each item's wrong ones.
    """
    logs = zip(answer_N, wrong, strict=True)
    return np.array([1 / (1 + np.exp(options - right).sum()) for right, options in logs])


def truth_ratio_geo(right_N: np.ndarray, wrong: list[np.ndarray]) -> np.ndarray:
    """R per item with the mean of losses over the wrong answers, from log-probabilities."""
    return np.exp(np.array([options.mean() for options in wrong]) - right_N)


def truth_ratio_arith(right_N: np.ndarray, wrong: list[np.ndarray]) -> np.ndarray:
    """R per item with the mean of probabilities over the wrong answers, from log-probabilities."""
    return np.array([np.exp(options - right).mean() for right, options in zip(right_N, wrong, strict=True)])


def truth_ratios(variant: str, right_N: np.ndarray, wrong: list[np.ndarray]) -> np.ndarray:
    """R per item in one of VARIANTS."""
    return {"geo": truth_ratio_geo, "arith": truth_ratio_arith}[variant](right_N, wrong)


def truth_ratio_score(ratio_N: np.ndarray, expect: str) -> np.ndarray:
    """What a truth ratio is worth, 0..1 per item: near 1 is best on a set to be forgotten, near 0 on any other."""
    if expect == "forgotten":
        with np.errstate(divide="ignore"):
            return np.minimum(ratio_N, 1 / ratio_N)
    return np.maximum(0, 1 - ratio_N)


def model_utility(components: Iterable[float]) -> float:
    """The harmonic mean of components that are not negative; 0 where one of them is 0."""
    values = np.array(list(components), np.float64)
    return float(len(values) / np.sum(1 / values)) if (values > 0).all() else 0.0


@dataclass(frozen=True)
class ForgetQuality:
    """A two-sample Kolmogorov-Smirnov test."""

    ks: float  # largest distance between the two distribution functions
    p: float
    n: int
    n_reference: int
    ks_ci95: tuple[float, float]
    p_ci95: tuple[float, float]


def forget_quality(
    ratio_N: np.ndarray, reference_M: np.ndarray, method: Literal["auto", "exact", "asymp"] = "auto"
) -> ForgetQuality:
    """The test between the truth ratios of a model and those of one that never saw the forget set.

    The interval of ks holds where items are independent: each distribution function lies within sqrt(ln(2/a) / 2n) of the
    true one with probability 1 - a (Dvoretzky, Kiefer, Wolfowitz; Massart 1990), here a = 2.5 % for each of the two. The
    interval of p is what the asymptotic formula gives at its ends. `method` is scipy's; auto is exact up to 10,000 items.
    """
    from scipy.special import kolmogorov
    from scipy.stats import ks_2samp

    n, m = len(ratio_N), len(reference_M)
    found = ks_2samp(ratio_N, reference_M, method=method)
    ks, p = float(found.statistic), float(found.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    reach = sum(np.sqrt(np.log(4 / (1 - CONFIDENCE)) / (2 * count)) for count in (n, m))
    low, high = max(0.0, ks - reach), min(1.0, ks + reach)
    p_at = [float(kolmogorov(np.sqrt(n * m / (n + m)) * end)) for end in (high, low)]
    return ForgetQuality(ks, p, n, m, (low, high), (p_at[0], p_at[1]))


_AS_A_SCORE = (
    "the probability of the paraphrased right answer, or of the reference where there is no paraphrase. As a score: "
    "min(R, 1/R) on a set to be forgotten, max(0, 1 - R) on one to be kept."
)
_UTILITY = (
    "TOFU's model utility: the harmonic mean of nine numbers, which are probability, ROUGE-L recall and truth ratio on the "
    "retain set, real authors and world facts; on the last two the probability is that of the right choice. 0 where one of "
    "them is 0. The interval resamples the items of each set. `tofu.model_utility` has the truth ratio `geo`, "
    "`tofu.model_utility/arith` the other."
)
_QUALITY = (
    "TOFU's forget quality: the p-value of a two-sided Kolmogorov-Smirnov test between the truth ratios on the forget set "
    "and those of a model that never saw it (arXiv 2401.06121). `ks` is the statistic. p falls with n whatever the model "
    "does, so read it with ks and n; a high p may only mean that there are few questions. `tofu.forget_quality` has the truth "
    "ratio `geo`, `tofu.forget_quality/arith` the other."
)
METRICS = (
    Metric(
        "tofu.probability",
        probability,
        "Probability of the reference answer, to the power of one over its number of tokens: P(a|q)^(1/|a|), the geometric "
        "mean over the tokens, the end of the sequence among them (arXiv 2401.06121).",
    ),
    Metric(
        "tofu.choice_probability",
        choice_probability,
        "Probability of the right answer of a choice as a share of the sum over all options, each to the power of one over "
        "its number of tokens: TOFU's probability on real authors and world facts, as its own script computes it.",
    ),
    Metric(
        "tofu.truth_ratio/geo",
        truth_ratio_geo,
        "Truth ratio R with the mean of losses over the wrong answers: their geometric mean probability over "
        f"{_AS_A_SCORE} This is what TOFU's own script and open-unlearning compute.",
        better="high",
    ),
    Metric(
        "tofu.truth_ratio/arith",
        truth_ratio_arith,
        f"Truth ratio R with the mean of probabilities over the wrong answers, over {_AS_A_SCORE} This is the formula of the "
        "paper (arXiv 2401.06121).",
        better="high",
    ),
    Metric("tofu.model_utility", model_utility, _UTILITY, better="high", version=2),
    Metric("tofu.model_utility/arith", model_utility, _UTILITY, better="high", version=2),
    Metric("tofu.forget_quality", forget_quality, _QUALITY, better="high"),
    Metric("tofu.forget_quality/arith", forget_quality, _QUALITY, better="high"),
)
