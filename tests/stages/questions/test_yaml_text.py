"""YAML as people write it: what is read, what is refused, and that what is written is read the same."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from duet.cache.errors import UserError
from duet.stages.questions.yaml_text import dump_yaml, parse_yaml

READ = {  # what stands in a file -> what it means
    "2026-07-01": "2026-07-01",
    "4:00:00": "4:00:00",
    "1-12:00:00": "1-12:00:00",
    "010": "010",
    "0x1F": "0x1F",
    "=": "=",
    "1.2.3": "1.2.3",
    "1e-5": 1e-5,
    "-2.5E+3": -2500.0,
    ".5": 0.5,
    "12": 12,
    "-0": 0,
    "yes": True,
    "off": False,
    "~": None,
    "'1e-5'": "1e-5",
}


@pytest.mark.parametrize("text", READ)
def test_values_are_what_people_mean(text):
    found = parse_yaml(f"key: {text}", "c.yaml")["key"]
    assert (found, type(found)) == (READ[text], type(READ[text]))


REFUSED = {  # text -> what is told, and what to do
    "a: 1\nb: {}\na: 2": ("line 3, column 1: the key 'a' occurs twice, first in line 1", "keep one"),
    "a:\n  b: 1\n  'b': 2": ("line 3, column 3: the key 'b' occurs twice, first in line 2", "keep one"),
    "- {b: 1, b: 1}": ("the key 'b' occurs twice", "keep one"),
    "a: {<<: {b: 1}, c: 1, c: 2}": ("the key 'c' occurs twice", "keep one"),
    "a:\n\tb: 1": ("line 2, column 1: found character '\\t'", "no tabs"),
    'a: "C:\\data"': ("unknown escape character 'd'", "single quotes"),
    "a: Harry: the boy": ("mapping values are not allowed here", "colon in quotes"),
    "a: *all": ("undefined alias 'all'", "in quotes"),
    "a: !env HOME": ("tag '!env'", "in quotes"),
    "a: @home": ("found character '@'", "in quotes"),
    "a: 1\n---\na: 2": ("line 2, column 1: but found another document", "one document"),
    'a: {b: ["x", "\\ud83d"]}': (
        "c.yaml: a.b.1 holds half of a surrogate pair (\\ud83d, character 0)",
        "whole character",
    ),
    'a: "\\ud83d\\ude42"': ("a holds half of a surrogate pair", "whole character"),
    '"\\ud83d": 1': ("'\\ud83d' holds half", "whole character"),
    'a: "\\0"': ("a holds a NUL character", "whole character"),
    "[" * 5000: ("is nested too deeply", "brackets"),
    "a: !!int x": ("cannot be read", "in quotes"),
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_is_told_with_its_place_and_what_to_do(text):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "c.yaml")
    what, hint = REFUSED[text]
    assert caught.value.what.startswith("c.yaml")
    assert what in caught.value.what
    assert hint in caught.value.hint
    caught.value.what.encode()  # can be printed


def test_anchors_and_what_a_mapping_changes_of_them_are_read():
    text = "base: &base {x: 1, y: 1}\nown: {<<: *base, x: 2}\nagain: &again [*again]"
    found = parse_yaml(text, "c.yaml")
    assert found["own"] == {"x": 2, "y": 1}


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(
    TEXTS | st.sampled_from(["1e-5", "2026-07-01", "4:00", "010", "no", "1_0"]) | st.integers() | st.booleans()
    | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
@example("\x85")
@example("a\u2028b")
@example({"\u2029": "\x85 "})
def test_what_is_written_is_read_the_same_here_and_by_others(value):
    text = dump_yaml({"value": value})
    assert parse_yaml(text, "c.yaml") == yaml.safe_load(text) == {"value": value}
