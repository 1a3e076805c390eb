"""Answers are kept on disk, under a hash of everything that decides them. A number that is not finite is kept as null."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet.cache.files import publish_json, read_json


def recalled(path: Path, identity: str, ask: Callable[[], Any]) -> Any:
    """The answers that `path` holds under this identity; if it does not, those of `ask()`, which are then kept there."""
    if path.is_file() and (kept := read_json(path))["identity"] == identity:
        return kept["answers"]
    answers = _plain(ask())
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_json(path, {"identity": identity, "answers": answers})
    return answers


def _plain(node: Any) -> Any:
    """What JSON can hold of it: None in the place of each number that is not finite, as of weights that have diverged."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
