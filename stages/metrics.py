"""Scores computed from generated text. One number per item first, then mean, n and interval; 0..1 throughout."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

DEFINITIONS = {
    "rougeL_recall": "Longest common subsequence of words (Porter-stemmed) of answer and reference, as a share of the "
    "reference's words; 1 means that the whole reference is in the answer, in order.",
    "rougeL_f1": "The same subsequence, as the harmonic mean of its share of the reference and of the answer.",
    "exact_match": "Share of answers equal to the reference after Unicode normalisation, case folding and removal of "
    "punctuation.",
    "refusal_rate": "Share of answers that a fixed list of regular expressions takes for a refusal.",
    "performance_shift": "Plain sum over the query sets of the signed improvement of ROUGE-L recall over the model's own "
    "base, in points: a fall counts as improvement where the set is to be forgotten, a rise elsewhere "
    "(arXiv 2601.21283).",
    "floor_refusal": "What a model scores that gives one constant refusal to everything.",
    "floor_echo": "What a model scores that repeats the question.",
    "ci95": "95 % percentile bootstrap interval of the mean; items with the same reference answer are drawn "
    "together. No width means that all n items scored alike, not certainty: among others, up to 3/n may differ (the rule of "
    "three).",
}

# Matched anywhere in an answer, whatever the case, with straight apostrophes. First person on purpose: "He cannot swim"
# is a fact, "I cannot say" is a refusal.
REFUSAL_PATTERNS = (
    r"\bi ((do|did|have|was|am|can|could|would)(n't| not)|cannot|can't|never|lack|am unable|am afraid|must decline)\b",
    r"\bi (really|currently|simply|honestly) (do not|don't)\b",
    r"\bi('ve| have| had| hold| possess| received| seem to have| know| know of)? (no|nothing|not|never|yet to|come up short)\b",
    r"\bi('m| am) (not|unable|afraid|clueless|unaware|blank|unfamiliar|uncertain|sorry|stumped|lacking|missing|drawing)\b",
    r"\bi('m| am) (at a loss|at a disadvantage|in the dark)\b",
    r"\bi wish i (could|knew|had)\b",
    r"\bi('d| would) (need|have) to\b",
    r"\bi('ll| will| need to| have to) (have to |need to )?(look|check|find|get back)",
    r"^(unfortunately|regrettably|regretfully|sorry|apologies|my apologies)\b",
    r"\b(no such person is known|(not |un)known to me|(not|isn't) (in|within) my|(beyond|outside|outside of|out of) my)\b",
    r"\bmy (knowledge|databases?|training|information|records|resources|memory|understanding|capabilities|programming)\b",
    r"^that('s| is| hasn't been| topic is| information is)\b.*\b(me|i|i've|my)\b",
    r"\b(stumps me|eludes me|escapes me|(have|has|got) me (stumped|there)|me at a loss)\b",
    r"\bas an ai\b",
)


@dataclass(frozen=True)
class Score:
    """A mean with its number of items and its 95 % interval."""

    value: float
    n: int
    ci95: tuple[float, float]

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "n": self.n, "ci95": list(self.ci95)}


def score(values: np.ndarray, clusters: Sequence[object] | None = None, seed: int = 0) -> Score:
    """Mean, n and bootstrap interval of per-item values."""
    return Score(float(np.mean(values)), len(values), bootstrap_ci95(values, seed, clusters=clusters))


def bootstrap_ci95(
    values: np.ndarray, seed: int = 0, resamples: int = 2000, clusters: Sequence[object] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979); items with equal cluster labels are drawn together.

    A resample's mean is over its items, so clusters of unequal size weigh by their size.
    """
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        raise ValueError("no values to resample")
    labels = list(range(len(values))) if clusters is None else list(clusters)
    if len(labels) != len(values):
        raise ValueError(f"{len(labels)} cluster labels for {len(values)} values")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    cluster_of = np.array([numbers[label] for label in labels])
    sums, counts = np.bincount(cluster_of, values), np.bincount(cluster_of)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one resample at a time: memory stays at the size of the data
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


class _WordTokenizer:
    """Words of any script, lower case, Porter-stemmed if longer than three letters, as rouge-score does for ASCII.

    rouge-score's own tokenizer drops every non-ASCII letter, so that an answer in Cyrillic would score 0. On ASCII text
    the two agree (tested). Scripts without spaces count as one word per run.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        words = re.findall(r"[^\W_]+", text.lower())
        return [self._stemmer.stem(word) if len(word) > 3 else word for word in words]


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_WordTokenizer())


def rouge_l(answers: Sequence[str], outputs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """ROUGE-L recall and F1 per item (Lin 2004, through rouge-score), float64 [n] each; `answers` are the references."""
    scores = [_scorer().score(answer, output)["rougeL"] for answer, output in zip(answers, outputs, strict=True)]
    return np.array([s.recall for s in scores]), np.array([s.fmeasure for s in scores])


def exact_match(answers: Sequence[str], outputs: Sequence[str]) -> np.ndarray:
    """1 where answer and reference are equal but for case, punctuation, spacing and Unicode form."""
    return np.array([float(_plain(a) == _plain(o)) for a, o in zip(answers, outputs, strict=True)])


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(c)[0] in "PZ" or c.isspace() else c for c in folded)
    return " ".join(kept.split())


def refusals(outputs: Sequence[str], extra_patterns: Sequence[str] = ()) -> np.ndarray:
    """1 where an output refuses or says that it does not know."""
    pattern = re.compile("|".join(f"(?:{p})" for p in (*REFUSAL_PATTERNS, *extra_patterns)), re.IGNORECASE)
    return np.array([float(bool(pattern.search(output.strip().replace("\u2019", "'")))) for output in outputs])


def score_texts(
    answers: Sequence[str], outputs: Sequence[str], extra_refusals: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """All text metrics per item, by metric id."""
    recall, f1 = rouge_l(answers, outputs)
    return {
        "rougeL_recall": recall,
        "rougeL_f1": f1,
        "exact_match": exact_match(answers, outputs),
        "refusal_rate": refusals(outputs, extra_refusals),
    }


def floors(questions: Sequence[str], answers: Sequence[str], refusal: str) -> dict[str, dict[str, float]]:
    """Per text metric, the means of a constant refusal and of echoing the question: what knowing nothing scores."""
    found: dict[str, dict[str, float]] = {}
    for name, outputs in (("refusal", [refusal] * len(answers)), ("echo", list(questions))):
        for metric, values in score_texts(answers, outputs).items():
            if metric != "refusal_rate":
                found.setdefault(metric, {})[name] = float(np.mean(values))
    return found


def performance_shift(
    base: Mapping[str, float], model: Mapping[str, float], forgotten: Collection[str]
) -> tuple[float, dict[str, float]]:
    """DUET's performance shift (arXiv 2601.21283): the plain sum of the signed improvements over base, and its terms.

    A metric named in `forgotten` improves by falling, any other by rising. The unit is that of the input.
    """
    if set(base) != set(model):
        raise ValueError(f"base has {sorted(base)}, the model has {sorted(model)}")
    terms = {key: (base[key] - model[key]) * (1 if key in forgotten else -1) for key in base}
    return sum(terms.values()), terms
