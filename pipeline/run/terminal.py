"""What a person sees: one line per event (also in the run's log), progress bars on stderr, the final table."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from duet.cache.errors import LOGGER, Interrupted, UserError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
if not out.is_terminal:  # a log file has no width; 80 columns would break the table
    out.width = 160

log = logging.getLogger("duet")  # the run's log: what was said, and the full trace of every error
log.setLevel(logging.INFO)
log.propagate = False
notes = logging.getLogger(LOGGER)
notes.setLevel(logging.INFO)
notes.propagate = False


@dataclass
class _Voice:
    """How much is said, and whether stdout is for JSON alone."""

    level: str = "normal"  # one of arguments.LEVELS
    as_json: bool = False
    last: str | None = None  # line that was not printed, because one that follows may be the last

    @property
    def quiet(self) -> bool:
        return self.level in ("silent", "quiet")


_voice = _Voice()


@contextmanager
def speaking(level: str, as_json: bool) -> Iterator[None]:
    """Speak at this level while the block runs; quiet prints its last line when it has ended well.

    Child processes speak as loud, but those of a quiet one report errors only: the last line is this one's.
    """
    global _voice  # noqa: PLW0603
    before, inherited = _voice, os.environ.get(VERBOSITY)
    _voice = _Voice(level, as_json)
    os.environ[VERBOSITY] = "silent" if level == "quiet" else level
    handler = logging.StreamHandler()  # on stderr
    handler.addFilter(lambda record: record.levelno == logging.DEBUG)  # lines and errors are reported anyway
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    if level == "verbose":
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    try:
        yield
        if level == "quiet" and not as_json and _voice.last is not None:
            out.print(_voice.last, markup=False)
    except (UserError, Interrupted):
        log.debug("the trace", exc_info=True)
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.INFO)
        _voice = before
        os.environ.pop(VERBOSITY)
        if inherited is not None:
            os.environ[VERBOSITY] = inherited


class _Notes(logging.Handler):
    """Shows what stages note."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"note: {record.getMessage()}")


notes.addHandler(_Notes())


def log_to(path: Path) -> None:
    """Append to this file from now on, and to no other."""
    for earlier in [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]:
        log.removeHandler(earlier)
        earlier.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)


def vanished_run() -> Path | None:
    """The run directory with the log, if somebody removed or unmounted it since."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler) and not os.path.exists(handler.baseFilename):
            return Path(handler.baseFilename).parent
    return None


def say(text: str) -> None:
    """One line of news on stdout (on stderr where stdout is for JSON), as it is; a quiet command prints the last one only."""
    log.info(text)
    if _voice.quiet:
        _voice.last = text
    else:
        (err if _voice.as_json else out).print(text, markup=False)


def say_for_children(text: str) -> None:
    """The result that child processes have said already, unless they were to be quiet."""
    if _voice.level == "quiet":
        say(text)


def show(table: RenderableType, result: bool = False, width: int | None = None) -> None:
    """A table, where a command is not quiet; if it is all that the command has to say (`result`), anyway.

    `width` is the largest number of columns; None leaves it to the screen.
    """
    if result or not _voice.quiet:
        (err if _voice.as_json else out).print(table, width=width)


def is_verbose() -> bool:
    """Whether the command was called with -v."""
    return _voice.level == "verbose"


def say_json(value: Mapping[str, Any]) -> None:
    """A command's one JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def say_engine(name: str, reason: str) -> None:
    """Which engine runs, and why this one."""
    say(f"engine: {name} ({reason})")


def be_silent() -> None:
    """Say nothing from now on: another process of the same launch does. Errors are still reported."""
    out.quiet = err.quiet = True


@contextmanager
def progress_bar(unit: str) -> Iterator[ProgressBar]:
    """A bar on stderr with count, rate, time left and a note; none where stderr is not a terminal or the command is quiet."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=_voice.quiet or not err.is_terminal) as progress:
        yield ProgressBar(progress, unit)


class ProgressBar:
    """One task at a time on a rich progress display; the rate is counted from the first update on."""

    def __init__(self, progress: Progress, unit: str) -> None:
        self._progress, self._unit = progress, unit
        self._tasks: dict[str, TaskID] = {}

    def update(self, title: str, done: int, total: int, note: str = "") -> None:
        if title not in self._tasks:
            self._tasks[title] = self._progress.add_task(title, total=total, note="")
        task = self._tasks[title]
        speed = self._progress.tasks[task].speed if task < len(self._progress.tasks) else None
        rate = f"{speed:.0f} {self._unit}/s" if speed else ""
        self._progress.update(task, completed=done, total=total, note="  ".join(filter(None, (note, rate))))


VERBOSITY = "DUET_VERBOSITY"  # environment variable through which child processes know how much to say
LEVELS = ("silent", "quiet", "normal", "verbose")  # silent: errors alone, of child processes of a quiet command
