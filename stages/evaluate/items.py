"""The scores of each question, as a run keeps them for a later comparison on the same questions: items.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from duet.stages.metrics.uncertainty import Score

ByModel = Mapping[str, Mapping[str, Score]]


def as_json(models: ByModel) -> dict[str, Any]:
    """By model and metric id, the values and the reference answers' numbers in one list; of means over questions alone."""
    kept = {name: {key: found for key, found in scores.items() if len(found.items)} for name, scores in models.items()}
    references = dict.fromkeys(
        str(one) for scores in kept.values() for found in scores.values() for one in found.clusters
    )
    number = {reference: at for at, reference in enumerate(references)}
    return {
        "format_version": 1,
        "references": list(references),
        "models": {
            name: {
                key: {"values": found.items.tolist(), "references": [number[str(one)] for one in found.clusters]}
                for key, found in scores.items()
            }
            for name, scores in kept.items()
        },
    }


def score_of(kept: Mapping[str, Any], model: str, key: str, record: Mapping[str, Any]) -> Score | None:
    """A score of results.json with its items; None where they were not kept, or are not those of this record."""
    of_score = kept.get("models", {}).get(model, {}).get(key)
    if of_score is None:
        return None
    values = np.array(of_score["values"], np.float64)
    if len(values) != record["n"] or not np.isclose(values.mean(), record["value"], rtol=0, atol=1e-9):
        return None
    clusters = tuple(kept["references"][number] for number in of_score["references"])
    return Score(record["value"], record["n"], tuple(record["ci95"]), values, clusters)
