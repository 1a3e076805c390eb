"""Given answers: the reference, its paraphrase and wrong ones, behind a subject's own prompts, and what a model makes of them.

`pairs_of` renders them, `reading.py` has a model read them, `score_given` turns the numbers into scores per item. Nothing is
generated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet.stages.exam.exam import Exam, Subject, by_directory, sets_as_tasks
from duet.stages.metrics import tofu
from duet.stages.metrics.memorisation import exact_memorisation, extraction_strength
from duet.stages.models.token_scores import LOWEST, TokenScores
from duet.stages.questions.prompts import Prompt, Renderer

BySet = Mapping[str, "Given"]


@dataclass(frozen=True)
class Given:
    """What a model makes of one set's given answers, in query order; log-probabilities are means over an answer's tokens."""

    tokens: list[TokenScores]  # of the reference answers; `is_top` as 0 and 1
    num_end: list[int]  # tokens at the end of each reference answer that are the end of the turn, not its own
    paraphrased: np.ndarray | None  # float64 [N]
    perturbed: list[np.ndarray] | None  # float64, one per wrong answer of the item

    @property
    def answer(self) -> np.ndarray:
        """Log-probability of the reference answers, float64 [N]."""
        return np.array([scores.logprob.mean() for scores in self.tokens])

    @property
    def right(self) -> np.ndarray:
        """Log-probability of what TOFU compares wrong answers with: the paraphrase, or the reference where there is none."""
        return self.answer if self.paraphrased is None else self.paraphrased

    def not_finite(self) -> np.ndarray:
        """Per question, bool: does any of its answers have a log-probability that is not a number, or below LOWEST?"""
        columns = [self.answer, *([] if self.paraphrased is None else [self.paraphrased])]
        columns += [] if self.perturbed is None else [np.array([options.min() for options in self.perturbed])]
        return ~np.all(np.stack(columns) >= LOWEST, axis=0)

    def answer_flags(self) -> list[np.ndarray]:
        """Per reference answer, bool: is each of its own tokens the most likely one? The end of the turn is left out."""
        return [
            scores.is_top[: len(scores.is_top) - end] > 0 for scores, end in zip(self.tokens, self.num_end, strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        """With rows of numbers as text, which keeps files small and can hold -inf."""
        return {
            "tokens": [{name: _text(getattr(one, name)) for name in one.__dataclass_fields__} for one in self.tokens],
            "num_end": self.num_end,
            "paraphrased": None if self.paraphrased is None else _text(self.paraphrased),
            "perturbed": None if self.perturbed is None else [_text(options) for options in self.perturbed],
        }

    @staticmethod
    def from_json(kept: Mapping[str, Any]) -> Given:
        return Given(
            [TokenScores(**{name: _numbers(column) for name, column in one.items()}) for one in kept["tokens"]],
            kept["num_end"],
            None if kept["paraphrased"] is None else _numbers(kept["paraphrased"]),
            None if kept["perturbed"] is None else [_numbers(options) for options in kept["perturbed"]],
        )


def _text(values: np.ndarray) -> str:
    """Nine digits: exact for what was float32."""
    return " ".join(f"{value:.9g}" for value in values)


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), np.float64)


def finite(given: Mapping[str, BySet]) -> tuple[dict[str, BySet], dict[str, int]]:
    """The subjects whose log-probabilities are all finite; and of each subject how many questions have one that is not."""
    bad = {name: sum(int(one.not_finite().sum()) for one in of_sets.values()) for name, of_sets in given.items()}
    return {name: of_sets for name, of_sets in given.items() if not bad[name]}, bad


def score_given(given: Given, expect: str) -> dict[str, np.ndarray]:
    """All likelihood metrics per item, by metric id; `expect` is the set's, forgotten or kept."""
    flags = given.answer_flags()
    found = {
        "exact_memorisation": np.array([exact_memorisation(of_item) for of_item in flags]),
        "extraction_strength": np.array([extraction_strength(of_item) for of_item in flags]),
        "tofu.probability": tofu.probability(given.answer),
    }
    if given.perturbed is not None:
        if given.paraphrased is None:  # else the wrong answers are worded as the paraphrase is, and no other options
            found["tofu.choice_probability"] = tofu.choice_probability(given.answer, given.perturbed)
        for variant in tofu.VARIANTS:
            ratio = tofu.truth_ratios(variant, given.right, given.perturbed)
            found[f"tofu.truth_ratio/{variant}"] = tofu.truth_ratio_score(ratio, expect)
    return found


@dataclass(frozen=True)
class Pairs:
    """Token ids of one set for one subject: prompts, and per query its answers, the reference first, the wrong ones last."""

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    num_end: list[int]  # of the reference answers
    has_paraphrase: bool
    has_perturbed: bool

    @property
    def ids(self) -> list[Any]:
        """All that decides what a model makes of them."""
        return [self.prompts, self.answers, self.num_end, self.has_paraphrase, self.has_perturbed]


def check(subjects: Sequence[Subject], exam: Exam) -> None:
    """Refuse answers that a subject cannot be given, before anything is asked."""
    for model_dir, of_directory in by_directory(subjects).items():
        renderer = exam.renderer(model_dir)
        for subject in of_directory:
            pairs_of(renderer, exam, subject)


def pairs_of(renderer: Renderer, exam: Exam, subject: Subject) -> dict[str, Pairs]:
    """What a subject is read, by set; attacks are left to generated answers."""
    return {name: _pairs(renderer, task.prompts) for name, task in sets_as_tasks(exam, subject).items()}


def _pairs(renderer: Renderer, asked: Sequence[Prompt]) -> Pairs:
    queries = [prompt.query for prompt in asked]
    texts = [
        [query.answer or "", *([] if query.paraphrased is None else [query.paraphrased]), *(query.perturbed or ())]
        for query in queries
    ]
    found = [
        [renderer.answer(prompt, text) for text in of_query] for prompt, of_query in zip(asked, texts, strict=True)
    ]
    prompts = [renderer.prompt(prompt) for prompt in asked]
    answers = [[one.ids for one in of_query] for of_query in found]
    num_end = [of_query[0].num_end for of_query in found]
    return Pairs(prompts, answers, num_end, queries[0].paraphrased is not None, queries[0].perturbed is not None)


def given_of(by_query: list[list[TokenScores]], pairs: Pairs) -> Given:
    """The numbers of one set, from the scores of each query's answers in the order of `pairs`."""
    means = [np.array([scores.logprob.mean() for scores in of_query]) for of_query in by_query]
    return Given(
        [of_query[0] for of_query in by_query],
        pairs.num_end,
        np.array([of_query[1] for of_query in means]) if pairs.has_paraphrase else None,
        [of_query[1 + pairs.has_paraphrase :] for of_query in means] if pairs.has_perturbed else None,
    )
