"""The unlearning depth score as results.json has it: a score per model and attacked set, and what each layer loses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from duet.stages.attacks.names import CONTROL
from duet.stages.exam.depth import Depth
from duet.stages.exam.exam import Exam, Subject, references_of
from duet.stages.metrics.depth import ID, unlearning_depth
from duet.stages.metrics.uncertainty import Score, score


def scores_of(depth: Depth, subject: Subject, exam: Exam) -> dict[str, Score]:
    """One model's score on each attacked set with a layer that counts; empty for a model that was not measured."""
    found = {}
    for name, lost_LN in depth.lost.get(subject.name, {}).items():
        values = unlearning_depth(lost_LN, depth.control[subject.base][name])
        counts = np.flatnonzero(~np.isnan(values))
        if len(counts):
            clusters = _references(depth, exam, name)
            of_counted = [clusters[number] for number in counts]
            found[f"{name}.{ID}"] = score(values[counts], clusters=of_counted, seed=exam.settings.seed)
    return found


def as_json(depth: Depth | None, exam: Exam) -> dict[str, Any]:
    """The entry `depth`: by model and layer, mean loss over the facts of all attacked sets; and who was left out, and why."""
    if depth is None:
        return {}
    clusters = [reference for name in depth.rows for reference in _references(depth, exam, name)]
    models = {**depth.lost, **({CONTROL: depth.control["base"]} if "base" in depth.control else {})}
    return {
        "fact": PurePath(exam.settings.depth or "").name,  # where a file lies is nobody's business
        "sets": {name: {"n": len(rows), "of": len(exam.sets[name].queries)} for name, rows in depth.rows.items()},
        "layers": {model: _by_layer(lost, clusters, exam) for model, lost in models.items()},
        "left_out": dict(depth.left_out),
    }


def _by_layer(lost: Mapping[str, np.ndarray], clusters: list[str], exam: Exam) -> dict[str, Any]:
    lost_LN = np.concatenate(list(lost.values()), axis=1)
    means = [score(lost_N, clusters=clusters, seed=exam.settings.seed) for lost_N in lost_LN]
    return {
        "layers": list(range(1, len(means) + 1)),
        "lost": [mean.value for mean in means],
        "ci95": [list(mean.ci95) for mean in means],
        "n": len(clusters),
    }


def _references(depth: Depth, exam: Exam, name: str) -> list[str]:
    references = references_of(exam.sets[name])
    return [references[number] for number in depth.rows[name]]
