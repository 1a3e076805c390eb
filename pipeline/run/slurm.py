"""Jobs for Slurm: a job's script as a pure function, and what `sbatch`, `squeue`, `sacct` and `scancel` are asked.

A script is plain text that can be read before it is submitted: options, the user's set-up lines, one call of `duet` through
srun, and one line that queues the job again when that call says 75. A run's jobs are found in the queue by a comment, so
that nothing is submitted twice, even if a submission was killed half way.
"""

from __future__ import annotations

import getpass
import hashlib
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duet.cache.errors import EXIT_INTERRUPTED, UserError
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.slurm import Resources, SlurmSettings

OPTIONS = {  # setting -> option of sbatch
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "time": "time",
    "nodes": "nodes", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem",
}  # fmt: skip
PATIENCE_S = (
    600  # after the first of several processes has ended, the others are killed: one that died leaves them waiting
)
# The variables by which torch's processes find each other, from those of srun. Ports below those that systems hand out.
_MEET = 'export MASTER_ADDR="$(hostname)" MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))'
_RANKS = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'


@dataclass(frozen=True)
class SlurmJob:
    """One job, or an array of `array` equal ones, that starts when those of `after` have ended.

    `after_ok`: only if they succeeded. `ranks`: a process for each GPU of each machine, which work as one.
    """

    name: str
    arguments: tuple[str, ...]  # of `duet`
    resources: Resources
    after: tuple[str, ...] = ()
    after_ok: bool = True
    array: int = 0
    ranks: bool = False


@dataclass(frozen=True)
class Submission:
    """What all jobs of a run have in common."""

    run: RunDir
    settings: SlurmSettings
    config_path: Path  # what the jobs read
    duet: tuple[str, ...]  # the program
    comment: str

    def log_of(self, job: SlurmJob) -> Path:
        """Where the job's output goes, in Slurm's own pattern."""
        return self.run.slurm_logs / f"{job.name}-{'%A_%a' if job.array else '%j'}.log"


def script(job: SlurmJob, of: Submission) -> str:
    """The text that sbatch gets; dependencies are options on its command line."""
    settings, resources = of.settings, job.resources
    options = [
        f"--job-name={of.run.path.name}:{job.name}",
        f"--comment={of.comment}",
        f"--output={_pattern(of.log_of(job))}",
    ]
    options += ["--open-mode=append", "--requeue", "--kill-on-invalid-dep=yes", f"--signal=TERM@{settings.signal_s}"]
    if job.array:
        at_once = f"%{settings.workers_at_once}" if settings.workers_at_once else ""
        options.append(f"--array=0-{job.array - 1}{at_once}")
    asked = {option: getattr(resources, name) for name, option in OPTIONS.items()}
    options += [f"--{option}={value}" for option, value in asked.items() if value is not None]
    options += [f"--ntasks-per-node={(job.ranks and resources.gpus) or 1}", *resources.flags]
    task = f"{job.name}-$SLURM_ARRAY_TASK_ID" if job.array else job.name
    duet, arguments = shlex.join(of.duet), shlex.join(job.arguments)
    lines = ["#!/bin/bash", *(f"#SBATCH {shlex.quote(option)}" for option in options), "", *settings.setup]
    lines.append(f'{duet} attempt {shlex.quote(str(of.config_path))} "{task}" || exit')
    if resources.cpus:
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    if job.ranks and resources.processes > 1:
        lines += [_MEET, f"srun --wait={PATIENCE_S} bash -c {shlex.quote(_RANKS)} duet {duet} {arguments}"]
    else:
        lines.append(f"srun {duet} {arguments}")
    again = f"{EXIT_INTERRUPTED} | {128 + signal.SIGTERM}"  # interrupted; and told to stop before Duet could listen
    lines += ["code=$?", f'case "$code" in {again}) scontrol requeue "$SLURM_JOB_ID" ;; esac', 'exit "$code"']
    return "\n".join(lines) + "\n"


def _pattern(log: Path) -> str:
    """A log's path as sbatch reads it: what stands after % in the name is for Slurm, a % of the folders is itself."""
    return str(log.parent / "x").removesuffix("x").replace("%", "%%") + log.name


def check_place(run_dir: Path) -> None:
    """Refuse a run directory whose name sbatch cannot be told, however it is quoted."""
    if any(mark in str(run_dir) for mark in ("\n", "\r", "\\")):
        raise UserError(f"{str(run_dir)!r} has a line break or a backslash, which Slurm misreads", "change runs_dir")
    here = str(Path.cwd())
    if not run_dir.is_absolute() and ("%" in here or "\\" in here):  # Slurm puts it in front of the log's pattern
        raise UserError(
            f"the current directory {here!r} has a % or a backslash, which Slurm would replace in the logs' paths",
            "set an absolute runs_dir, or submit from another directory",
        )


def largest_array(settings_of_cluster: str) -> int | None:
    """How many jobs an array may have, from what `scontrol show config` says; None if it says nothing of it."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)\s*$", settings_of_cluster, re.MULTILINE)
    return int(found[1]) if found else None


def check_array(job: SlurmJob) -> None:
    """Refuse an array that this cluster would not take."""
    most = largest_array(_ask("scontrol", "show", "config"))
    if most is not None and job.array > most:
        raise UserError(
            f"{job.name}: an array of {job.array} jobs, this cluster takes {most} (MaxArraySize)",
            f"set slurm.workers to at most {most}" if most else "this cluster takes no arrays: ask those who run it",
        )


def comment_of(run_dir: Path) -> str:
    """What marks a run's jobs in the queue: its directory, unreadable to others."""
    return "duet-" + hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Queued:
    """A job, or one task of an array, as the queue shows it."""

    job_id: str
    task: str  # number in the array, or the numbers of those that wait: `3-7`; empty without an array
    name: str  # of the job within its run
    state: str
    reason: str


def queue(comment: str) -> list[Queued]:
    """The run's jobs that have not ended, as squeue reports; only this user's are asked for, which spares a large cluster."""
    found = []
    command = ("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%F|%K|%T|%r|%j|%k")
    for line in _ask(*command).splitlines():
        job_id, task, state, reason, name, marked = line.strip().split("|", 5)
        if marked == comment:
            found.append(Queued(job_id, "" if task == "N/A" else task, name.rpartition(":")[2], state, reason))
    return found


def ended(job_ids: Sequence[str]) -> dict[str, str]:
    """The states of these jobs, as sacct reports; none where the cluster keeps no accounts."""
    if not job_ids or not shutil.which("sacct"):
        return {}
    command = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={','.join(job_ids)}",
        "--format=JobID,State",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line) if not done.returncode else {}


def sbatch(path: Path, dependency: str) -> str:
    """Submit a script; returns the job's id."""
    wanted = [f"--dependency={dependency}"] if dependency else []
    return _ask("sbatch", "--parsable", *wanted, str(path)).strip().partition(";")[0]


def scancel(job_ids: Sequence[str]) -> None:
    _ask("scancel", *job_ids)


def _ask(*command: str) -> str:
    """What a program of Slurm says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"no {command[0]} here: this machine is not part of a Slurm cluster",
            "log in to one, or run the stages here: duet run",
        ) from None
    if done.returncode:
        lines = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        said = "; ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else f"exit code {done.returncode}"
        raise UserError(f"{command[0]} refused: {said}", "see the group slurm: of the config, and `duet doctor`")
    return done.stdout
