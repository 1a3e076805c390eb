"""Writes the pages that are made from the code, so that the two cannot part.

`make docs-reference` writes docs/reference/: `cli.md` is click's tree of commands, `config.md` the JSON schema of the settings,
with descriptions, defaults and bounds as the code has them. What is hidden in the code is left out. `make docs-metrics` writes
docs/metrics.md from the definitions of the metrics. Run them after changing a command, a setting or a metric.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter

from duet.cache.errors import EXIT_CODES
from duet.cache.files import publishing
from duet.pipeline.cli.main import duet
from duet.pipeline.config.schema import Config
from duet.pipeline.run.terminal import say
from duet.stages.evaluate.definitions import all_metrics, as_markdown
from duet.stages.settings.base import Name

DOCS_DIR = Path(__file__).parent.parent / "docs"
REFERENCE_DIR, METRICS_PATH = DOCS_DIR / "reference", DOCS_DIR / "metrics.md"
NAME_PATTERN = TypeAdapter(Name).json_schema()["pattern"]
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SIMPLE = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "text", "null": "`null`"}

CLI_INTRO = """# Commands

This page is written from the code by `make docs-reference`: change that, not this file.

Every command has `--help`. An option that may be repeated takes one value each time. `KEY=VALUE` names a key of the
[settings](config.md) by its dots, `--set train.lr=1e-5` or `--set students.0.name=base`; the value is YAML.

## Exit codes

"""
CONFIG_INTRO = """# Settings

This page is written from the code by `make docs-reference`: change that, not this file.

One YAML file is one experiment; [configs/lab.yaml](../../configs/lab.yaml) is a short one. An unknown key is an error that
names the nearest known one; so is a setting that would do nothing beside the others. `--set KEY=VALUE` overrides a key by its
dots. In the headings NAME stands for a name of your choice and N for an entry's number in a list, from 0. A *name* is made of
letters, digits, dots, underscores and hyphens and begins with a letter or digit.

"""


def write(path: Path, text: str) -> None:
    """Replace a page as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with publishing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"written: docs/{path.relative_to(DOCS_DIR)}")


def pages() -> dict[str, str]:
    """The pages of the reference by their file names."""
    return {"cli.md": cli_page(duet), "config.md": config_page(Config.model_json_schema())}


def cli_page(group: click.Group) -> str:
    """Every command that is not hidden, in the order of the code, with usage, help and options."""
    codes = _table(("code", "meaning"), [(f"{code}", text) for code, text in EXIT_CODES.items()])
    return CLI_INTRO + codes + "".join(_commands(group, click.Context(group, info_name="duet", show_default=True), 2))


def _commands(group: click.Group, context: click.Context, level: int) -> Iterator[str]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        own = click.Context(command, parent=context, info_name=name)
        about = "\n\n".join(_cell(paragraph) for paragraph in cleandoc(command.help or "").split("\n\n"))
        yield f"\n{'#' * level} {own.command_path}\n\n{about}\n"
        if isinstance(command, click.Group):
            yield from _commands(command, own, level + 1)
        else:
            usage = " ".join([own.command_path, *command.collect_usage_pieces(own)])
            records = [p.get_help_record(own) for p in command.params if isinstance(p, click.Option)]
            options = [(f"`{option}`", _cell(text)) for option, text in filter(None, records)]
            yield f"\n```text\n{usage}\n```\n"
            yield "\n" + _table(("option", "meaning"), options) if options else ""


def config_page(schema: dict[str, Any]) -> str:
    """Every key of every group of settings, from their JSON schema; a group that stands in several places is told once."""
    definitions = schema["$defs"]
    places: dict[str, str] = {}  # where each group is told
    order: list[tuple[str, dict[str, Any]]] = []

    def visit(place: str, group: dict[str, Any]) -> None:
        order.append((place, group))
        for key, node in group["properties"].items():
            for below, name in _groups_in(node, f"{place}.{key}" if place else key):
                if name not in places:
                    places[name] = below
                    visit(below, definitions[name])

    visit("", schema)
    return CONFIG_INTRO + "\n".join(_section(place, group, places) for place, group in order)


def _groups_in(node: dict[str, Any], place: str) -> Iterator[tuple[str, str]]:
    """(place, name of its group) of all groups of settings that this key holds."""
    if "$ref" in node:
        yield place, node["$ref"].rpartition("/")[2]
    for one in node.get("anyOf", node.get("oneOf", ())):
        yield from _groups_in(one, place)
    if isinstance(node.get("items"), dict):
        yield from _groups_in(node["items"], f"{place}.N")
    if values := _values(node):
        yield from _groups_in(values, f"{place}.NAME")


def _values(node: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping's values, empty if they may be anything; of keys that are names it stands under their pattern."""
    values = node.get("additionalProperties") or node.get("patternProperties", {}).get(NAME_PATTERN)
    return values if isinstance(values, dict) else {}


def _section(place: str, group: dict[str, Any], places: dict[str, str]) -> str:
    required = group.get("required", ())
    rows = [
        (
            f"`{key}`",
            _type(node, places),
            "**required**" if key in required else _default(node),
            _cell(node.get("description", "")),
        )
        for key, node in group["properties"].items()
    ]
    about = _cell(group.get("description", "").split("\n\n")[0])
    return f"## {place or 'The file'}\n\n{about}\n\n{_table(('key', 'type', 'default', 'meaning'), rows)}"


def _type(node: dict[str, Any], places: dict[str, str]) -> str:
    """A JSON schema's type as a person would say it."""
    if "$ref" in node:
        place = places[node["$ref"].rpartition("/")[2]]
        return f"[{place}](#{place.lower().replace('.', '')})"
    if kinds := node.get("anyOf", node.get("oneOf")):
        return " or ".join(_type(one, places) for one in kinds)
    if "enum" in node or "const" in node:
        *most, last = [f"`{value}`" for value in node.get("enum", [node.get("const")])]
        return f"{', '.join(most)} or {last}" if most else last
    kind = node.get("type")
    if kind == "array" and "prefixItems" in node:
        return f"list of {len(node['prefixItems'])}: {', '.join(_type(one, places) for one in node['prefixItems'])}"
    if kind == "array":
        return f"list{_at_least_one(node)} of {_type(node.get('items', {}), places)}"
    if kind == "object":
        return f"names to {_type(_values(node), places)}"
    if node.get("pattern") == NAME_PATTERN:
        return "name"
    bounds = [f"{sign} {node[bound]:g}" for bound, sign in BOUNDS.items() if bound in node]
    return " ".join([SIMPLE.get(str(kind), "anything") + _at_least_one(node), ", ".join(bounds)]).strip()


def _at_least_one(node: dict[str, Any]) -> str:
    return ", not empty," if node.get("minItems") == 1 else ", not empty" if node.get("minLength") == 1 else ""


def _default(node: dict[str, Any]) -> str:
    if isinstance(node.get("default"), dict) and node["default"]:
        return "that of each key"
    return f"`{json.dumps(node.get('default'), ensure_ascii=False)}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(text: str) -> str:
    """Text of the code as it can stand in a table: on one line, and nothing in it is taken for markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main(parts: list[str]) -> None:
    """Write the parts that are named, `metrics` or `reference`; both by default."""
    if not parts or "metrics" in parts:
        write(METRICS_PATH, as_markdown(all_metrics()))
    if not parts or "reference" in parts:
        for name, text in pages().items():
            write(REFERENCE_DIR / name, text)


if __name__ == "__main__":
    main(sys.argv[1:])
