"""`duet status` and `duet logs`: how far a run is, what its jobs are doing, and what they said."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table

from duet.cache.errors import UserError
from duet.cache.files import read_json
from duet.pipeline.commands.submit import STAGE_ONE, submitted
from duet.pipeline.config.load import load_config
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.run import slurm
from duet.pipeline.run.progress import are_scored, files_answered, stores_progress, student_progress
from duet.pipeline.run.terminal import out, say, say_json, show

WATCH_S = 10.0


def status(run_dir: Path, watch: bool, as_json: bool) -> None:
    """Print how far a run is, once or again and again."""
    run = RunDir(run_dir)
    config = config_of(run)
    if as_json:
        say_json(status_of(config, run))
    elif watch and out.is_terminal:
        with Live(console=out, auto_refresh=False) as live:
            while True:
                live.update(tables(status_of(config, run)), refresh=True)
                time.sleep(WATCH_S)
    else:
        show(tables(status_of(config, run)), result=True)


def config_of(run: RunDir) -> Config:
    """The settings of a run, as one that lies where it lies now: it may have been moved, or be named from elsewhere."""
    if not run.config.is_file():
        raise UserError(
            f"{run.path} is not a run directory: {run.config.name} is missing", "name a run's directory, e.g. runs/lab"
        )
    return load_config(str(run.config)).lying_in(run.path)


def status_of(config: Config, run: RunDir) -> dict[str, Any]:
    """The state of a run, as plain data."""
    stores = [
        {"place" if key == "location" else key: value for key, value in facts.items()}
        for store in stores_progress(config)
        if (facts := asdict(store) | {"location": str(store.location), "left_s": store.left_s})
    ]
    students = [student_progress(config, student) for student in config.students]
    return {
        "format_version": 1,
        "run": config.name,
        "stores": stores,
        "students": [asdict(student) | {"left_s": student.left_s} for student in students],
        "evaluation": {"done": are_scored(config), "files_answered": files_answered(run)},
        "jobs": jobs_of_run(run),
    }


def jobs_of_run(run: RunDir) -> list[dict[str, Any]]:
    """The run's jobs that are in the queue, and of the others the last of each name, with why it stopped where it said so.

    Where the queue cannot be asked, their state is UNKNOWN.
    """
    last = {entry["name"]: entry["id"] for entry in submitted(run)}
    if not last:
        return []
    try:
        queued, gone_state = slurm.queue(slurm.comment_of(run.path)), "ENDED"
    except UserError as error:
        say(f"note: {error.what}")
        queued, gone_state = [], "UNKNOWN"
    jobs = [asdict(entry) for entry in queued]
    there = {entry.job_id for entry in queued}
    gone = {name: job_id for name, job_id in last.items() if job_id not in there}
    states = slurm.ended(list(gone.values()))
    for name, job_id in gone.items():
        tasks = sorted({state for known, state in states.items() if known.partition("_")[0] == job_id})
        reason = _stopped(run, name, job_id)
        jobs.append(
            {"job_id": job_id, "task": "", "name": name, "state": ", ".join(tasks) or gone_state, "reason": reason}
        )
    order = list(last)  # as they were submitted
    return sorted(jobs, key=lambda job: (order.index(job["name"]) if job["name"] in last else len(order), job["task"]))


def _stopped(run: RunDir, name: str, job_id: str) -> str:
    """Why a job, or the first of its tasks, gave up by itself; empty where it did not."""
    for path in sorted(run.slurm_attempts.glob(f"{name}*.json")):
        kept = read_json(path) if _is_of(path.stem, name) else {}
        if kept.get("job") == job_id and kept["stopped"]:
            return kept["stopped"]
    return ""


def _is_of(task: str, job: str) -> bool:
    """Whether this is the job or, of the workers', one task of its array."""
    return task == job or (job == STAGE_ONE and task.startswith(f"{STAGE_ONE}-"))


def tables(found: dict[str, Any]) -> Group:
    """What `status_of` found, to be read."""
    stages = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("", "left"), ("state", "left"), ("done", "right"), ("rate", "right"), ("left", "right")):
        stages.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for store in found["stores"]:
        state = "complete" if store["complete"] else f"{store['leased']} shards in hand"
        done = f"{store['shards_done']} of {store['shards']} shards"
        rate = f"{store['rows_per_s']:,.1f} rows/s" if store["rows_per_s"] else ""
        stages.add_row(f"teacher {store['teacher']}", state, done, rate, _duration(store["left_s"]))
    if not found["stores"]:
        stages.add_row("teacher", "not begun", "", "", "")
    for student in found["students"]:
        begun = student["total_steps"] is not None
        state = "trained" if student["done"] else f"checkpoint at {student['checkpoint']}" if begun else "not begun"
        done = f"{student['step']} of {student['total_steps']} steps" if begun else ""
        rate = f"{student['steps_per_s']:,.2f} steps/s" if student["steps_per_s"] else ""
        stages.add_row(f"student {student['name']}", state, done, rate, _duration(student["left_s"]))
    evaluation = found["evaluation"]
    answered = f"{evaluation['files_answered']} files of answers" if evaluation["files_answered"] else ""
    stages.add_row("evaluation", "done" if evaluation["done"] else "not done", answered, "", "")
    return Group(stages, *_jobs_table(found["jobs"]))


def _jobs_table(jobs: list[dict[str, Any]]) -> list[Table]:
    if not jobs:
        return []
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title="\nSlurm jobs")
    for column in ("job", "id", "state", "why"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        task = f"[{job['task']}]" if job["task"] else ""
        why = job["reason"] if job["reason"] != "None" else ""
        table.add_row(job["name"], f"{job['job_id']}{task}".replace("[", r"\["), job["state"], why)
    return [table]


def _duration(seconds: float | None) -> str:
    """In words that are short: `3 h 20 min`, `5 min`, `40 s`."""
    if seconds is None:
        return ""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"


def logs(run_dir: Path, job: str | None, lines: int) -> None:
    """Print the end of the newest log of each job, or of one; where there are none, of the run's own log."""
    run, newest = RunDir(run_dir), dict[str, Path]()
    for path in sorted(run.slurm_logs.glob("*.log"), key=lambda path: path.stat().st_mtime):
        name, _, number = path.stem.rpartition("-")
        newest[name + (f"-{number.partition('_')[2]}" if "_" in number else "")] = path
    if job is not None:
        known = ", ".join(newest) or f"none; see `duet status {run_dir}`"
        newest = {name: path for name, path in newest.items() if _is_of(name, job)}
        if not newest:
            raise UserError(f"{run_dir} has no log of a job {job!r}", f"those that have one: {known}")
    elif not newest:
        newest = {"log": run.log} if run.log.is_file() else {}
    if not newest:
        raise UserError(f"{run_dir} has no logs", "name a run's directory, e.g. runs/lab")
    for path in newest.values():
        click.echo(f"==> {path} <==")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]:
            click.echo(line)
