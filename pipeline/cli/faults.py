"""Errors as a person reads them: two lines on stderr, with the number of the process where a launch has several."""

from __future__ import annotations

import os

import click


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
