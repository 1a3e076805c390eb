"""What the methods are trained on: the rows of a run as token ids, those of a step, and their order.

Rows and their order are those of DUET's student, so that a step of either sees the same queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from duet.cache.files import sha256_json
from duet.cache.order import Cursor, Order
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.student import TrainSettings
from duet.stages.student.loop import steps_of

MAX_EXAMPLES = 2  # answered questions in front of one in context, 0 to this (arXiv 2607.09236)
BEGUN_SHARE = 0.5  # share of refusals in context that follow a begun answer (same paper)


@dataclass(frozen=True)
class QuestionAnswer:
    """One question with one answer, as token ids."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    begun: int = 0  # how many of them, the first, begin another answer, which a refusal breaks off


@dataclass(frozen=True)
class Batch:
    """The rows of a step. Those in context are there for a method that wants them."""

    forget: list[QuestionAnswer]  # with their own answers
    refused: list[QuestionAnswer]  # the same questions with a refusal each
    retain: list[QuestionAnswer]
    retain_refused: list[QuestionAnswer]
    refused_in_context: list[QuestionAnswer]
    retain_in_context: list[QuestionAnswer]


def row_of(
    renderer: Renderer, query: Query, answer: str | None = None, examples: Sequence[Query] = ()
) -> QuestionAnswer:
    """A question with its answer, or with another one, as token ids, without a prefix, as a student sees it.

    `examples` are answered questions in front.
    """
    asked = Prompt(query, query.question, examples=tuple(examples))
    return QuestionAnswer(
        renderer.prompt(asked), renderer.answer(asked, query.answer or "" if answer is None else answer).ids
    )


@dataclass(frozen=True)
class Contexts:
    """Rows behind answered questions: those of the run, the ones to be forgotten answered with a refusal."""

    renderer: Renderer
    forget: Sequence[Query]
    retain: Sequence[Query]
    refusals: Sequence[str]

    def row(self, number: int, rng: np.random.Generator) -> QuestionAnswer:
        """One row, numbered as in `TrainingRows`, behind 0 to MAX_EXAMPLES drawn examples.

        One to be forgotten gets a refusal, which in BEGUN_SHARE of cases follows the first k tokens of its own answer, k drawn
        with a weight of 1/k.
        """
        examples = self._examples(number, rng)
        if number >= len(self.forget):
            return row_of(self.renderer, self.retain[number - len(self.forget)], examples=examples)
        query = self.forget[number]
        refused = row_of(self.renderer, query, self._refusal(rng), examples)
        if rng.random() >= BEGUN_SHARE:
            return refused
        asked = Prompt(query, query.question, examples=tuple(examples))
        own = self.renderer.answer(asked, query.answer or "").own
        weights = 1 / np.arange(1, len(own) + 1)
        begun = 1 + int(rng.choice(len(own), p=weights / weights.sum()))
        return QuestionAnswer(refused.prompt_ids, [*own[:begun], *refused.answer_ids], begun)

    def _examples(self, number: int, rng: np.random.Generator) -> list[Query]:
        queries = [*self.forget, *self.retain]
        pool = [at for at, query in enumerate(queries) if at != number and not query.is_conversation]
        count = min(int(rng.integers(MAX_EXAMPLES + 1)), len(pool))
        return [self._answered(int(at), rng) for at in rng.choice(pool, count, replace=False)]

    def _answered(self, number: int, rng: np.random.Generator) -> Query:
        if number >= len(self.forget):
            return self.retain[number - len(self.forget)]
        query = self.forget[number]
        return replace(query, answer=self._refusal(rng))

    def _refusal(self, rng: np.random.Generator) -> str:
        return self.refusals[int(rng.integers(len(self.refusals)))]


@dataclass(frozen=True)
class TrainingRows:
    """The queries of a run as token ids, from which a step's rows are drawn.

    Numbers are the store's: forget, then retain, then broad rows, which have no answers to learn from and are left out.
    """

    forget: list[QuestionAnswer]
    retain: list[QuestionAnswer]
    refusals: list[list[QuestionAnswer]]  # each forget question, then each retain question, with each refusal
    contexts: Contexts | None = None

    def batch(self, numbers: np.ndarray, seed: int, step: int, in_context: bool = False) -> Batch:
        """The rows of these numbers; refusals and contexts are functions of seed, step and number."""
        known = [int(number) for number in numbers if number < len(self.forget) + len(self.retain)]
        forget = [number for number in known if number < len(self.forget)]
        retain = [number for number in known if number >= len(self.forget)]
        return Batch(
            forget=[self.forget[number] for number in forget],
            refused=self._refused(forget, seed, step),
            retain=[self.retain[number - len(self.forget)] for number in retain],
            retain_refused=self._refused(retain, seed, step),
            refused_in_context=self._in_context(forget, seed, step) if in_context else [],
            retain_in_context=self._in_context(retain, seed, step) if in_context else [],
        )

    def _refused(self, numbers: Sequence[int], seed: int, step: int) -> list[QuestionAnswer]:
        if not self.refusals:
            return []
        count = len(self.refusals[0])
        drawn = [int(np.random.default_rng([seed, step, number]).integers(count)) for number in numbers]
        return [self.refusals[number][at] for number, at in zip(numbers, drawn, strict=True)]

    def _in_context(self, numbers: Sequence[int], seed: int, step: int) -> list[QuestionAnswer]:
        if self.contexts is None:
            raise ValueError("these rows have no contexts")
        return [self.contexts.row(number, np.random.default_rng([seed, step, number, 1])) for number in numbers]

    def sha256(self) -> str:
        """Hash of all rows and of the forget questions' refusals, of which those of the retain questions are repetitions."""
        rows = [[list(row.prompt_ids), list(row.answer_ids)] for row in (*self.forget, *self.retain)]
        refusals = [[list(row.answer_ids) for row in of_question] for of_question in self.refusals[: len(self.forget)]]
        return sha256_json([len(self.forget), rows, refusals])


@dataclass(frozen=True)
class Steps:
    """Which rows come in which step, from 0 to `total`-1."""

    total: int
    numbers: Callable[[int], np.ndarray]


def store_order(order: Order, settings: TrainSettings) -> Steps:
    """The steps of a student that is trained on a store in this order: the same rows in each."""
    total = steps_of(order, settings)

    def numbers(step: int) -> np.ndarray:
        epoch, at = divmod(step, total // settings.epochs)
        places = order.draw(Cursor(epoch, at * settings.batch_size), settings.batch_size)
        rows = [np.concatenate([np.arange(*block) for block in order.ranges(window)])[at] for window, at in places]
        return np.concatenate(rows)

    return Steps(total, numbers)


def shuffled_order(num_rows: int, settings: TrainSettings) -> Steps:
    """Every row once in each epoch, in an order drawn from the seed and the epoch."""
    per_epoch = math.ceil(num_rows / settings.batch_size)

    def numbers(step: int) -> np.ndarray:
        epoch, at = divmod(step, per_epoch)
        drawn = np.random.default_rng([settings.seed, epoch]).permutation(num_rows)
        return drawn[at * settings.batch_size : (at + 1) * settings.batch_size]

    return Steps(settings.epochs * per_epoch, numbers)
