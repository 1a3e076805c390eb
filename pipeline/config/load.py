"""One YAML file per experiment, read into frozen settings; `--set a.b=v` overrides; every error names the key.

Validation never edits: what a stage resolves itself (engine, dtype, device) stays "auto" here and is reported by the stage.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from duet.cache.errors import UserError, nearest_path
from duet.cache.location import check_url, is_url
from duet.pipeline.config.chain import check_chain
from duet.pipeline.config.explain import merged, validated
from duet.pipeline.config.local_data import with_local_copies
from duet.pipeline.config.schema import Config, check_bare, check_requests, check_students, check_teachers, check_tofu
from duet.stages.questions.queries import READERS
from duet.stages.questions.text_files import refuse_other_kind
from duet.stages.questions.yaml_text import parse_yaml

SITE_VARIABLE = "DUET_SITE"  # names another site file; empty: none
SITE_KEYS = {"slurm": None, "runs_dir": None, "store": ("dir", "cache_dir", "cache_gb", "lease_s")}  # None: all below


def load_config(path: str, overrides: tuple[str, ...] = ()) -> Config:
    """Read a config file, apply `key=value` overrides, validate; raises UserError for anything a user can fix."""
    raw = merged(site_defaults(os.environ), read_mapping(path))
    for override in overrides:
        _apply(raw, override)
    raw = with_local_copies(raw)
    try:
        config = validated(Config, raw, path)
    except UserError as error:
        of = next((text for text in overrides if error.what.startswith(f"{path}: {text.partition('=')[0]}:")), None)
        raise UserError(error.what.replace(path, f"--set {of}", 1) if of else error.what, error.hint) from None
    check_teachers(config, path)
    check_requests(config, path)
    check_chain(config, path)
    check_tofu(config, path)
    check_bare(config, path)
    check_students(config, path)
    if is_url(config.store.dir or ""):
        check_url(config.store.dir or "")  # before the settings are written anywhere
    return _dated(config)


def _dated(config: Config) -> Config:
    """The config with the day that chat templates get: its own, else that of the run if it has begun, else today's."""
    if config.prompt.date is not None:
        return config
    of_run = config.run.config
    try:
        recorded = read_mapping(str(of_run)).get("prompt", {}).get("date") if of_run.is_file() else None
    except PermissionError:  # somebody else's run: what needs it will say so
        recorded = None
    day = datetime.date.fromisoformat(str(recorded)) if recorded else datetime.date.today()
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"date": day})})


def site_defaults(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the machine's site file says of every config that does not say it itself; only where and how, never what.

    `~/.config/duet/site.yaml`, or the file that DUET_SITE names.
    """
    named = environment.get(SITE_VARIABLE)
    file = Path(click.get_app_dir("duet")) / "site.yaml" if named is None else Path(named)
    if named == "" or (named is None and not file.is_file()):
        return {}
    if not file.is_file():
        raise UserError(f"{SITE_VARIABLE} names no file: {named}", "correct it, or unset it")
    raw = read_mapping(str(file))
    for group, value in raw.items():
        keys = SITE_KEYS.get(group, ())
        refused = [f"{group}.{key}" for key in value if key not in keys] if keys and isinstance(value, dict) else []
        if refused or keys == ():
            raise UserError(
                f"{file}: {(refused or [group])[0]} is not a default of a site",
                "only where and how a run is made belongs here: slurm, runs_dir, "
                + ", ".join(f"store.{key}" for key in SITE_KEYS["store"] or ()),
            )
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r} is not of the form key=value", "for example --set train.lr=1e-5")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = node[_index(node, part, key)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"--set {key}: {part} is {node!r}, not a group of settings", "leave out what follows it")
    value = parse_value(text, f"--set {override!r}")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def parse_value(text: str, where: str) -> Any:
    """A value of the command line, as YAML reads it."""
    return parse_yaml(text, f"{where}: the value") if text else ""


def _index(node: list[Any], part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise UserError(f"--set {key}: {part!r} is not an index of a list of {len(node)}", f"use 0 to {len(node) - 1}")


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
        raise UserError(f"no such config file: {path}", nearest_path(path) + HOW_TO_GET_ONE)
    if file.suffix.lower() in READERS and file.suffix.lower() != ".json":  # JSON is also YAML
        raise UserError(f"{path} is a file of questions, expected a config file", HOW_TO_GET_ONE)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has {file.stat().st_size:,} bytes: it is not a config file", HOW_TO_GET_ONE)
        content = file.read_bytes()
        refuse_other_kind(content, path, "--config")
        raw = parse_yaml(content.decode("utf-8"), path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text, expected a config file", HOW_TO_GET_ONE) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check the file and its mode") from None
    if raw is None:
        raise UserError(f"{path} is empty: it must hold a mapping of settings", HOW_TO_GET_ONE)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of settings, found {type(raw).__name__}", "see configs/lab.yaml")
    return raw
