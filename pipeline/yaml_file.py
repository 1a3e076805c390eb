"""A config file as plain data; whatever else was named instead of one is told in two lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.errors import UserError
from stages.data import READERS
from stages.near import near_path
from stages.text_files import refuse_other_kind
from stages.yaml_text import parse_yaml

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
        content = file.read_bytes()
        refuse_other_kind(content, path, "--config")
        raw = parse_yaml(content.decode("utf-8"), path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8, expected a config file", HOW_TO_GET_ONE) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check the file and its mode") from None
    if raw is None:
        raise UserError(f"{path} is empty: it must hold a mapping of settings", HOW_TO_GET_ONE)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of settings, found {type(raw).__name__}", "see configs/lab.yaml")
    return raw
