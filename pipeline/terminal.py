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
from rich.table import Table

from cache.errors import Interrupted, UserError
from cache.record import SUBSETS
from pipeline.arguments import VERBOSITY
from stages.notes import LOGGER

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

    Processes that we start speak as loud, but those of a quiet one tell errors only: the last line is ours.
    """
    global _voice  # noqa: PLW0603
    before, inherited = _voice, os.environ.get(VERBOSITY)
    _voice = _Voice(level, as_json)
    os.environ[VERBOSITY] = "silent" if level == "quiet" else level
    handler = logging.StreamHandler()  # on stderr
    handler.addFilter(lambda record: record.levelno == logging.DEBUG)  # lines and errors are told anyway
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


def say(text: str) -> None:
    """One line of news on stdout (on stderr where stdout is for JSON), as it is; a quiet command prints the last one only."""
    log.info(text)
    if _voice.quiet:
        _voice.last = text
    else:
        (err if _voice.as_json else out).print(text, markup=False)


def say_for_children(text: str) -> None:
    """The result of what processes of ours have said already, unless they were to be quiet."""
    if _voice.level == "quiet":
        say(text)


def show(table: RenderableType, result: bool = False) -> None:
    """A table, where a command is not quiet; if it is all that the command has to say (`result`), anyway."""
    if result or not _voice.quiet:
        (err if _voice.as_json else out).print(table)


def say_json(value: Mapping[str, Any]) -> None:
    """A command's one JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def say_engine(name: str, reason: str) -> None:
    """Which engine runs, and why this one."""
    say(f"engine: {name} ({reason})")


def be_silent() -> None:
    """Say nothing from now on: another process of the same launch does. Errors are still told."""
    out.quiet = err.quiet = True


@contextmanager
def progress_bar(unit: str) -> Iterator[ProgressBar]:
    """A bar on stderr with count, rate, time left and a note; none where stderr is no terminal or the command is quiet."""
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


def progress_note(line: Mapping[str, Any]) -> str:
    """The numbers of a line of metrics.jsonl that are worth watching."""
    subsets = [(name, line[f"loss_{name}"]) for name in SUBSETS]
    losses = ", ".join(f"{name} {loss:.3g}" for name, loss in subsets if loss is not None)
    return (
        f"loss {line['loss']:.3g} ({losses})  {line['tokens_per_s']:,.0f} tok/s  "
        f"stall {100 * line['stall_share']:.0f} %  {line['memory_gb']:.2f} GB"
    )


def loss_in_words(summary: Mapping[str, Any]) -> str:
    """A student's loss and, where the teacher has a name, whom it is against: `l1, mix of mild 0.75 and strict 0.25`."""
    weights = {name: facts["weight"] for name, facts in summary["teachers"].items()}
    if list(weights) == ["teacher"]:
        return summary["loss"]
    if not summary["combine"]:
        return f"{summary['loss']} of {next(iter(weights))}"
    return f"{summary['loss']}, {summary['combine']} of {' and '.join(f'{n} {w:.3g}' for n, w in weights.items())}"


def interval(score: dict[str, Any]) -> str:
    """A score in points with its 95 % interval: `93.3 [86.7, 100.0]`."""
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def results_table(results: dict[str, Any]) -> Table:
    """Models by rows; ROUGE-L recall per set, the worst reverse prompt and the performance shift by columns."""
    keys = {f"{name}.rougeL_recall": f"{name}\nn={info['n']}" for name, info in results["sets"].items()}
    for name, info in results["sets"].items():
        attack = f"attack.reverse_worst.{name}.rougeL_recall"
        if any(attack in scores for scores in results["models"].values()):
            keys[attack] = f"{name}, worst\nreverse prompt\nn={info['n']}"
    table = Table(title="ROUGE-L recall in points [95 % interval]", title_justify="left", caption_justify="left")
    table.add_column("model", no_wrap=True)
    for title in keys.values():
        table.add_column(title, justify="right")
    table.add_column("performance\nshift", justify="right")
    for model, scores in results["models"].items():
        shift = results["performance_shift"].get(model)
        cells = [interval(scores[key]) if key in scores else "-" for key in keys]
        table.add_row(model, *cells, f"{shift['value']:+.1f}" if shift else "-")
    for floor in ("refusal", "echo"):
        values = [results["floors"].get(key, {}).get(floor) for key in keys]
        table.add_row(
            f"[dim]floor: {floor}[/dim]", *(f"[dim]{100 * v:.1f}[/dim]" if v is not None else "" for v in values), ""
        )
    return table


def outcome_lines(results: dict[str, Any]) -> list[str]:
    """The verdict on each model, and what it rests on most; results.json has all reasons."""
    return [
        f"{model}: {outcome['verdict']} ({outcome['reasons'][0]})" for model, outcome in results["outcomes"].items()
    ]


def refusal_lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each set whose refusal rate says little, since no answer is in a language that the patterns know."""
    refusals = results.get("refusals", {})
    what = (
        "only evaluate.refusal_patterns count there"
        if refusals.get("own_patterns")
        else "a rate of 0 means nothing there; add patterns with evaluate.refusal_patterns"
    )
    return [
        f"refusal_rate of {name}: its answers are in no language that the refusal patterns know: {what}"
        for name in refusals.get("unknown_sets", ())
    ]


def costs_table(costs: Mapping[str, Any], num_models: int) -> Table:
    """What an evaluation will ask, by attack: prompts, tokens and training steps over all models."""
    table = Table(
        title=f"What is asked of {num_models} models; what is on disk is not asked again", title_justify="left"
    )
    table.add_column("attack", no_wrap=True)
    for title in ("answers", "prompt tokens", "answer tokens, at most", "training steps"):
        table.add_column(title, justify="right")
    for kind, cost in costs.items():
        counts = (cost.prompts, cost.prompt_tokens, cost.answer_tokens, cost.training_steps)
        table.add_row(kind, *(f"{count:,}" for count in counts))
    return table


def attacks_table(results: dict[str, Any]) -> Table:
    """Attacks by rows, models by columns: what the worst variant per question brings back of the forget set, in points."""
    table = Table(
        title="Forget set under attack, in points: recall with the worst variant per question [95 % interval]",
        title_justify="left",
        caption="sampling: leak@k of the largest k; logit_lens: mean reciprocal rank. no: not shown to work on this model",
        caption_justify="left",
    )
    table.add_column("attack", no_wrap=True)
    table.add_column("works")
    for model in results["models"]:
        table.add_column(model, justify="right")
    first = next(iter(results["models"].values()))
    for kind, work in results["attacks_work"].items():
        begins = (
            f"attack.{kind}.forget.leak@",
            f"attack.{kind}.forget.mrr",
            f"attack.{kind}_worst.forget.rougeL_recall",
        )
        if found := [key for key in first if key.startswith(begins)]:
            cells = [interval(scores[found[-1]]) for scores in results["models"].values()]
            table.add_row(kind, "yes" if work["works"] else "no", *cells)
    return table
