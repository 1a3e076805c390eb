"""All three stages in one command, each in a process of its own.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from duet.cache.errors import EXIT_INTERRUPTED, Interrupted
from duet.pipeline.config.selection import Selection
from duet.pipeline.run.children import THIS_PROGRAM
from duet.pipeline.run.directory import StopSignal
from duet.pipeline.run.preflight import preflight
from duet.pipeline.run.terminal import log, say_for_children

STAGES = ("teacher-logits", "distill", "evaluate")


def run_all(request: Selection, num_jobs: int | None = None) -> int:
    """All stages, each in a process of its own: the memory of one, on the GPU above all, is free before the next.

    `num_jobs` students are trained, and models asked, at a time; by default as many as there are GPUs. Returns the first exit
    code that is not 0. A signal to this process is handed to the stage that runs.
    """
    stop = StopSignal()
    config = request.load()
    preflight(config, all_here=True)
    for stage in STAGES:
        if stop():
            raise Interrupted(f"before {stage}")
        jobs = ["--jobs", str(num_jobs)] if num_jobs and stage != "teacher-logits" else []
        if code := run_stage(stage, request, stop, jobs):
            return code
    say_for_children(f"report: {config.run.report}")
    return 0


def run_stage(stage: str, request: Selection, stop: StopSignal, more: Sequence[str] = ()) -> int:
    """One stage in a process of its own, which gets the signals to this one; its exit code, or an interruption's if killed."""
    arguments = [*request.arguments(), *more]
    log.debug("starting %s %s", stage, arguments)
    child = subprocess.Popen([*THIS_PROGRAM, stage, *arguments])
    stop.forward_to(child)
    code = child.wait()
    return code if code >= 0 else EXIT_INTERRUPTED
