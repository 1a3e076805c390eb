"""Students that differ in their training seed alone, as one row: means over seeds and questions, with intervals over both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duet.stages.metrics import seeds
from duet.stages.metrics.uncertainty import Score


def rows_of(
    groups: Mapping[str, Sequence[str]],
    models: Mapping[str, Mapping[str, Score]],
    outcomes: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The entry `over_seeds` of results.json: by row its models, its scores, and how many models have which verdict.

    A score that is a mean over items, the same in all models of a row, has value, n, ci95 and the value of each seed
    (`metrics/seeds.py`); others are left out.
    """
    return {
        row: {
            "models": list(members),
            "scores": {
                key: _score([models[member][key] for member in members], seed)
                for key in models[members[0]]
                if _alike([models[member].get(key) for member in members])
            },
            "verdicts": dict(Counter(outcomes[member]["verdict"] for member in members).most_common()),
        }
        for row, members in groups.items()
    }


def _alike(scores: Sequence[Score | None]) -> bool:
    first = scores[0]
    return (
        first is not None
        and len(first.items) > 0
        and all(s is not None and s.clusters == first.clusters for s in scores)
    )


def _score(scores: Sequence[Score], seed: int) -> dict[str, Any]:
    values_SN = np.stack([score.items for score in scores])
    return seeds.weighted_sum({"": values_SN}, {"": list(scores[0].clusters)}, {"": 1.0}, seed)
