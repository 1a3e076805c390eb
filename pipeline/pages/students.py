"""Students beside each other: the table that ends stage two, and students.html and students.json of the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import yaml
from rich.table import Table

from duet.cache.files import publish_json, publishing
from duet.cache.record import MAIN_SUBSETS, SUBSETS
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.charts import Dot, colours, curves, legend_of_lines, scatter
from duet.pipeline.pages.page import page
from duet.pipeline.pages.tables import WIDTH, loss_in_words, noise_in_words, plain_table
from duet.pipeline.run.named_models import model_name
from duet.pipeline.run.terminal import is_verbose, say, show
from duet.stages.student.summary import TrainingSummary, read_summary

COLUMNS = ("student", "start", "loss", "trained", "steps", "time", "speed", "memory", "last\nloss")
DETAILS = ("trained", "steps", "speed", "memory")  # on the page, and on the screen with -v
SHARES = {"agreement": "as the teacher, %", "refusal": "refuses, %"}  # of each subset, in a column each


@dataclass(frozen=True)
class FinishedStudent:
    """One student that is done, as it stands in students.json."""

    start: str  # the model that it started from
    summary: TrainingSummary

    @property
    def start_in_words(self) -> str:
        """`base + 0.5 noise`, or the model's name alone."""
        return self.start + noise_in_words(self.summary.start_noise)

    @property
    def loss_in_words(self) -> str:
        return loss_in_words(self.summary.loss, self.summary.combine, self.summary.teacher_weights)

    def as_json(self) -> dict[str, Any]:
        return {"start": self.start, **self.summary.as_json()}


def write_students_page(config: Config) -> None:
    """Print the config's students that are done, and write the page and the numbers of all that are done in the run."""
    students = finished_students(config.run)
    if not students:
        return
    asked = {student.name for student in config.students}
    verbose = is_verbose()
    table = students_table([student for student in students if student.summary.name in asked], verbose)
    show(table, width=None if verbose else WIDTH)
    path = config.run.students_page
    found = {"format_version": 1, "run": config.name, "students": [student.as_json() for student in students]}
    publish_json(config.run.students_json, found)
    with publishing(path) as temporary:
        temporary.write_text(render(config.name, students), encoding="utf-8")
    say(f"students: {path}")


def finished_students(run: RunDir) -> list[FinishedStudent]:
    """Every student of the run that is done, in the run's order."""
    settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    return [
        FinishedStudent(
            model_name(student["model"] or settings["teacher"]["model"]),
            read_summary(run.student(student["name"]).path),
        )
        for student in settings["students"]
        if run.student(student["name"]).is_done
    ]


def _subsets(students: Sequence[FinishedStudent]) -> list[str]:
    """Those that some of the students were probed on."""
    return [s for s in SUBSETS if any(f"agreement.{s}" in student.summary.probe for student in students)]


def columns(subsets: Sequence[str]) -> list[str]:
    """Titles of the table, whose last columns have a share of each subset."""
    return [*COLUMNS, *(f"{title}\n{' / '.join(subsets)}" for title in SHARES.values())]


def cells(student: FinishedStudent, subsets: Sequence[str] = MAIN_SUBSETS) -> list[str]:
    """One row under `columns`; with units, so that each cell can be read alone."""
    summary = student.summary
    return [
        summary.name,
        student.start_in_words,
        student.loss_in_words,
        f"{_millions(summary.trained_parameters)} of {_millions(summary.parameters)} M",
        str(summary.steps),
        f"{summary.train_s:,.1f} s",
        f"{summary.tokens_per_s:,.0f} tok/s",
        f"{summary.peak_memory_gb:.2f} GB",
        f"{summary.curve[-1][1]:.3g}",
        *(" / ".join(_percent(summary.probe.get(f"{what}.{s}")) for s in subsets) for what in SHARES),
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def students_table(students: Sequence[FinishedStudent], verbose: bool = False) -> Table:
    """One row per student; `verbose` adds DETAILS."""
    subsets = _subsets(students)
    titles = columns(subsets)
    shown = [number for number, title in enumerate(titles) if verbose or title not in DETAILS]
    caption = (
        f"as the teacher: first token of {_probed(students)}{'' if verbose else '; -v adds details of the training'}"
    )
    table = plain_table(caption)
    for number in shown:
        is_text = number < 3
        table.add_column(
            titles[number],
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
            vertical="bottom",
        )
    for student in students:
        row = cells(student, subsets)
        table.add_row(*(row[number] for number in shown))
    return table


def _probed(students: Sequence[FinishedStudent]) -> str:
    held_out = {student.summary.probe["held_out"] for student in students}
    rows = {True: "held-out rows", False: "rows that were trained on"}
    return " or ".join(rows[kind] for kind in sorted(held_out))


def render(run: str, students: Sequence[FinishedStudent]) -> str:
    """The whole page as HTML text, a pure function of students.json."""
    by_name = {f"student:{student.summary.name}": student.summary for student in students}
    palette = colours(list(by_name))
    subsets = _subsets(students)
    shares = {name: [s.probe[f"agreement.{subset}"] for subset in MAIN_SUBSETS] for name, s in by_name.items()}
    dots = {name: Dot(forget, retain) for name, (forget, retain) in shares.items() if None not in (forget, retain)}
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns(subsets))
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(student, subsets))}</tr>" for student in students
    )
    reasons = "".join(
        f"<li>{escape(s.summary.name)}: {escape(s.loss_in_words)}, {escape(s.summary.loss_reason)}; "
        f"{escape(s.summary.head)}</li>"
        for s in students
    )
    body = (
        f'<h2>Side by side</h2><div class="scroll"><table><caption>As the teacher: share of {_probed(students)} where the '
        "most likely first token is the teacher's. Refuses: share where it is one with which the teacher refuses."
        f"</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<ul class="note">{reasons}</ul>'
        "<h2>Forgetting against keeping</h2>"
        '<p class="note">Share of first tokens that are the teacher\'s: on forget questions to the right, on retain '
        "questions upwards. The teacher itself stands in the upper right corner.</p>"
        + scatter(dots, palette, ("forget, %", "retain, %"), "First tokens as the teacher's")
        + f"<h2>Training</h2>{legend_of_lines(palette)}"
        + curves({name: s.curve for name, s in by_name.items()}, palette, "Training loss by step")
        + '<p class="note">Losses of different kinds do not compare.</p>'
    )
    return page(f"Students of {run}", f"{len(students)} students that are done", body)
