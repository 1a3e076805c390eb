"""What a metric is: a name, a version, the function that computes it, and its definition in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BY_SET = "low on sets to be forgotten, high on sets to be kept"


@dataclass(frozen=True)
class Metric:
    """One score, or one thing that stands beside scores."""

    id: str  # what follows the query set in results.json
    function: Callable[..., Any]  # computes it
    definition: str  # what the number is, as results.json and docs/metrics.md have it
    better: str = BY_SET  # where a model does what is wanted
    version: int = 1
    range: str = "0 to 1"
