"""What a user is told: errors that stop a run, notes that do not, and the name that was probably meant.

`UserError` is shown as two lines and ends the program with exit code 2; `Interrupted` ends it with 75, which schedulers
read as "run the same command again". Everything else that is raised is a bug in Duet. This file lies in the lowest package
because all packages need it.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 75
EXIT_CODES = {  # of every command, as the reference of commands tells them
    EXIT_DONE: "done",
    EXIT_BUG: "a bug in Duet: please report it with the lines that it printed",
    EXIT_USER: "an error you can fix: two lines say what and how; the run's `log.txt` has the traceback",
    EXIT_INTERRUPTED: "interrupted: finished work is kept; run the same command again to resume",
}


class UserError(Exception):
    """Something the user can fix: `what` is wrong (found, expected, where) and a `hint` what to do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}\nhint: {hint}")
        self.what = what
        self.hint = hint


class Interrupted(Exception):
    """A signal came or a process died, and the state on disk is resumable: the same command goes on from there."""


def near_path(path: str) -> str:
    """`did you mean X? ` where each part of the path is there or has a name like it beside it; else nothing."""
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


LOGGER = "duet.notes"  # `pipeline/run/terminal.py` listens to it; other programs may, too


def note(text: str) -> None:
    """Tell the user something that stops nothing."""
    logging.getLogger(LOGGER).info(text)
