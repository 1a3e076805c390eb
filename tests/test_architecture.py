"""docs/architecture.md is the code: rooms, import rule, and three ways that a run really takes, file by file, in that order."""

from __future__ import annotations

import ast
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import small_run
from support import ROOT
from test_house import MAY_IMPORT

from duet.cache.errors import EXIT_DONE
from duet.pipeline.cli.main import main

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\d+\. `([\w/]+\.py): ([\w.]+)` ", re.MULTILINE)
Step = tuple[str, str]  # file and qualified name of a function


def way(title: str) -> list[Step]:
    """The numbered list under a heading that begins like this."""
    [section] = re.findall(rf"^### {title}.*?\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return STEP.findall(section)


# Title, the most files that it may take, and the command that takes it.
WAYS = {"One query": (7, "teacher-logits"), "One batch": (6, "distill"), "One attack": (4, "evaluate")}


def functions(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))


@pytest.mark.parametrize("title", WAYS)
def test_each_way_is_short_and_its_functions_exist(title):
    steps = way(title)
    assert 1 < len({file for file, _ in steps}) <= WAYS[title][0]
    for file, function in steps:
        assert function in set(functions(ROOT / file)), f"{file} has no {function}"


def test_each_room_stands_there_with_what_it_may_import():
    rows: dict[str, str] = {}
    for room, holds, may_import in re.findall(r"^\| `([\w/]+)/` \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE):
        text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert text == f"{holds}.", room
        rows[room.replace("/", ".")] = may_import
    assert rows == {room: rooms or "-" for room, rooms in MAY_IMPORT.items()} | {"cache": "-"}


def entered(steps: list[Step], run: Callable[[], int]) -> list[Step]:
    """Those functions, as often and in the order in which the run enters them, in all of its threads."""
    wanted, found = set(steps), []

    def profile(frame, event, _):
        if event == "call":
            code = frame.f_code
            step = (code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname)
            if step in wanted:
                found.append(step)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        code = run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert code == EXIT_DONE
    return found


def test_a_run_takes_the_three_ways(lab_config, tmp_path):
    """On the lab's model and few questions: each list is met step by step, from its first to its last."""
    config = str(small_run(lab_config, tmp_path))
    for title, (_, command) in WAYS.items():
        steps = way(title)
        ahead = iter(entered(steps, lambda command=command: main([command, "--config", config])))
        for step in steps:
            assert step in ahead, f"{title}: {step} is not entered after the one before it"
