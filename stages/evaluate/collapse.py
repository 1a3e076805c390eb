"""Signs of a broken model: it refuses everything, says nothing, loops, babbles, or knows no more than knowing nothing would.

Pure functions of answers and scores, read by `verdict.py`. Every sign is one number with a limit (`evaluate.outcome`), and
looks at questions to be kept, where a good student answers as its base does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet.stages.exam.exam import Exam
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.refusals import refusals
from duet.stages.metrics.uncertainty import Score
from duet.stages.metrics.words import has_word, split_words
from duet.stages.settings.evaluate import OutcomeSettings

Texts = Sequence[str]
NGRAM = 8  # characters


@dataclass(frozen=True)
class Sign:
    """One number that shows whether a model is broken, and its limit."""

    value: float
    limit: float
    bad: bool
    text: str  # the finding in words

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "limit": self.limit, "bad": self.bad}


@dataclass(frozen=True)
class ModelAnswers:
    """What is known of one model; base's own is of the same form."""

    answers: Mapping[str, Sequence[str]]  # by set, in query order
    scores: Mapping[str, Score]  # by metric id
    not_finite: int | None = None  # questions or documents without a finite likelihood; None: nothing was read


def signs_of(model: ModelAnswers, base: ModelAnswers, exam: Exam, utility: Sequence[float]) -> dict[str, Sign]:
    """The signs by their id; `utility` are the shares of base's score above the floor that are left of the sets to be kept.

    All but utility and membership compare the answers to all questions to be kept with base's to the same.
    """
    limits = exam.settings.outcome
    names = [name for name, query_set in exam.judged.items() if query_set.expect == "kept"]
    mine, theirs = ([text for name in names for text in who.answers[name]] for who in (model, base))
    signs: dict[str, Sign] = {}
    if mine:
        signs["refusals"] = _refusals(mine, theirs, limits, exam.settings.refusal_patterns)
        signs["empty"] = _empty(mine, theirs, limits)
        signs["repetition"] = _repetition(mine, theirs, limits)
        signs["entropy"] = _entropy(mine, theirs, limits)
        signs["length"] = _length(mine, theirs, limits)
    if utility:
        signs["utility"] = _utility(utility, limits)
    if model.not_finite is not None:
        signs["not_finite"] = _not_finite(model.not_finite)
    if away := {key: score for key, score in model.scores.items() if re.match(r"mia\.(?!privleak)", key)}:
        signs["membership"] = _membership(away, limits)
    return signs


def _refusals(mine: Texts, theirs: Texts, limits: OutcomeSettings, patterns: Sequence[str]) -> Sign:
    """Refusals of questions to be kept, less base's."""
    now, before = (float(refusals(texts, patterns).mean()) for texts in (mine, theirs))
    return _at_most(now - before, limits.max_refusals, f"refuses {_pair(now, before)} of the questions to be kept")


def _empty(mine: Texts, theirs: Texts, limits: OutcomeSettings) -> Sign:
    """Answers without a letter or digit, less base's."""
    now, before = (float(np.mean([not has_word(text) for text in texts])) for texts in (mine, theirs))
    return _at_most(now - before, limits.max_empty, f"has no word for {_pair(now, before)} of the questions to be kept")


def _repetition(mine: Texts, theirs: Texts, limits: OutcomeSettings) -> Sign:
    """How much answers repeat themselves, less base's."""
    now, before = repetition(mine), repetition(theirs)
    return _at_most(now - before, limits.max_repetition, f"repeats itself in {_pair(now, before)} of an answer")


def _entropy(mine: Texts, theirs: Texts, limits: OutcomeSettings) -> Sign:
    """How far the entropy of the answers' words is from base's."""
    now, before = entropy(mine), entropy(theirs)
    change = abs(now - before) / before if before else float(now > 0)
    text = f"the words of its answers have an entropy of {now:.2f} bits, base's {before:.2f}"
    return _at_most(change, limits.max_entropy_change, text)


def _length(mine: Texts, theirs: Texts, limits: OutcomeSettings) -> Sign:
    """The mean length of an answer as a factor of base's."""
    now, before = (float(np.mean([max(1, len(text)) for text in texts])) for texts in (mine, theirs))
    text = f"its answers have {now:.1f} characters on average, base's {before:.1f}"
    return _at_most(max(now / before, before / now), limits.max_length_factor, text)


def _utility(shares: Sequence[float], limits: OutcomeSettings) -> Sign:
    """The mean of the shares of base's score above the floor."""
    value = float(np.mean(shares))
    text = f"{100 * value:.1f} % of base's score above the floor is left on the sets to be kept"
    return Sign(value, limits.min_utility, value < limits.min_utility, text)


def _not_finite(count: int) -> Sign:
    """The number of questions, or documents, without a finite likelihood."""
    return _at_most(
        count,
        0,
        f"finds no finite likelihood for the texts of {count} questions or documents: its weights have diverged",
    )


def _membership(scores: Mapping[str, Score], limits: OutcomeSettings) -> Sign:
    """The largest sure distance of a membership AUC from 0.5."""
    away = {key: max(0.0, score.ci95[0] - 0.5, 0.5 - score.ci95[1]) for key, score in scores.items()}
    key = max(away, key=lambda key: away[key])
    low, high = scores[key].ci95
    text = f"{key}: membership AUC {scores[key].value:.2f} [{low:.2f}, {high:.2f}], where 0.50 tells nothing"
    return _at_most(away[key], limits.max_membership, text)


def _at_most(value: float, limit: float, text: str) -> Sign:
    return Sign(value, limit, value > limit, text)


def _pair(now: float, before: float) -> str:
    return f"{100 * now:.1f} % (base {100 * before:.1f} %)"


def repetition(texts: Texts) -> float:
    """Mean over texts of the share of 8-character sequences that stood in the same text before; 0 for a shorter one."""
    shares = []
    for text in texts:
        grams = [text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares))


def entropy(texts: Texts) -> float:
    """Shannon entropy, in bits, of the distribution of all texts' words, whatever their case; 0 without any."""
    counts = np.array(list(Counter(word for text in texts for word in split_words(text)).values()), np.float64)
    shares = counts / counts.sum() if len(counts) else counts
    return abs(float((shares * np.log2(shares)).sum()))


METRICS = (
    Metric(
        "sign.refusals",
        _refusals,
        "Share of the questions to be kept that are refused, less base's share.",
        better="low",
        version=2,
        range="-1 to 1",
    ),
    Metric(
        "sign.empty",
        _empty,
        "Share of the answers to questions to be kept that are without a letter or digit, less base's share.",
        better="low",
        range="-1 to 1",
    ),
    Metric(
        "sign.repetition",
        _repetition,
        "Share of an answer's 8-character sequences that stood in it before, mean over the answers to questions to be kept, "
        "less base's: seq-rep-n (Welleck et al. 2020, arXiv 1908.04319), one less distinct-n (Li et al. 2016, "
        "arXiv 1510.03055), over characters instead of words, so that it sees loops without spaces too.",
        better="low",
        range="-1 to 1",
    ),
    Metric(
        "sign.entropy",
        _entropy,
        "Entropy, in bits, of the distribution of the words of all answers to questions to be kept; the value is how far it "
        "is from base's, as a share of base's. One answer to everything lowers it, babble raises it.",
        better="low",
        version=2,
        range="0 upwards",
    ),
    Metric(
        "sign.length",
        _length,
        "Mean number of characters of an answer to a question to be kept, as a factor of base's, upwards or downwards. An "
        "answer without any counts as one character.",
        better="low",
        range="1 upwards",
    ),
    Metric(
        "sign.utility",
        _utility,
        "Share of base's score above the floor that is left, mean over the sets to be kept on which base is above the floor. "
        "At 0 the model scores what knowing nothing scores.",
        better="high",
        version=2,
        range="up to 1 and, of a model better than base, above",
    ),
    Metric(
        "sign.not_finite",
        _not_finite,
        "Number of questions, of all sets, with an answer whose log-probability per token is not a finite number, or is below "
        "-700. Where there is none, the largest number of such questions or documents in choices, membership attacks or "
        "neutral text. Above 0 the weights have diverged, and those texts give the model no scores.",
        better="low",
        version=2,
        range="0 upwards",
    ),
    Metric(
        "sign.membership",
        _membership,
        "By how much, at least, the AUC of some membership attack is away from 0.5: from that end of its 95 % interval that "
        "is nearer. Above 0.5 the model still recognises what it was trained on, below it shuns it so much that one can tell "
        'what was to be forgotten. A model that refuses on purpose may show that, so it does not make a model "broken"; it '
        'rules out the verdict "suppressed".',
        better="low",
        range="0 to 0.5",
    ),
)
