"""What commands have in common: -q, -v and --json before or after a command's name, help with mistyped names, and the options
of those that work on an experiment.

Commands are made with `Group.command`, so that a new one has all this without a word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from duet.cache.errors import UserError, did_you_mean
from duet.pipeline.run.terminal import LEVELS, VERBOSITY

_ASKED = "duet.asked"  # in click's context: which of the common options were given, wherever they stood

log = logging.getLogger("duet")


class Command(click.Command):
    """A command that takes -q and -v, and --json where it has an option of that name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common()

    @property
    def json_name(self) -> str | None:
        """The parameter that --json sets; None where the command has no output for programs."""
        return next((param.name for param in self.params if "--json" in param.opts), None)

    def invoke(self, ctx: click.Context) -> Any:
        asked = ctx.meta.get(_ASKED, set())
        if "as_json" in asked:
            if self.json_name is None:
                names = ", ".join(path for path, command in leaves(ctx.find_root().command) if command.json_name)
                raise UserError(
                    f"`{ctx.command_path}` has no output as JSON", f"leave out --json; these have it: {names}"
                )
            ctx.params[self.json_name] = True
        as_json = bool(self.json_name and ctx.params[self.json_name])
        level = _level(asked)
        if level == "normal" and not as_json:
            return super().invoke(ctx)
        from duet.pipeline.run.terminal import speaking

        with speaking(level, as_json):
            log.debug("%s %s", ctx.command_path, {key: value for key, value in ctx.params.items() if value})
            return super().invoke(ctx)


class Group(click.Group):
    """A group of such commands that takes the common options for all of them."""

    command_class = Command
    group_class = type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            *_common(),
            _option("--json", "as_json", help="One JSON object on stdout, where a command has one."),
        ]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = did_you_mean(args[0], self.commands, f"`{ctx.command_path} {{}}`")
            known = [name for name, command in self.commands.items() if not command.hidden]
            raise UserError(
                f"No such command {args[0]!r} of `{ctx.command_path}`", f"{hint}The commands are {', '.join(known)}"
            )
        return super().resolve_command(ctx, args)


def leaves(command: click.Command, path: str = "duet") -> Iterator[tuple[str, Command]]:
    """Every command that does something, with what one types for it."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from leaves(inner, f"{path} {name}")
    elif isinstance(command, Command):
        yield path, command


def _common() -> list[click.Parameter]:
    return [
        _option("-q", "--quiet", help="Only errors and the last line."),
        _option("-v", "--verbose", help="Details and the traceback of an error, on stderr; intervals in the tables."),
    ]


def _option(*names: str, help: str) -> click.Option:
    return click.Option(names, is_flag=True, expose_value=False, callback=_note, help=help)


def _note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta.setdefault(_ASKED, set()).add(param.name)


def _level(asked: set[str]) -> str:
    """How much is said: as asked for, else as the environment says."""
    if {"quiet", "verbose"} <= asked:
        raise UserError("--quiet and --verbose were both given", "leave one out")
    for name in ("quiet", "verbose"):
        if name in asked:
            return name
    level = os.environ.get(VERBOSITY, "normal")
    if level not in LEVELS:
        raise UserError(f"{VERBOSITY} is {level!r} in the environment", f"set it to one of {', '.join(LEVELS)}")
    return level


def experiment(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that works on an experiment."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. --set train.lr=1e-5."
    )(command)
    return click.option(
        "--config",
        "config_path",
        required=True,
        metavar="FILE",
        shell_complete=files,
        help="The experiment's YAML file.",
    )(command)


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completed by the shell itself."""
    return [CompletionItem(incomplete, type="file")]


def students(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that works on students."""
    command = click.option(
        "--sweep", "sweeps", multiple=True, metavar="KEY=V1,V2,…",
        help="Train one student per value, of train or of the student's own, e.g. --sweep train.lr=1e-5,1e-4 or "
        "--sweep start_noise=0,0.3; several options make a grid.",
    )(command)  # fmt: skip
    return click.option("--only", multiple=True, metavar="NAME", help="Only this student; can be repeated.")(command)
