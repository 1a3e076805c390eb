"""How far a run is, from what lies on disk alone: any number of processes on any machines may be at work on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.cache.files import read_json
from duet.cache.leases import Leases
from duet.cache.location import Folder, Location
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.plan import Plan, read_plan
from duet.cache.writer import LEASE_S, LEASES_NAME
from duet.pipeline.config.run_dir import RunDir, StudentDir
from duet.pipeline.config.schema import Config
from duet.pipeline.run.children import last_line
from duet.pipeline.run.stores import stores_named
from duet.stages.settings.student import StudentSettings

RECENT = 16  # latest shards, from which the rate is measured


@dataclass(frozen=True)
class StoreProgress:
    """A teacher's store. Rates are of all its writers together."""

    teacher: str
    location: Location
    complete: bool
    rows: int
    rows_done: int
    shards: int
    shards_done: int
    leased: int  # shards in a living writer's hands
    rows_per_s: float | None  # None: too little is done to measure it, or nothing is under way

    @property
    def left_s(self) -> float | None:
        """Seconds until all rows are there, at this rate."""
        return (self.rows - self.rows_done) / self.rows_per_s if self.rows_per_s else None


@dataclass(frozen=True)
class StudentProgress:
    name: str
    done: bool
    step: int
    total_steps: int | None  # None: not begun
    checkpoint: int  # the step that a killed training goes on from
    steps_per_s: float | None

    @property
    def left_s(self) -> float | None:
        if self.done or not self.steps_per_s or self.total_steps is None:
            return None
        return (self.total_steps - self.step) / self.steps_per_s


def stores_progress(config: Config) -> list[StoreProgress]:
    """Of every teacher whose store has been begun."""
    found = []
    for teacher, location in stores_named(config).items():
        if plan := read_plan(location):
            found.append(_store_progress(teacher, location, plan))
    return found


def _store_progress(teacher: str, location: Location, plan: Plan) -> StoreProgress:
    names = location.entries()
    done = plan.written(names)
    complete = MANIFEST_NAME in names
    leased, rate = 0, None
    if isinstance(location, Folder) and not complete:
        leased = sum(key.startswith("shard-") for key in Leases(location.path / LEASES_NAME, LEASE_S).held())
        rate = _rate(location.path, plan, done)
    return StoreProgress(
        teacher=teacher,
        location=location,
        complete=complete,
        rows=plan.rows,
        rows_done=plan.rows_of(done),
        shards=plan.num_shards,
        shards_done=len(done),
        leased=leased,
        rows_per_s=rate,
    )


def _rate(folder: Path, plan: Plan, done: list[int]) -> float | None:
    """Rows per second, from when the latest shards were finished; the first of them only marks the beginning."""
    finished = sorted((_changed(folder / plan.side_name(index)), index) for index in done)[-RECENT:]
    if len(finished) < 2 or finished[-1][0] <= finished[0][0]:
        return None
    rows = sum(len(plan.shard_range(index)) for _, index in finished[1:])
    return rows / (finished[-1][0] - finished[0][0])


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def shards_left(config: Config) -> int:
    """Shards of all the run's stores that nobody has written; where no store was begun, as many as the queries make."""
    begun = stores_progress(config)
    if len(begun) == len(config.teacher_settings()):
        return sum(max(store.shards - store.shards_done, int(not store.complete)) for store in begun)
    from duet.stages.questions.requests import queries_of

    by_request = queries_of(config.data, config.requests)
    rows = sum(len(queries) for by_subset in by_request.values() for queries in by_subset.values())
    return -(-rows // config.store.shard_rows) * len(config.teacher_settings())


def student_progress(config: Config, student: StudentSettings) -> StudentProgress:
    files = config.run.student(student.name)
    line: dict[str, Any] = last_line(files.metrics) or {}
    rows_per_step = config.train_settings(student).batch_size
    return StudentProgress(
        name=student.name,
        done=files.is_done,
        step=line.get("step", 0),
        total_steps=line.get("total_steps"),
        checkpoint=newest_checkpoint(files),
        steps_per_s=line["rows_per_s"] / rows_per_step if line and not files.is_done else None,
    )


def newest_checkpoint(student: StudentDir) -> int:
    """The step of a student's newest checkpoint; 0 where there is none."""
    names = (path.name.rpartition("-")[2] for path in student.checkpoints.glob("step-*"))
    return max((int(step) for step in names if step.isdigit()), default=0)


def are_scored(config: Config) -> bool:
    """Whether results.json has all of these students."""
    wanted = {f"student:{student.name}" for student in config.students}
    return config.run.results.is_file() and wanted <= set(read_json(config.run.results)["models"])


def files_answered(run: RunDir) -> int:
    """How much of stage three is on disk, in files: one for each model and attack."""
    return sum(len(list(folder.rglob("*.json"))) for folder in (run.answers, run.likelihoods, run.lm_eval))
