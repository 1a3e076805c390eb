"""The settings of `duet submit`: what each kind of job asks of Slurm. They change no number of a run."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from duet.stages.settings.base import Name, Settings

_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?")
_FLAG = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(=[^\n\r]*)?")
OWN_FLAGS = (  # they identify a run's jobs and queue them again
    "array chdir comment dependency job-name no-requeue ntasks ntasks-per-node open-mode output parsable requeue signal "
    "wrap"
).split()


def _one_word(text: str) -> str:
    if not text or text.split() != [text]:
        raise ValueError(f"{text!r} is not one word: sbatch would read it as several options")
    return text


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError(f'{text!r} is not a time limit: write "90" (minutes), "4:00:00" or "1-12:00:00", in quotes')
    return text


def _memory(text: str) -> str:
    if not _MEMORY.fullmatch(text):
        raise ValueError(f"{text!r} is not an amount of memory: write for example 64G")
    return text


def _flag(text: str) -> str:
    found = _FLAG.fullmatch(text)
    if not found or " --" in text:
        raise ValueError(
            f"{text!r} is not an option of sbatch: write one option per entry, for example --exclude=node17"
        )
    if any(mark in text for mark in "\"'\\"):
        raise ValueError(f"{text!r} has quotes or a backslash: leave them out, values with spaces are quoted for you")
    if found["name"] in OWN_FLAGS:
        raise ValueError(f"--{found['name']} is set by Duet itself: leave it out")
    return text


def _line(text: str) -> str:
    if len(text.splitlines()) > 1:
        raise ValueError("a line of shell has no line break: make several entries of it")
    if text.lstrip().startswith("#SBATCH"):
        raise ValueError(f"{text!r} is an option of sbatch: write it in flags, without #SBATCH")
    return text


Word = Annotated[str, AfterValidator(_one_word)]


class Resources(Settings):
    """What a job asks for. What is not named is left to Slurm's own default."""

    partition: Word | None = Field(default=None, description="partition, or several with commas between")
    account: Word | None = Field(default=None, description="account that is charged")
    qos: Word | None = Field(default=None, description="quality of service")
    constraint: Word | None = Field(default=None, description="features that nodes must have")
    time: Annotated[str, AfterValidator(_time)] | None = Field(
        default=None, description='time limit as sbatch takes it, in quotes: "90" (minutes), "4:00:00", "1-12:00:00"'
    )
    nodes: int | None = Field(default=None, ge=1, description="machines; more than 1 only for training students")
    gpus: int | None = Field(
        default=None, ge=0, description="GPUs per machine; training starts a process on each of them"
    )
    cpus: int | None = Field(default=None, ge=1, description="CPU cores per process")
    memory: Annotated[str, AfterValidator(_memory)] | None = Field(
        default=None, description="memory per machine, e.g. 64G; 0 is all of it"
    )
    flags: tuple[Annotated[str, AfterValidator(_flag)], ...] = Field(
        default=(), description="further options of sbatch, e.g. --exclude=node17; beside those for all jobs"
    )

    def over(self, common: Resources) -> Resources:
        """These, and what they do not name from `common`; flags of both."""
        own: dict[str, Any] = {name: getattr(self, name) for name in Resources.model_fields}
        merged = {name: getattr(common, name) if value is None else value for name, value in own.items()}
        return Resources.model_validate({**merged, "flags": (*common.flags, *self.flags)})

    @property
    def processes(self) -> int:
        """Of a student's training: one for each GPU, or for each machine without."""
        return (self.nodes or 1) * (self.gpus or 1)


class SlurmSettings(Resources):
    """Jobs on a Slurm cluster. Resources here are those of all jobs; each kind of job may name its own."""

    teacher_logits: Resources = Field(default=Resources(), description="of each worker of stage one")
    finalise: Resources = Field(
        default=Resources(),
        description="of the job after the workers, which writes what they left and completes the store; "
        "default: those of teacher_logits",
    )
    distill: Resources = Field(default=Resources(), description="of each student's job")
    students: dict[Name, Resources] = Field(default={}, description="of a student's job, by the student's name")
    evaluate: Resources = Field(default=Resources(), description="of stage three")
    workers: int = Field(default=4, ge=1, description="workers of stage one, at most one for each shard to be written")
    workers_at_once: int | None = Field(
        default=None, ge=1, description="largest number of them that run at the same time; default: all"
    )
    setup: tuple[Annotated[str, AfterValidator(_line)], ...] = Field(
        default=(), description="lines of shell before Duet starts, e.g. module load cuda"
    )
    signal_s: int = Field(
        default=300,
        ge=0,
        le=65535,
        description="seconds before its time limit at which a job is asked to save its state and is queued again; "
        "Slurm may be a minute early",
    )
    max_attempts: int = Field(default=20, ge=1, description="largest number of times that a job starts")

    @model_validator(mode="after")
    def _only_students_on_several_machines(self) -> SlurmSettings:
        for where in ("", "teacher_logits", "finalise", "evaluate"):
            resources = getattr(self, where) if where else self
            if (resources.nodes or 1) > 1:
                raise ValueError(
                    f"{where + '.' if where else ''}nodes is {resources.nodes}, but only students are trained over several "
                    "machines: set distill.nodes, or workers for more workers of stage one"
                )
        return self

    def of(self, job: str, student: str | None = None) -> Resources:
        """The resources of a kind of job: `teacher_logits`, `finalise`, `distill` (of a student) or `evaluate`."""
        own: Resources = getattr(self, job)
        if job == "finalise":
            own = own.over(self.teacher_logits)
        if student in self.students:
            own = self.students[student].over(own)
        return own.over(self)
