"""Students beside each other: the table that ends stage two, and students.html and students.json of the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml
from rich.table import Table

from duet.cache.files import publish_json, publishing, read_json
from duet.cache.record import SUBSETS
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.charts import Dot, colours, curves, legend_of_lines, scatter
from duet.pipeline.pages.page import page
from duet.pipeline.pages.tables import loss_in_words
from duet.pipeline.run.named_models import model_name
from duet.pipeline.run.terminal import say, show

COLUMNS = (
    "student", "start", "loss", "trained", "steps", "time", "speed", "memory", "last\nloss",
    "as the teacher, %\nforget / retain", "refuses, %\nforget / retain",
)  # fmt: skip

Summary = Mapping[str, Any]  # what training.json holds, and `start`


def write_students_page(config: Config) -> None:
    """Print the config's students that are done, and write the page and the numbers of all that are done in the run."""
    students = finished_students(config.run)
    if not students:
        return
    asked = {student.name for student in config.students}
    show(students_table([student for student in students if student["name"] in asked]))
    path = config.run.students_page
    publish_json(config.run.students_json, {"format_version": 1, "run": config.name, "students": students})
    with publishing(path) as temporary:
        temporary.write_text(render(config.name, students), encoding="utf-8")
    say(f"students: {path}")


def finished_students(run: RunDir) -> list[dict[str, Any]]:
    """What training.json says of every student of the run that is done, and what it started from, in the run's order."""
    settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    return [
        {"start": model_name(student["model"] or settings["teacher"]["model"]), **read_json(files.training)}
        for student in settings["students"]
        if (files := run.student(student["name"])).is_done
    ]


def cells(student: Summary) -> list[str]:
    """One row under COLUMNS; with units, so that each cell can be read alone."""
    trained, of_all = (_millions(student[key]) for key in ("trained_parameters", "parameters"))
    return [
        student["name"],
        student["start"],
        loss_in_words(student),
        f"{trained} of {of_all} M",
        str(student["steps"]),
        f"{student['train_s']:,.1f} s",
        f"{student['tokens_per_s']:,.0f} tok/s",
        f"{student['peak_memory_gb']:.2f} GB",
        f"{student['curve'][-1][1]:.3g}",
        *(" / ".join(_percent(student["probe"][f"{what}.{s}"]) for s in SUBSETS) for what in ("agreement", "refusal")),
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def students_table(students: Sequence[Summary]) -> Table:
    """One row per student."""
    title = f"Students; as the teacher: first token of {_probed(students)}"
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(COLUMNS):
        is_text = number < 3
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for student in students:
        table.add_row(*cells(student))
    return table


def _probed(students: Sequence[Summary]) -> str:
    held_out = {student["probe"]["held_out"] for student in students}
    rows = {True: "held-out rows", False: "rows that were trained on"}
    return " or ".join(rows[kind] for kind in sorted(held_out))


def render(run: str, students: Sequence[Summary]) -> str:
    """The whole page as HTML text, a pure function of students.json."""
    palette = colours([f"student:{student['name']}" for student in students])
    by_name = {f"student:{student['name']}": student for student in students}
    shares = {name: [s["probe"][f"agreement.{subset}"] for subset in SUBSETS] for name, s in by_name.items()}
    dots = {name: Dot(forget, retain) for name, (forget, retain) in shares.items() if None not in (forget, retain)}
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(student))}</tr>" for student in students)
    reasons = "".join(
        f"<li>{escape(s['name'])}: {escape(loss_in_words(s))}, {escape(s['loss_reason'])}; {escape(s['head'])}</li>"
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
        + curves({name: s["curve"] for name, s in by_name.items()}, palette, "Training loss by step")
        + '<p class="note">Losses of different kinds do not compare.</p>'
    )
    return page(f"Students of {run}", f"{len(students)} students that are done", body)
