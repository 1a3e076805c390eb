"""The reference is what the code says today, complete, and readable where types are free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import click
import pytest
from docs_pages import REFERENCE_DIR, cli_page, config_page, pages
from pydantic import BaseModel, Field

from duet.pipeline.cli.main import duet
from duet.pipeline.config.schema import Config
from duet.stages.settings.base import Name, Settings


@pytest.mark.parametrize("name", ["cli.md", "config.md"])
def test_the_reference_is_that_of_the_code(name):
    page = pages()[name]
    assert (REFERENCE_DIR / name).read_text(encoding="utf-8") == page, f"{name} is stale: run `make docs-reference`"


def leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def test_every_command_has_help_and_stands_in_the_reference_with_all_its_options():
    page = pages()["cli.md"]
    for path, command in leaves(duet, "duet"):
        assert command.help, path
        section = page.split(f"# {path}\n", 1)[1].split("\n#", 1)[0]
        for option in command.params:
            hidden = isinstance(option, click.Option) and option.hidden
            stands = re.search(rf"\| `[^`]*{re.escape(max(option.opts, key=len))}\b", section) is not None
            assert stands == (isinstance(option, click.Option) and not hidden), (path, option)
            assert hidden or not isinstance(option, click.Option) or option.help, (path, option)
    assert "--child" not in page
    assert all(f"\n| {code} | " in page for code in (0, 1, 2, 75))


def test_hidden_commands_and_defaults():
    @click.group()
    def top() -> None:
        """Top."""

    @top.command()
    @click.option("--much", type=click.IntRange(1, 9), default=3, help="How <much> | many.")
    @click.argument("what")
    def shown(**_: Any) -> None:
        """Show it.

        At length.
        """

    @top.command(hidden=True)
    def secret() -> None:
        """Do not tell."""

    page = cli_page(top)
    assert "## duet shown\n\nShow it.\n\nAt length.\n\n```text\nduet shown [OPTIONS] WHAT\n```" in page
    assert "| `--much INTEGER RANGE` | How &lt;much> \\| many. [default: 3; 1&lt;=x&lt;=9] |" in page
    assert "secret" not in page


def groups(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    schema = model.model_json_schema()
    return {model.__name__: schema, **schema["$defs"]}


def test_every_key_of_every_group_is_described_and_stands_in_the_reference():
    page = pages()["config.md"]
    for name, group in groups(Config).items():
        for key, node in group["properties"].items():
            assert node.get("description"), (name, key)
            row = next((line for line in page.splitlines() if line.startswith(f"| `{key}` | ")), None)
            assert row is not None, (name, key)
    assert page.count("\n## ") == len(groups(Config)), "each group is told once"


class Inner(Settings):
    """Within."""

    deep: int = Field(default=1, description="deep down")


class Example(Settings):
    """Of every kind."""

    one: Inner = Field(default=Inner(), description="a group")
    many: tuple[Inner, ...] = Field(default=(), description="a list of it")
    named: dict[Name, Inner] = Field(default={}, description="by name")
    either: str | Inner | None = Field(default=None, description="a | b")
    words: tuple[str, ...] | Literal["all"] = Field(default=("a",), description="<b> *c*")
    pair: tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, le=1)]] = Field(description="two")
    free: dict[str, Any] = Field(default={}, description="whatever")
    choice: Literal["a", "b", "c"] = Field(default="a", description="one of")
    name: Name = Field(description="called")


def test_types_defaults_and_bounds_are_readable():
    page = config_page(Example.model_json_schema())
    rows = [
        "| `one` | [one](#one) | that of each key | a group |",
        "| `many` | list of [one](#one) | `[]` | a list of it |",
        "| `named` | names to [one](#one) | `{}` | by name |",
        "| `either` | text or [one](#one) or `null` | `null` | a \\| b |",
        '| `words` | list of text or `all` | `["a"]` | &lt;b> \\*c\\* |',
        "| `pair` | list of 2: integer ≥ 0, number > 0, ≤ 1 | **required** | two |",
        "| `free` | names to anything | `{}` | whatever |",
        '| `choice` | `a`, `b` or `c` | `"a"` | one of |',
        "| `name` | name | **required** | called |",
        "## one\n\nWithin.",
        "| `deep` | integer | `1` | deep down |",
    ]
    for row in rows:
        assert row in page, row
