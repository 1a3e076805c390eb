"""Scores computed from generated text, one number per item, 0..1 throughout; `uncertainty.py` makes means and intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from duet.stages.metrics.metric import Metric
from duet.stages.metrics.refusals import refusals
from duet.stages.metrics.words import split_words, without_punctuation


class _WordTokenizer:
    """Words of any script, Porter-stemmed if longer than three letters, as rouge-score does for ASCII.

    rouge-score's own tokenizer drops every non-ASCII letter, so that an answer in Cyrillic would score 0. On ASCII text
    with a letter or digit the two agree (tested).
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = lru_cache(maxsize=2**16)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) if len(word) > 3 else word for word in split_words(text)]


@cache
def _tokenizer() -> _WordTokenizer:
    return _WordTokenizer()


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_tokenizer())


def rouge_l(answers: Sequence[str], outputs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Recall and F1 of ROUGE-L per item, float64 [n] each; `answers` are the references."""
    scores = [_scorer().score(answer, output)["rougeL"] for answer, output in zip(answers, outputs, strict=True)]
    return np.array([s.recall for s in scores]), np.array([s.fmeasure for s in scores])


COMMON_SHARE = 0.05  # of all references: a word in more of them, and in more than one, tells nothing about any


def distinctive_words(
    questions: Mapping[str, Sequence[str]], answers: Mapping[str, Sequence[str]]
) -> dict[str, list[frozenset[str]]]:
    """Of every reference, by set, the words that tell it from others: those that neither its question has nor, of all
    references together, more than 5 % (and more than one). Where none is left, all that its question lacks, or all.
    """
    words = {name: [stems(text) for text in of_set] for name, of_set in answers.items()}
    counts = Counter(word for of_set in words.values() for of_item in of_set for word in of_item)
    limit = max(1.0, COMMON_SHARE * sum(map(len, words.values())))
    common = {word for word, count in counts.items() if count > limit}
    found = {}
    for name, of_set in words.items():
        new = [of_item - stems(question) for of_item, question in zip(of_set, questions[name], strict=True)]
        found[name] = [(own - common) or own or all_of for own, all_of in zip(new, of_set, strict=True)]
    return found


def stems(text: str) -> frozenset[str]:
    """The words of a text, stemmed as for ROUGE-L."""
    return frozenset(_tokenizer().tokenize(text))


def distinctive_recall(
    words: Sequence[frozenset[str]], outputs: Sequence[str], left: Sequence[str] | None = None
) -> np.ndarray:
    """Per item, the share of the reference's distinctive words that the output has, float64 [n].

    `words` are those of `distinctive_words`; outputs are stemmed as for ROUGE-L. An empty reference counts as not recalled.
    Where only what is `left` of each reference is asked for, its words alone count; NaN where it has none of them.
    """
    if left is None:
        return np.array([len(own & stems(text)) / max(1, len(own)) for own, text in zip(words, outputs, strict=True)])
    rest = [own & stems(text) for own, text in zip(words, left, strict=True)]
    found = [len(own & stems(text)) / len(own) if own else np.nan for own, text in zip(rest, outputs, strict=True)]
    return np.array(found, np.float64)


def exact_match(answers: Sequence[str], outputs: Sequence[str]) -> np.ndarray:
    """Per item, 1 where reference and output are equal but for case, punctuation, spacing and Unicode form, else 0."""
    return np.array(
        [float(without_punctuation(a) == without_punctuation(o)) for a, o in zip(answers, outputs, strict=True)]
    )


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
    """What a constant refusal and an echo of the question score: means over the items, by text metric and floor.

    The refusal rate has no floor.
    """
    found: dict[str, dict[str, float]] = {}
    for name, outputs in (("refusal", [refusal] * len(answers)), ("echo", list(questions))):
        for metric, values in score_texts(answers, outputs).items():
            if metric != "refusal_rate":
                found.setdefault(metric, {})[name] = float(np.mean(values))
    return found


def performance_shift(
    base: Mapping[str, float], model: Mapping[str, float], forgotten: Collection[str]
) -> tuple[float, dict[str, float]]:
    """The sum of all improvements over the base, and its terms by metric, in the unit of the input.

    A metric named in `forgotten` improves by falling, any other by rising.
    """
    if set(base) != set(model):
        raise ValueError(f"base has {sorted(base)}, the model has {sorted(model)}")
    terms = {key: (base[key] - model[key]) * (1 if key in forgotten else -1) for key in base}
    return sum(terms.values()), terms


_ROUGE_L = (
    "ROUGE-L (Lin 2004, through rouge-score): the longest common subsequence of words (Porter-stemmed) of answer and "
    "reference. rougeL_recall is its share of the reference's words; 1 means that the whole reference is in the answer, in "
    "order. rougeL_f1 is the harmonic mean of that and its share of the answer's words. A word is a run of letters and digits "
    "with their marks, in one Unicode form and one case; in scripts without spaces, such as Chinese or Thai, each letter with "
    "its marks is a word (stages/metrics/words.py). A text without letters and digits is one word, itself."
)
_FLOORS = (
    "The score of a model that knows nothing: `refusal` is the text metric of a model that gives one constant refusal to "
    "everything, `echo` that of one that repeats the question."
)
METRICS = (
    Metric("rougeL_recall", rouge_l, _ROUGE_L, version=2),
    Metric("rougeL_f1", rouge_l, _ROUGE_L, version=2),
    Metric(
        "distinctive_recall",
        distinctive_recall,
        "Share of the reference's distinctive words that the answer has, in any order: those that are neither in the "
        "question nor in more than 5 % of all references. ROUGE-L gives points for the form of an answer, whatever it says, "
        "and few for the one right word in another form; this does the opposite.",
        version=2,
    ),
    Metric(
        "exact_match",
        exact_match,
        "Share of answers equal to the reference but for case, punctuation, spacing and Unicode form. Of a text that is "
        "nothing but punctuation, the punctuation counts.",
        version=2,
    ),
    Metric(
        "refusal_rate",
        refusals,
        "Share of answers that a regular expression of stages/metrics/refusals.yaml (by language) or of "
        "`evaluate.refusal_patterns` takes for a refusal or for saying that one does not know. An I that is a king's number "
        "(Charles I) or stands in a title is not the speaker's; what a person in a story says counts as what the model says.",
        better="high on sets to be forgotten where refusing is wanted, low on sets to be kept",
        version=2,
    ),
    Metric(
        "performance_shift",
        performance_shift,
        "Plain sum over the query sets of the signed improvement of ROUGE-L recall over the model's own base, in points: a "
        "fall counts as improvement where the set is to be forgotten, a rise elsewhere (arXiv 2601.21283).",
        better="high",
        version=2,
        range="points; each set adds -100 to 100",
    ),
    Metric("floor_refusal", floors, _FLOORS, better="does not apply", version=2),
    Metric("floor_echo", floors, _FLOORS, better="does not apply", version=2),
)
