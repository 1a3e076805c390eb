"""A config file as plain data; whatever else was named instead of one is told in two lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cache.errors import UserError
from stages.data import READERS
from stages.near import near_path

HOW_TO_GET_ONE = "`duet init` writes one, and those that come with Duet are in configs/"
MAX_BYTES = 10**7  # no config is larger; weights are


def read_mapping(path: str) -> dict[str, Any]:
    """The settings of a YAML file, as they stand there."""
    file = Path(path)
    if file.is_dir():
        there = ", ".join(str(entry) for entry in sorted(file.glob("*.yaml"))[:5])
        raise UserError(
            f"{path} is a directory, expected a config file", f"name a file in it: {there}" if there else HOW_TO_GET_ONE
        )
    if not file.is_file():
        raise UserError(f"no such config file: {path}", near_path(path) + HOW_TO_GET_ONE)
    if file.suffix.lower() in READERS and file.suffix.lower() != ".json":  # JSON is YAML, too
        raise UserError(f"{path} is a file of questions, expected a config file", HOW_TO_GET_ONE)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has {file.stat().st_size:,} bytes: it is no config file", HOW_TO_GET_ONE)
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8, expected a config file", HOW_TO_GET_ONE) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{at}: {error.problem}", "mind indentation and quotes") from None
    except yaml.YAMLError as error:  # characters that YAML does not have
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}", "mind odd characters") from None
    if raw is None:
        raise UserError(f"{path} is empty: it must hold a mapping of settings", HOW_TO_GET_ONE)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of settings, found {type(raw).__name__}", "see configs/lab.yaml")
    return raw
