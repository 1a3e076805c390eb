"""On what the attack relearn trains its copies, and which questions it asks them then.

What must always hold: no question is asked that the copy was trained on, nor one with the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from duet.cache.errors import UserError
from duet.stages.exam.exam import Exam
from duet.stages.questions.queries import Query
from duet.stages.settings.attacks import RelearnSettings


@dataclass(frozen=True)
class Draw:
    """What one copy is trained on, and which questions of the attacked set it is asked then."""

    pairs: tuple[int, ...]  # numbers of queries of the relearn set's source
    asked: tuple[int, ...]  # numbers of queries of the attacked set


@dataclass(frozen=True)
class RelearnSet:
    """Draws of one kind of pairs, each taught to copies of its own."""

    name: str  # "forget 5", "benign", "other"; with adapters "forget 5, LoRA"
    source: str  # the set that the pairs are of
    draws: tuple[Draw, ...]
    lora_rank: int = 0  # of the adapters that are trained; 0: all weights are

    @property
    def asked(self) -> tuple[int, ...]:
        """The numbers of the queries that any draw asks, ascending."""
        return tuple(sorted({i for draw in self.draws for i in draw.asked}))


def steps_of(settings: RelearnSettings) -> tuple[int, ...]:
    """The steps after which is asked, 0 (before any) first."""
    return (0, *settings.steps)


def relearn_sets(exam: Exam, name: str) -> tuple[list[RelearnSet], dict[str, str]]:
    """What copies are trained on for an attacked set, and of what its data do not allow, why.

    Drawn by the seed, the same for all models; of one draw a set of more pairs has those of the smaller ones too. With adapters
    every set comes a second time.
    """
    settings = exam.settings.relearn
    found, skipped = _of_the_attacked(exam, name)
    everything = tuple(range(len(exam.sets[name].queries)))
    for title, source in _harmless(exam, name).items():
        kept = len(exam.sets[source].queries) if source else 0
        if source and kept >= settings.benign:
            draws = tuple(Draw(tuple(order[: settings.benign]), everything) for order in _orders(exam, kept))
            found.append(RelearnSet(title, source, draws))
        else:
            skipped[title] = f"{settings.benign} pairs to be kept are wanted, there are {kept}"
    if settings.lora_rank:
        found += [replace(one, name=f"{one.name}, LoRA", lora_rank=settings.lora_rank) for one in found]
    return found, skipped


def _of_the_attacked(exam: Exam, name: str) -> tuple[list[RelearnSet], dict[str, str]]:
    """Pairs of the attacked set itself; the others are asked."""
    queries = exam.sets[name].queries
    orders, found, skipped = _orders(exam, len(queries)), [], {}
    for count in exam.settings.relearn.pairs:
        draws = tuple(_draw(queries, tuple(order[:count])) for order in orders)
        if len(queries) < count or not all(draw.asked for draw in draws):
            skipped[f"{name} {count}"] = (
                f"of {len(queries)} questions, {count} to train on leave none with another answer"
            )
        else:
            found.append(RelearnSet(f"{name} {count}", name, draws))
    return found, skipped


def _draw(queries: Sequence[Query], pairs: tuple[int, ...]) -> Draw:
    taught = {queries[i].answer for i in pairs}
    return Draw(pairs, tuple(i for i, query in enumerate(queries) if i not in pairs and query.answer not in taught))


def _orders(exam: Exam, count: int) -> list[list[int]]:
    """Of each draw, the order in which `count` queries are taken."""
    rng = np.random.default_rng(exam.settings.seed)
    return [rng.permutation(count).tolist() for _ in range(exam.settings.relearn.draws)]


def _harmless(exam: Exam, name: str) -> dict[str, str | None]:
    """The sets whose pairs say nothing about the topic, by what they are called: the first to be kept, and `other`."""
    settings, front = exam.settings.relearn, "" if name == "forget" else f"{name}, "
    if not settings.benign:
        return {}
    kept = [other for other, s in exam.judged.items() if s.expect == "kept"]
    found: dict[str, str | None] = {f"{front}benign": kept[0] if kept else None}
    if settings.other is not None:
        further = [other for other in kept[1:] if len(exam.sets[other].queries) >= settings.benign]
        if settings.other not in further:
            raise UserError(
                f"evaluate.relearn.other: {settings.other!r} is not a further set to be kept with {settings.benign} questions",
                f"such sets are {', '.join(further)}" if further else "there is none: add one under evaluate.sets",
            )
        found[f"{front}other"] = settings.other
    return found
