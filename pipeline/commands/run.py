"""All three stages in one command, each in a process of its own; of a chain, those of each request in turn.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from duet.cache.errors import Interrupted
from duet.cache.files import read_json
from duet.pipeline.config.chain import steps_of
from duet.pipeline.config.schema import Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.pages.chain import write_chain
from duet.pipeline.pages.tables import WIDTH, results_table
from duet.pipeline.run.children import THIS_PROGRAM
from duet.pipeline.run.directory import StopSignal, claim_run_dir
from duet.pipeline.run.finished import is_finished, note_finished, state_read
from duet.pipeline.run.preflight import preflight
from duet.pipeline.run.terminal import is_verbose, log, say, say_for_children, show

STAGES = ("teacher-logits", "distill", "evaluate")


def run_all(request: Selection, num_jobs: int | None = None) -> int:
    """All stages, each in a process of its own: the memory of one, on the GPU above all, is free before the next.

    `num_jobs` students are trained, and models asked, at a time; by default as many as there are GPUs. Returns the first exit
    code that is not 0. A signal to this process is handed to the stage that runs.
    """
    stop = StopSignal()
    config = request.load()
    steps = steps_of(config)
    if not all(is_finished(one, state_read(one)) for one in (config, *steps)):
        preflight(config, all_here=True)
    if code := _run_one(config, request, num_jobs, stop):
        return code
    for step in steps:
        say(f"chain: request {step.name}, on {step.teacher.model}")
        if code := _run_one(step, None, num_jobs, stop):
            return code
    if steps:
        write_chain(config)
    return 0


def _run_one(config: Config, request: Selection | None, num_jobs: int | None, stop: StopSignal) -> int:
    """The stages of one run; the first exit code that is not 0. A step of a chain has no `request`: its config is written."""
    read = state_read(config)
    if is_finished(config, read):
        say(f"run {config.name} is done, and nothing that it was made of has changed since")
        show(results_table(read_json(config.run.results), is_verbose()), width=None if is_verbose() else WIDTH)
        say(f"report: {config.run.report}")
        return 0
    if request is None:
        preflight(config, all_here=True)
        claim_run_dir(config)
        request = Selection(str(config.run.config))
    for stage in STAGES:
        if stop():
            raise Interrupted(f"before {stage}")
        jobs = ["--jobs", str(num_jobs)] if num_jobs and stage != "teacher-logits" else []
        if code := run_stage(stage, request, stop, jobs):
            return code
    note_finished(config, read)
    say_for_children(f"report: {config.run.report}")
    return 0


def run_stage(stage: str, request: Selection, stop: StopSignal, more: Sequence[str] = ()) -> int:
    """One stage in a process of its own, which gets the signals to this one; its exit code. Interrupted if it was killed."""
    arguments = [*request.arguments(), *more]
    log.debug("starting %s %s", stage, arguments)
    child = subprocess.Popen([*THIS_PROGRAM, stage, *arguments])
    stop.forward_to(child)
    code = child.wait()
    if code < 0:  # it could not say so itself
        raise Interrupted(f"the process of {stage} was killed by {signal.Signals(-code).name}")
    return code
