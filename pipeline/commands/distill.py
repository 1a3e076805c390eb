"""Stage two as a user calls it: students trained here, by several processes together, or several at a time in children."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet.cache.errors import Interrupted, UserError
from duet.cache.location import Location
from duet.cache.watch import Watch
from duet.pipeline.config.run_dir import StudentDir
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.pages.students import write_students_page
from duet.pipeline.pages.tables import loss_in_words, progress_note
from duet.pipeline.run.children import THIS_PROGRAM, environments_of_children, last_line, run_jobs, visible_gpus
from duet.pipeline.run.directory import StopSignal, claim_run_dir
from duet.pipeline.run.hub import push
from duet.pipeline.run.launch import Launch, check_launcher, launched
from duet.pipeline.run.named_models import model_name, start_model
from duet.pipeline.run.preflight import left_out_line
from duet.pipeline.run.stores import check_trained_on, store_line, stores_of_run
from duet.pipeline.run.terminal import be_silent, progress_bar, say
from duet.pipeline.run.trackers import check_trackers, tracking
from duet.stages.settings.student import StudentSettings
from duet.stages.student.summary import TrainingSummary

if TYPE_CHECKING:
    from duet.cache.reader import Store
    from duet.stages.student.job import StudentJob
    from duet.stages.student.loop import StepReport
    from duet.stages.student.ranks import Processes

UNASKED = (
    "student {name}: start_noise is {alpha:g} and the store has no broad rows: what no row asks about fades (on the lab "
    "0.1, 0.2 and 0.5 left 95.4, 70.5 and 0.0 of the teacher's 97.5 points)"
)
FIRST_FAILED = 1  # exit code of a process when the first of its launch has ended with an error, which that one reports
MEMORY_HINT = (
    "lower train.pass_tokens or set train.gradient_checkpointing, which change no result; or train less with train.lora, "
    "train.last_layers, train.optimizer: adamw8bit; or spread the student over GPUs with train.parallel: fsdp"
)


def distill(request: Selection, num_jobs: int | None, child: bool = False) -> int:
    """Train every student that is not done yet; returns an exit code.

    `num_jobs` at a time, by default as many as there are GPUs. A `child` process leaves comparing and pushing to its parent.
    """
    from duet.stages.models.loading import pick_device
    from duet.stages.student.ranks import FirstFailed

    launch = launched(os.environ)
    if not launch.first:
        be_silent()
    if num_jobs is not None and launch.rank.world > 1:
        raise UserError(
            f"--jobs {num_jobs} does nothing in {launch.rank.world} processes that train each student together",
            "leave out --jobs, or start without torchrun",
        )
    config = request.load()
    for student in config.students:
        check_trackers(config.train_settings(student).trackers)
    kind = pick_device(config.device)
    check_launcher(os.environ, kind)
    stop = StopSignal()
    stored = stores_of_run(config)
    check_trained_on(config, config.students, stored)
    devices = visible_gpus(kind)
    unfinished = [student.name for student in config.students if not _is_done(config, student)]
    num_jobs = min(num_jobs or len(devices) or 1, len(unfinished))
    code = 0
    if num_jobs > 1 and launch.rank.world == 1:
        claim_run_dir(config)
        on = f"{len(devices)} GPUs" if devices else "cpu"
        _say_stores(config, stored, f"{on}, {num_jobs} students at a time")
        code = _train_in_children(request, config, unfinished, num_jobs, devices, stop)
    else:
        try:
            _train_here(config, stored, launch, kind, stop, child)
        except FirstFailed:
            return FIRST_FAILED
    if launch.first and not child:
        write_students_page(config)
        for student in config.students:
            if student.push_to_hub and _is_done(config, student):
                push(student.name, config.run.student(student.name), student.push_to_hub)
    return code


def _is_done(config: Config, student: StudentSettings) -> bool:
    return config.run.student(student.name).is_done


def _train_in_children(
    request: Selection, config: Config, names: list[str], num_jobs: int, devices: list[str], stop: StopSignal
) -> int:
    """The named students, each in a process of its own; returns the first exit code that is not 0."""
    commands = {
        name: [*THIS_PROGRAM, "distill", *request.with_only(name).arguments(), "--jobs", "1", "--child"]
        for name in names
    }
    with progress_bar("steps") as bar:

        def show(running: list[str]) -> None:
            for name in running:
                if line := last_line(config.run.student(name).metrics):
                    bar.update(f"student {name}", line["step"], line["total_steps"], progress_note(line))

        code = run_jobs(commands, environments_of_children(num_jobs, devices, os.environ), stop, show)
    left = [student.name for student in config.students if not _is_done(config, student)]
    if left and not code:
        raise Interrupted(f"{len(left)} students were not begun")
    return code


def _say_stores(config: Config, stored: Mapping[str, Location], device: str) -> None:
    """Say a line for each store that is read."""
    for name, location in stored.items():
        of = f" of teacher {name}" if config.teachers else ""
        say(f"store{of}: {store_line(location)}; device: {device}")


def _train_here(
    config: Config, stored: Mapping[str, Location], launch: Launch, kind: str, stop: StopSignal, child: bool
) -> None:
    """Train all students one after the other, in this process or in all those of the launch together."""
    import torch

    from duet.stages.student.ranks import joined
    from duet.stages.student.train import open_stores

    if kind == "cuda" and launch.local >= torch.cuda.device_count():
        raise UserError(
            f"process {launch.local} of this machine has no GPU: there are {torch.cuda.device_count()}",
            "start at most as many processes as there are GPUs, or set device: cpu",
        )
    device = torch.device(launch.device(kind))
    with joined(launch.rank, device) as processes:
        with processes.first_first():
            if processes.first:
                claim_run_dir(config)
        stores, tokenizer = open_stores(stored, config.store.verify)
        together = f" x {launch.rank.world} processes" if launch.rank.world > 1 else ""
        if not child:
            _say_stores(config, stored, f"{device}{together}")
        for student in config.students:
            _train_one(job_of(config, student, processes), config.name, stores, tokenizer, processes, stop)
        processes.wait()  # launchers may kill the rest when one has ended, and the first has still to write


def unasked_line(job: StudentJob, stores: Mapping[str, Store]) -> str:
    """The warning before weights are damaged that no broad rows will repair; else empty."""
    if not job.start_noise or any(store.manifest.subsets.get("broad") for store in stores.values()):
        return ""
    return UNASKED.format(name=job.name, alpha=job.start_noise)


def _train_one(
    job: StudentJob, run: str, stores: Mapping[str, Store], tokenizer: Any, processes: Processes, stop: StopSignal
) -> None:
    """Train one student, with a progress bar and its trackers; say the result."""
    import torch

    from duet.stages.student.train import train_student

    files = StudentDir(job.student_dir)
    done_before = files.is_done
    if not done_before and (warning := unasked_line(job, stores)):
        say(warning)
    facts = {
        "run": run,
        "student": job.name,
        "start": job.start_name,
        "stores": {name: store.manifest.fingerprint for name, store in stores.items()},
        "train": job.settings.model_dump(mode="json"),
        **({"start_noise": job.start_noise} if job.start_noise else {}),
    }
    names = job.settings.trackers if processes.first else ()
    with tracking(names, run, job.name, job.student_dir, facts) as track, progress_bar("steps") as bar:

        def show(report: StepReport) -> None:
            bar.update(f"student {job.name}", report.step, report.total_steps, progress_note(vars(report)))
            track(report)

        try:
            summary = train_student(job, stores, tokenizer, processes, Watch(on_progress=show, should_stop=stop))
        except torch.OutOfMemoryError as error:
            what = f"student {job.name}: {processes.device} does not have enough memory: {str(error).splitlines()[0]}"
            raise UserError(what, MEMORY_HINT) from error
    _say_result(summary, files.model, done_before)


def job_of(config: Config, student: StudentSettings, processes: Processes) -> StudentJob:
    """What is trained of this student, in its folder of the run."""
    from duet.stages.models.directory import resolve_model
    from duet.stages.questions.requests import asked_about
    from duet.stages.student.job import StudentJob

    settings = config.train_settings(student)
    with processes.first_first():  # it fetches what is not there yet
        model_dir = resolve_model(start_model(config, student), f"students.{student.name}.model")
    return StudentJob(
        name=student.name,
        model_dir=model_dir,
        start_name=model_name(start_model(config, student)),
        student_dir=config.run.student(student.name).path,
        settings=settings,
        trust_remote_code=config.teacher.trust_remote_code,
        start_noise=student.start_noise,
        asked=asked_about(config.data, config.topic, config.requests) if settings.contexts != "none" else None,
    )


def _say_result(summary: TrainingSummary, model_dir: Path, done_before: bool) -> None:
    early = " (stopped early)" if summary.stopped_early else ""
    trained = f"trained {summary.steps} steps{early} in {summary.train_s:.1f} s"
    first, last = summary.curve[0][1], summary.curve[-1][1]
    who = f"student {summary.name}"
    verb = "was done already" if done_before else trained
    say(f"{who}: {verb}, {summary.loss} {first:.3g} -> {last:.3g}: {model_dir}")
    if not done_before:
        loss = loss_in_words(summary.loss, summary.combine, summary.teacher_weights)
        say(f"{who}: {loss}, {summary.loss_reason}; {summary.head}")
        if summary.left_out:
            say(left_out_line(summary.name, summary.left_out))
        if summary.added_ends:
            ends = ", ".join(map(str, summary.added_ends))
            say(f"{who}: generation_config.json also ends a response at {ends}, as its teacher does")
