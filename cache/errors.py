"""Messages to the user: errors that stop a run, notes that do not, and suggestions for a mistyped name.

`UserError` is shown as two lines and ends the program with exit code 2; `Interrupted` ends it with 75, which schedulers
read as "run the same command again". Every other exception is a bug in Duet. `UserError` has children only where code asks
which error it was. This file lies in the lowest package because all packages need it.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 75
EXIT_CODES = {  # of every command; docs/reference shows these texts
    EXIT_DONE: "done",
    EXIT_BUG: "a bug in Duet: please report it together with its output",
    EXIT_USER: "an error you can fix: two lines say what and how; the run's `log.txt` has the traceback",
    EXIT_INTERRUPTED: "interrupted, and finished work is kept: run the same command again to continue",
}


class UserError(Exception):
    """Something the user can fix: `what` is wrong (found, expected, where), and a `hint` that says what to do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}\nhint: {hint}")
        self.what = what
        self.hint = hint


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


class IncompleteStore(UserError):
    """Stage one has not written a store yet, or only a part of it."""


class DamagedStore(UserError):
    """A store cannot be used: a file of it is missing or changed, or is not one that this version reads."""


class NotPermitted(UserError):
    """This process may not read or write a file or folder."""


class Interrupted(Exception):
    """A signal came or a process died; the state on disk is resumable with the same command."""


def did_you_mean(name: str, valid: Iterable[str], form: str = "{}", cutoff: float = 0.6) -> str:
    """`did you mean X? ` with the valid name that is most like this one, put into `form`; empty if none is like it.

    `cutoff`, from 0 to 1: how much alike two names must be.
    """
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f"did you mean {form.format(near[0])}? " if near else ""


def nearest_path(path: str) -> str:
    """`did you mean X? ` if each part of the path exists or is like the name of something in its folder; else empty."""
    if path.startswith("~"):
        return f"~ is the shell's: did you mean {Path(path).expanduser()}? "
    wanted = Path(path)
    found = Path(wanted.anchor or ".")
    for part in wanted.parts[1:] if wanted.anchor else wanted.parts:
        if (found / part).exists():
            found /= part
            continue
        names = [entry.name for entry in found.iterdir()] if found.is_dir() else []
        near = difflib.get_close_matches(part, names, n=1)
        if not near:
            return ""
        found /= near[0]
    return f"did you mean {found}? "


LOGGER = "duet.notes"  # `pipeline/run/terminal.py` listens to it, and other programs may


def note(text: str) -> None:
    """Report something that stops nothing."""
    logging.getLogger(LOGGER).info(text)
