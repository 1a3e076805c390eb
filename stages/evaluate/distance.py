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
) -> dict[str, list[dict[str, Any]]]:
    """By model that has a base, its sets with a distance from near to far, as results.json has them; empty without such sets.

    Each with its name, its distance, and the share of base's distinctive recall that is kept, None where base is not above
    the floor.
    """
    sets = sorted((s.distance, name) for name, s in exam.judged.items() if s.distance is not None)
    found: dict[str, list[dict[str, Any]]] = {}
    for subject in subjects if sets else ():
        if subject.base == subject.name:
            continue
        beside = Beside(models[subject.base], floors, {}, exam.settings.seed)
        shares = {name: kept(key := f"{name}.{DISTINCTIVE}", models[subject.name][key], beside) for _, name in sets}
        found[subject.name] = [
            {"set": name, "distance": distance, "kept": share.share.as_json() if (share := shares[name]) else None}
            for distance, name in sets
        ]
    return found


METRICS = (
    Metric(
        "by_distance",
        by_distance,
        "Share of base's distinctive recall that a model keeps on each set with a distance (evaluate.sets), from near to far: "
        "model / base, with the interval of the linearised ratio. Left out where base is not above the floor.",
        range="0 to 1, and above where a model knows more than its base",
    ),
)
