"""How the caller of long work follows it, and stops it at a moment that keeps what was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from duet.cache.errors import Interrupted


def _ignore(*_: Any) -> None:
    """Follow nothing."""


@dataclass(frozen=True)
class Watch:
    """Callbacks of long work. The work says in its docstring what it hands to `on_progress`."""

    on_progress: Callable[..., None] = _ignore  # who or what, how much is done, of how much
    on_engine: Callable[[str, str], None] = _ignore  # once, when an engine is open: its name, and why that one
    should_stop: Callable[[], bool] = lambda: False

    def pause(self, what: str) -> None:
        """Raise Interrupted if the work should stop; `what` begins again with the next run, all before it is on disk."""
        if self.should_stop():
            raise Interrupted(f"{what} begins again; what was done before it is kept")
