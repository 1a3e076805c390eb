"""What a metric is: a name, a version, and the function whose docstring defines it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BY_SET = "low on sets to be forgotten, high on sets to be kept"


@dataclass(frozen=True)
class Metric:
    """One score, or one thing that stands beside scores."""

    id: str  # what follows the query set in results.json
    function: Callable[..., Any]  # its docstring begins with the definition
    better: str = BY_SET  # where a model does what is wanted
    version: int = 1
    range: str = "0 to 1"
    about: str = ""  # what stands before that, where one function serves several metrics

    @property
    def definition(self) -> str:
        """`about` and the first paragraph of the function's docstring, on one line."""
        paragraph = (inspect.getdoc(self.function) or "").split("\n\n")[0]
        return " ".join(f"{self.about} {paragraph}".split())
