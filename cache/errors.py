"""The two ways in which a run stops on purpose. Everything else that is raised is a bug of ours.

`UserError` is shown as two lines and ends the program with exit code 2; `Interrupted` ends it with 75, which schedulers
read as "run the same command again". Both live in the lowest package because all three raise them.
"""

from __future__ import annotations

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 75
EXIT_CODES = {  # of every command, as the reference of commands tells them
    EXIT_DONE: "done",
    EXIT_BUG: "a bug in Duet: please report it with the lines that it printed",
    EXIT_USER: "you can mend it: two lines say what is wrong and what to do, `log.txt` of the run has the full trace",
    EXIT_INTERRUPTED: "interrupted, and what was done is kept: run the same command again, it goes on from there",
}


class UserError(Exception):
    """Something the user can mend: `what` is wrong (found, expected, where) and a `hint` what to do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}\nhint: {hint}")
        self.what = what
        self.hint = hint


class Interrupted(Exception):
    """A signal came or a process died, and the state on disk is resumable: the same command goes on from there."""
