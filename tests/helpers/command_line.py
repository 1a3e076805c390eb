"""The command line in this process and in a process of its own, and small runs to try it on."""

from __future__ import annotations

import subprocess
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from support import ROOT, two_sets
from warm import PROGRAM

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.pipeline.cli.main import main

QUESTIONS = [{"question": f"Where was person {i} born?", "answer": "In a town."} for i in range(4)]
RUN = "from duet.pipeline.cli.main import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Done:
    """A command that has ended in this process."""

    code: int
    out: str
    err: str


def duet(*arguments: str) -> Done:
    """Run a command in this process; what its child processes print is not part of `out`."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(arguments))
    return Done(code, out.getvalue(), err.getvalue())


def all_stages(*arguments: str) -> str:
    """What `duet run` starts, in this process; what the three stages print."""
    printed = ""
    for stage in ("teacher-logits", "distill", "evaluate"):
        done = duet(stage, *arguments)
        assert done.code == EXIT_DONE, done.err
        printed += done.out
    return printed


def refused(capsys, *arguments: str) -> tuple[str, str]:
    """Run in this process; exit code 2 and two lines: what is wrong, and the hint."""
    code = main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == EXIT_USER
    assert len(lines) == 2, lines
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0], lines[1]


def small_run(lab_config, tmp_path, **changes) -> Path:
    """A config of eight queries."""
    data = two_sets(tmp_path, QUESTIONS)
    return lab_config(data=data, store__shard_rows=3, train__epochs=2, train__batch_size=4, **changes)


def interrupted(patch: str, *arguments: str, after: int, name: str = "SIGTERM") -> subprocess.CompletedProcess[str]:
    code = patch.format(after=after, signal=name) + RUN
    return subprocess.run([*PROGRAM, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
