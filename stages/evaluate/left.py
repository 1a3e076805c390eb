"""How much of what base knows is left in a model, by each measure that the verdict is made of.

What is said: distinctive recall and, with choices, accuracy by letter and in cloze form, on every set to be forgotten. What is
held without being said: extraction strength and the unlearning depth score, on the attacked sets. ROUGE-L is not among them: it
gives points to the form of an answer. On sets to be kept, where any fall counts, it is.

A share left is (model - below) / (base - below). `below` is the control, the model that never knew, on the same questions;
without one the floor, what knowing nothing scores. A share kept is model / base. Both are ratios of means over the same
questions, with the 95 % interval of the linearised ratio, in which base's own spread is.

Shapes: N questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from duet.stages.exam.exam import DISTINCTIVE, HEADLINE
from duet.stages.metrics import depth
from duet.stages.metrics.choices import CLOZE, LETTER
from duet.stages.metrics.uncertainty import Score, linearised_ratio, score, upper_end

EXTRACTION = "extraction_strength"
SAID = (DISTINCTIVE, LETTER, CLOZE)
HELD = (EXTRACTION, depth.ID)
KEPT = (HEADLINE, DISTINCTIVE, LETTER, CLOZE)


@dataclass(frozen=True)
class Beside:
    """What the scores of a model are measured against, each by metric id."""

    base: Mapping[str, Score]
    floors: Mapping[str, Mapping[str, float]]
    control: Mapping[str, Score]  # of the attacked sets; empty without a control
    seed: int

    def floor(self, key: str) -> float:
        return max(self.floors.get(key, {}).values(), default=0.0)


@dataclass(frozen=True)
class Share:
    """A share of base's score on one set."""

    key: str  # metric id
    share: Score
    model: float
    base: float
    above: str = ""  # what the share is of, where it is not of the whole score
    none_above: bool = False  # on no question does the model have more than the control or the floor

    @property
    def set(self) -> str:
        return set_of(self.key)

    @property
    def upper_end(self) -> float:
        return upper_end(self.share, self.none_above)

    def in_words(self) -> str:
        """`forget: 2.7 of base's 100.0 points, -1.4 % [-4.2, 3.3] of what is above the floor of 4.0`."""
        low, high = (100 * end for end in self.share.ci95)
        points = f"{100 * self.model:.1f} of base's {100 * self.base:.1f} points"
        if self.key.endswith(f".{depth.ID}"):
            points = f"{100 * self.model:.1f} points, where base has 0"
        return f"{title(self.key)}: {points}, {100 * self.share.value:.1f} % [{low:.1f}, {high:.1f}]{self.above}"


def left(key: str, model: Score, beside: Beside) -> Share | None:
    """The share of a score that is left on a set to be forgotten; None where base is not surely above control or floor."""
    base, control = beside.base[key], beside.control.get(key)
    if key.endswith(f".{depth.ID}"):  # itself a share of the way from base to the control
        share = score(1 - model.items, model.clusters, beside.seed)
        return Share(key, share, model.value, base.value, " is left in its layers")
    if control is None:
        floor = beside.floor(key)
        below_N, words = np.full(base.n, floor), f" of what is above the floor of {100 * floor:.1f}" if floor else ""
    else:
        below_N, words = control.items, f" of what is above the control's {100 * control.value:.1f}"
    if score(base.items - below_N, base.clusters, beside.seed).ci95[0] <= 0:
        return None
    ratio_N = linearised_ratio(base.items - below_N, model.items - below_N)
    none_above = not (model.items > below_N).any()
    return Share(key, score(ratio_N, base.clusters, beside.seed), model.value, base.value, words, none_above)


def kept(key: str, model: Score, beside: Beside) -> Share | None:
    """The share of base's score that is kept; None where base is not surely above the floor."""
    base = beside.base[key]
    if base.ci95[0] <= beside.floor(key):
        return None
    ratio_N = linearised_ratio(base.items, model.items)
    return Share(key, score(ratio_N, base.clusters, beside.seed), model.value, base.value)


def above_floor(share: Share, beside: Beside) -> float:
    """(model - floor) / (base - floor) of a share that is known."""
    floor = beside.floor(share.key)
    return (share.model - floor) / (share.base - floor)


def measured(names: Iterable[str], metrics: Iterable[str], scores: Mapping[str, Score]) -> list[str]:
    """The ids of these metrics on these sets that a model has scores of."""
    return [key for name in names for metric in metrics if (key := f"{name}.{metric}") in scores]


def title(key: str) -> str:
    """A metric id as reasons call it: the set, and the metric where it is not the headline."""
    return set_of(key) if key.endswith(f".{HEADLINE}") else f"{set_of(key)} ({key.rsplit('.', 1)[1]})"


def set_of(key: str) -> str:
    return key.rsplit(".", 1)[0]
