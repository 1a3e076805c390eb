"""What stands beside the numbers of given answers on the attacked sets: those of the control, and a floor.

The control never knew; of its tokens, what is the most likely one is what the question and the form of an answer give away. The
floor needs no control: base reads each answer behind a question to be kept, which tells of the form and not of the fact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, Subject
from duet.stages.exam.given_answers import BySet, Given, Pairs, pairs_of
from duet.stages.exam.reading import Reader, given_by
from duet.stages.metrics import memorisation
from duet.stages.metrics.memorisation import EXCHANGED
from duet.stages.metrics.metric import Metric
from duet.stages.questions.prompts import Prompt


def read_beside(base: Subject, exam: Exam, folder: Path, watch: Watch) -> tuple[BySet, BySet]:
    """By attacked set: what the control makes of the answers, and base behind questions to be kept; empty where there are none.

    Kept in `folder` as the subjects' own are.
    """
    attacked = replace(exam, sets={name: exam.sets[name] for name in exam.attacked})
    of_control: BySet = {}
    if exam.control is not None and exam.settings.attacks:  # else nothing else is asked of the control
        reader, control = Reader(exam.control, exam), Subject("control", exam.control, "", base.name)
        of_control = given_by(reader, control, pairs_of(reader.renderer, attacked, control), folder, watch)
    others = [query for query_set in exam.judged.values() if query_set.expect == "kept" for query in query_set.queries]
    if not others:
        return of_control, {}
    reader = Reader(base.model_dir, exam)
    prompts = [reader.renderer.prompt(Prompt.plain(query)) for query in others]
    pairs = {name: exchanged(of, prompts) for name, of in pairs_of(reader.renderer, attacked, base).items()}
    return of_control, given_by(reader, replace(base, name=EXCHANGED), pairs, folder, watch)


def exchanged(pairs: Pairs, others: Sequence[list[int]]) -> Pairs:
    """The reference answers alone, behind these other prompts, which are taken evenly from the first to the last."""
    count = len(pairs.answers)
    prompts = [others[number * len(others) // count] for number in range(count)]
    answers = [of_query[:1] for of_query in pairs.answers]
    return replace(pairs, prompts=prompts, answers=answers, has_paraphrase=False, has_perturbed=False)


def memorised(given: Given) -> dict[str, np.ndarray]:
    """The metrics of memorisation per item, by metric id."""
    flags = given.answer_flags()
    return {metric.id: np.array([metric.function(of_item) for of_item in flags]) for metric in memorisation.METRICS}


def floors_of(beside: Mapping[str, Given]) -> dict[str, dict[str, float]]:
    """The floor of memorisation, by score."""
    return {
        f"{name}.{metric}": {EXCHANGED: float(values.mean())}
        for name, given in beside.items()
        for metric, values in memorised(given).items()
    }


METRICS = (
    Metric(
        "floor_exchanged",
        exchanged,
        "Exact memorisation and extraction strength of base on the attacked sets where each answer stands behind a question to "
        "be kept, taken evenly from those of all sets: what the form of the answers gives without the fact.",
        better="does not apply",
    ),
)
