"""Answers are kept on disk, under a hash of everything that decides them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet.cache.files import publish_json, read_json


def recalled(path: Path, identity: str, ask: Callable[[], Any]) -> Any:
    """The answers that `path` holds under this identity; if it does not, those of `ask()`, which are then kept there."""
    if path.is_file() and (kept := read_json(path))["identity"] == identity:
        return kept["answers"]
    answers = ask()
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_json(path, {"identity": identity, "answers": answers})
    return answers
