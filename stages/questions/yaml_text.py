"""YAML as people mean it: no key twice, dates and times stay text, 1e-5 is a number. Every fault is told in two lines.

YAML 1.1 turns 2026-07-01 into a date, 4:00:00 into 14400, 010 into 8 and 1e-5 into text. Here the first three are text, which
a setting that is a number reads as people do, and the last is a number. `yes`, `no`, `on` and `off` are still true and false.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from duet.cache.errors import UserError
from duet.stages.questions.text_files import FAULT_HINT, fault_of

_TAG = "tag:yaml.org,2002:"
_OTHERWISE = ("int", "float", "timestamp", "value")  # what YAML 1.1 reads in another way than people do
_INT = re.compile(r"[-+]?(0|[1-9]\d*)\Z")
_FLOAT = re.compile(r"([-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")
_HINTS = (  # a part of what PyYAML says -> what to do
    ("'\\t'", "indent with spaces: YAML takes no tabs"),
    ("unknown escape character", "in double quotes a backslash begins an escape: write the text in single quotes"),
    ("mapping values are not allowed", "write a text with a colon in quotes"),
    ("undefined alias", "write a text that begins with * in quotes"),
    ("constructor for the tag", "write a text that begins with ! in quotes"),
    ("cannot start any token", "write a text that begins with that character in quotes"),
    ("another document", "a file holds one document: take the line --- out"),
    ("occurs twice", "keep one of the two"),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's plain loader with other rules for numbers, which refuses a key that a mapping has twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own table
        first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_TAG) not in _OTHERWISE]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (earlier := lines.get((key.tag, key.value))) is not None:
                problem = f"the key {key.value!r} occurs twice, first in line {earlier}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node


_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Puts in quotes whatever this module or another reader of YAML would not read as the text that it is."""


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_OTHER_BREAKS = re.compile("[\x85\u2028\u2029]")  # line breaks to YAML, which only double quotes keep


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if _OTHER_BREAKS.search(text) else None)


_Dumper.add_representer(str, _text)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a text in YAML; UserError, which begins with `name`, for what is not valid or is not whole."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or ""
        hint = next((hint for part, hint in _HINTS if part in problem), "mind indentation and quotes")
        raise UserError(f"{name} is not valid YAML{at}: {problem}", hint) from None
    except yaml.YAMLError as error:  # characters that YAML does not have
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}", "mind odd characters") from None
    except RecursionError:
        raise UserError(f"{name} is nested too deeply", "take out brackets or dashes") from None
    except ValueError as error:  # a number of too many digits, or a tag with another value than it says
        raise UserError(f"{name} has a value that cannot be read: {error}", "write it in quotes") from None
    for key, part in _texts("", value, set()):
        if fault := fault_of(part):
            raise UserError(f"{name}{key and ': '}{key} {fault}", FAULT_HINT)
    return value


def dump_yaml(value: Any) -> str:
    """A text that `parse_yaml`, and any reader of YAML 1.1, turns into the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _texts(key: str, value: Any, seen: set[int]) -> Iterator[tuple[str, str]]:
    """All texts within a value, keys too, each with its dotted key; what an anchor repeats, once."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for name, entry in entries:
            inner = f"{key}.{name}" if key else str(name)
            if isinstance(name, str):
                yield ascii(inner), name
            yield from _texts(inner, entry, seen)
