"""All three stages in one command, each in a process of its own.

Heavy libraries are imported inside the functions, so that `duet --help` and `duet cache` stay quick.
"""

from __future__ import annotations

import subprocess

from duet.cache.errors import EXIT_INTERRUPTED, Interrupted
from duet.pipeline.config.selection import Selection
from duet.pipeline.run.before import start_folder
from duet.pipeline.run.children import THIS_PROGRAM
from duet.pipeline.run.directory import REPORT_NAME, StopSignal
from duet.pipeline.run.named_models import check_before_stage_one
from duet.pipeline.run.terminal import log, say_for_children

STAGES = ("teacher-logits", "distill", "evaluate")


def run_all(request: Selection) -> int:
    """All stages, each in a process of its own: what one leaves in memory, on the GPU above all, is gone before the next.

    Returns the first exit code that is not 0. A signal to this process is handed to the stage that runs.
    """
    from duet.pipeline.run.preflight import preflight

    stop = StopSignal()
    config = request.load()
    check_before_stage_one(config, whole_run=True)
    preflight(config)
    for student in config.students:
        start_folder(config, student)  # the rest of what stage two would refuse, stage one asks
    for stage in STAGES:
        if stop():
            raise Interrupted(f"before {stage}")
        if code := run_stage(stage, request, stop):
            return code
    say_for_children(f"report: {config.run_dir / REPORT_NAME}")
    return 0


def run_stage(stage: str, request: Selection, stop: StopSignal) -> int:
    """One stage in a process of its own, which gets our signals; its exit code, or an interruption's if it was killed."""
    arguments = request.arguments()
    log.debug("starting %s %s", stage, arguments)
    child = subprocess.Popen([*THIS_PROGRAM, stage, *arguments])
    stop.forward_to(child)
    code = child.wait()
    return code if code >= 0 else EXIT_INTERRUPTED
