"""`duet submit`: a run as jobs on a Slurm cluster, each of which waits for those before it; and `duet cancel`.

What is done on disk is not submitted, what is in the queue is not submitted again: the same command is how one goes on.
Jobs read a copy of the settings, named by its hash, so that nothing done to the config file changes what waits in the queue.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import publish_json, publishing, read_json
from duet.pipeline.commands.run import STAGES
from duet.pipeline.commands.teacher_logits import check_one_teacher
from duet.pipeline.config.load import load_config
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.config.slurm import SlurmSettings
from duet.pipeline.run import slurm
from duet.pipeline.run.children import THIS_PROGRAM
from duet.pipeline.run.directory import claim_run_dir
from duet.pipeline.run.preflight import check_students, preflight
from duet.pipeline.run.progress import (
    are_scored,
    files_answered,
    newest_checkpoint,
    shards_left,
    stores_progress,
    student_progress,
)
from duet.pipeline.run.provenance import of_data, without_places
from duet.pipeline.run.slurm import SlurmJob, Submission
from duet.pipeline.run.terminal import say
from duet.stages.questions.yaml_text import dump_yaml

STAGE_ONE, STAGE_TWO, STAGE_THREE = STAGES
FINALISE = "finalise"


def _check_one_run(config: Config) -> None:
    """Refuse a chain, of which only the first run could be submitted."""
    if config.chain:
        raise UserError(
            f"duet submit makes one run, and the config has a chain of {len(config.chain)} requests after it",
            "submit the first with --set chain=[], and call `duet run` for all of them in a job of your own",
        )


def submit(request: Selection, stages: Sequence[str], print_only: bool) -> None:
    """Submit what the named stages (default: all) still need; `print_only` shows the scripts and changes nothing."""
    config = request.load()
    _check_one_run(config)
    check_one_teacher(config)
    slurm.check_place(config.run_dir)
    settings = dump_yaml(config.model_dump(mode="json"))
    run = config.run
    path = run.slurm / f"config-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.yaml"
    of = Submission(run, config.slurm, path, THIS_PROGRAM, slurm.comment_of(config.run_dir))
    jobs = jobs_of(config, of, stages or STAGES)
    if print_only:
        if not jobs:
            say("nothing to submit: all of it is done")
        for job in jobs:
            say(f"# {job.name}{', after ' + ' and '.join(job.after) if job.after else ''}\n{slurm.script(job, of)}")
        return
    ids: dict[str, set[str]] = {}  # of the jobs in the queue, and then of those submitted here
    for entry in slurm.queue(of.comment):
        ids.setdefault(entry.name, set()).add(entry.job_id)
    for name, found in ids.items():
        say(f"{name}: in the queue already, job {', '.join(sorted(found))}")
    new = [job for job in jobs if job.name not in ids]
    if not new:
        say("nothing to submit" if ids else "nothing to submit: all of it is done")
        return
    _check_before(config, [*ids, *(job.name for job in new)])
    for line in check_students(config):
        say(line)
    if config.slurm == SlurmSettings():
        say("no resources are set (slurm: in the config or the site's file): the cluster's defaults hold, often no GPU")
    if STAGE_THREE in (job.name for job in new):
        preflight(config)  # a fault in what only the last job reads should not wait for it
    for job in new:
        if job.array:
            slurm.check_array(job)
    claim_run_dir(config)
    run.slurm_logs.mkdir(parents=True, exist_ok=True)
    with publishing(path) as temporary:
        temporary.write_text(settings, encoding="utf-8")
    for job in new:
        ids[job.name] = {_submit_one(job, of, ids)}
    say(f"follow it with: duet status {run.path}")


def jobs_of(config: Config, of: Submission, stages: Sequence[str]) -> list[SlurmJob]:
    """The jobs that the stages still need, in the order in which they wait for each other."""
    read = ("--config", str(of.config_path))
    asks = config.slurm.of
    jobs: list[SlurmJob] = []
    left = shards_left(config) if STAGE_ONE in stages else 0
    if left:
        workers = min(config.slurm.workers, left)
        jobs.append(SlurmJob(STAGE_ONE, (STAGE_ONE, *read, "--worker"), asks("teacher_logits"), array=workers))
        jobs.append(SlurmJob(FINALISE, (STAGE_ONE, *read), asks("finalise"), after=(STAGE_ONE,), after_ok=False))
    untrained = [student.name for student in config.students if not student_progress(config, student).done]
    for name in untrained if STAGE_TWO in stages else ():
        resources = asks("distill", name)
        alone = ("--jobs", "1") if resources.processes == 1 else ()
        command = (STAGE_TWO, *read, "--only", name, *alone)
        jobs.append(SlurmJob(f"{STAGE_TWO}-{name}", command, resources, after=(FINALISE,), ranks=True))
    if STAGE_THREE in stages and (jobs or not is_evaluated(config)):
        students = tuple(f"{STAGE_TWO}-{student.name}" for student in config.students)
        jobs.append(SlurmJob(STAGE_THREE, (STAGE_THREE, *read), asks("evaluate"), after=students))
    return jobs


def _check_before(config: Config, names: Sequence[str]) -> None:
    """Refuse jobs whose work needs what is not there and will not be."""
    stage_two = [name for name in names if name.startswith(f"{STAGE_TWO}-")]
    if FINALISE not in names and (stage_two or STAGE_THREE in names) and shards_left(config):
        raise UserError(f"{config.run_dir} has no teacher logits yet", f"submit --stage {STAGE_ONE}, too")
    for student in config.students if STAGE_THREE in names else ():
        if f"{STAGE_TWO}-{student.name}" not in stage_two and not student_progress(config, student).done:
            raise UserError(f"student {student.name!r} is not trained", f"submit --stage {STAGE_TWO}, too")


def is_evaluated(config: Config) -> bool:
    """Whether results.json has the numbers that these settings and students ask for, on today's questions and models."""
    from duet.pipeline.run.exam import exam_of
    from duet.stages.models.directory import resolve_model
    from duet.stages.models.identity import weights_sha256

    if not are_scored(config):
        return False
    results = read_json(config.run.results)
    if results["evaluate"] != without_places(config.evaluate.model_dump(mode="json")):
        return False
    found = results["provenance"]
    return found["data"] == of_data(exam_of(config)) and all(
        found["models"][f"model:{name}"]["weights_sha256"]
        == weights_sha256(resolve_model(model, f"evaluate.models.{name}"))
        for name, model in config.evaluate.models.items()
    )


def _submit_one(job: SlurmJob, of: Submission, ids: Mapping[str, set[str]]) -> str:
    """Write a job's script, submit it and note its id."""
    path = of.run.slurm / f"{job.name}.sh"
    with publishing(path) as temporary:
        temporary.write_text(slurm.script(job, of), encoding="utf-8")
    before = sorted(job_id for name in job.after for job_id in ids.get(name, ()))
    kind = "afterok" if job.after_ok else "afterany"
    job_id = slurm.sbatch(path, ":".join((kind, *before)) if before else "")
    entry = {"name": job.name, "id": job_id, "submitted": datetime.now(UTC).isoformat(timespec="seconds")}
    publish_json(of.run.slurm_jobs, [*submitted(of.run), entry])
    array = f" ({job.array} workers)" if job.array else ""
    waits = f", after {', '.join(before)}" if before else ""
    say(f"{job.name}: job {job_id}{array}{waits}; log: {of.log_of(job)}")
    return job_id


def submitted(run: RunDir) -> list[dict[str, Any]]:
    """All jobs of a run that were ever submitted, oldest first."""
    return read_json(run.slurm_jobs) if run.slurm_jobs.is_file() else []


def attempt(config_path: Path, task: str) -> None:
    """Note that a job starts, and where its work stands; refuse one that has started too often or gets nowhere.

    Called by the job's own script before its work. A job that is submitted again counts from the start.
    """
    config = load_config(str(config_path))
    path = config.run.slurm_attempts / f"{task}.json"
    job_id = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID", "")
    kept = read_json(path) if path.is_file() else {}
    starts = kept["starts"] if kept.get("job") == job_id else []
    stands = _stands(config, task)
    if reason := _reason_to_stop(starts, stands, config.slurm.max_attempts):
        publish_json(path, {"job": job_id, "starts": starts, "stopped": reason[0]})
        raise UserError(f"{task}: {reason[0]}", reason[1])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path.parent.mkdir(exist_ok=True)
    publish_json(path, {"job": job_id, "starts": [*starts, {"time": now, "stands": stands}], "stopped": None})


def _reason_to_stop(starts: Sequence[Mapping[str, Any]], stands: int, max_attempts: int) -> tuple[str, str] | None:
    if len(starts) >= max_attempts:
        return f"started {len(starts)} times and not done", "submit it again to go on; slurm.max_attempts is the limit"
    if len(starts) >= 2 and starts[-2]["stands"] == starts[-1]["stands"] == stands:
        return (
            "two attempts ended where they began",
            "read its log; if time runs out first, ask for more with slurm.….time, or make smaller steps: "
            "store.shard_rows, train.checkpoint_steps",
        )
    return None


def _stands(config: Config, task: str) -> int:
    """A number that grows with what is safe on disk of a job's work."""
    if task.startswith((STAGE_ONE, FINALISE)):
        return sum(store.shards_done for store in stores_progress(config))
    if task == STAGE_THREE:
        return files_answered(config.run)
    return newest_checkpoint(config.run.student(task.removeprefix(f"{STAGE_TWO}-")))


def cancel(run_dir: Path) -> None:
    """Take all of a run's jobs out of the queue; what they did stays, and `duet submit` goes on from there."""
    queued = slurm.queue(slurm.comment_of(run_dir)) if submitted(RunDir(run_dir)) else []
    job_ids = sorted({entry.job_id for entry in queued})
    if not job_ids:
        say(f"no job of {run_dir} is in the queue")
        return
    slurm.scancel(job_ids)
    say(f"cancelled: {', '.join(job_ids)}")
