"""What is kept by distance from the topic: a student loses first what lies nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duet.stages.evaluate.left import Beside, kept
from duet.stages.exam.exam import DISTINCTIVE, Exam, Subject
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score


def by_distance(
    subjects: Sequence[Subject],
    exam: Exam,
    models: Mapping[str, Mapping[str, Score]],
    floors: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The entry `by_distance` of results.json; empty where no set has a distance.

    `sets` has the sets' distances, from near to far; `kept`, by model that has a base and by set, the share of base's
    distinctive recall that is kept. A set on which base is not above the floor is left out.
    """
    distances = sorted((s.distance, name) for name, s in exam.judged.items() if s.distance is not None)
    if not distances:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        if subject.base != subject.name:
            beside = Beside(models[subject.base], floors, {}, exam.settings.seed)
            shares = {
                name: kept(key := f"{name}.{DISTINCTIVE}", models[subject.name][key], beside) for _, name in distances
            }
            found[subject.name] = {name: share.share.as_json() for name, share in shares.items() if share}
    return {"sets": {name: distance for distance, name in distances}, "kept": found}


METRICS = (
    Metric(
        "by_distance",
        by_distance,
        "Share of base's distinctive recall that a model keeps on each set with a distance (evaluate.sets), from near to far: "
        "model / base, with the interval of the linearised ratio. Left out where base is not above the floor.",
        range="0 to 1, and above where a model knows more than its base",
    ),
)
