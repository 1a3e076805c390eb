"""Errors as a person reads them: two lines on stderr, with the number of the process where a launch has several."""

from __future__ import annotations

import os

import click

from duet.cache.errors import NotPermitted, UserError
from duet.cache.files import MAKE_SPACE_HINT, NO_ROOM, NOT_ALLOWED, NOT_WRITABLE_HINT, DiskFull


def rank() -> str:
    """The number of this process in its launch; empty for the first and where there is no other."""
    number = os.environ.get("RANK", "") if "WORLD_SIZE" in os.environ else ""
    return "" if number == "0" else number


def tell(text: str) -> None:
    """Write to stderr; each line names its process, if that is not the first."""
    prefix = f"rank {rank()}: " if rank() else ""
    click.echo("\n".join(prefix + line for line in text.splitlines()), err=True)


def hint_for(error: click.ClickException) -> str:
    """What to do about a faulty command line."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "duet"
    if isinstance(error, click.MissingParameter) and error.param and error.param.name == "config_path":
        return f"{command} --config FILE, the experiment's YAML file; `duet init` writes one"
    return f"{command} --help"


def of_the_place(error: Exception) -> UserError | None:
    """What the user reads where a run's directory was removed, a disk is full, or this process may not read or write there.

    None of any other error.
    """
    from duet.pipeline.run.terminal import vanished_run

    if not isinstance(error, OSError):
        return None
    if run := vanished_run():
        hint = "leave a run's directory alone until its command has ended; the same command begins again"
        return UserError(f"{run} disappeared while the command was writing there", hint)
    name = error.filename or "a file of the run"
    if error.errno in NOT_ALLOWED:
        return NotPermitted(f"cannot read or write {name}: {error.strerror}", NOT_WRITABLE_HINT)
    if error.errno in NO_ROOM:
        return DiskFull(f"cannot write {name}: {error.strerror}", MAKE_SPACE_HINT)
    return None
