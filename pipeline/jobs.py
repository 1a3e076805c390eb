"""Several students at once: a process per student, at most as many at a time as there are devices for."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import click

from pipeline.run import StopSignal
from pipeline.terminal import ProgressBar, progress_note

POLL_S = 0.2


def places(num_jobs: int, devices: Sequence[str], environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of the jobs that run at a time finds in its environment: its GPU, or its share of the CPU's cores.

    Without the share each would take all cores and wait for the other's: 20 times as slow, two jobs on two cores.
    """
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} for number in range(num_jobs)]
    threads = max(1, (os.cpu_count() or 1) // num_jobs)
    return [{"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(threads))}] * num_jobs


def gpus(count: int, environment: Mapping[str, str]) -> list[str]:
    """How CUDA_VISIBLE_DEVICES calls each of the GPUs that this process sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


class Job:
    """One command in a process of its own, and at which of the places."""

    def __init__(self, name: str, command: Sequence[str], place: int, environment: Mapping[str, str]) -> None:
        self.name, self.place = name, place
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        streams = ((self.process.stdout, False), (self.process.stderr, True))
        self._threads = [threading.Thread(target=_pass_on, args=stream, daemon=True) for stream in streams]
        for thread in self._threads:
            thread.start()

    def join(self) -> int:
        """The exit code, after the last line was passed on."""
        for thread in self._threads:
            thread.join()
        return self.process.wait()


_one_line = threading.Lock()


def _pass_on(stream: IO[str], err: bool) -> None:
    """Whole lines only: what two processes say is not mixed within a line."""
    for line in stream:
        with _one_line:
            click.echo(line.rstrip("\n"), err=err)


def run_jobs(
    commands: Mapping[str, Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    stop: StopSignal,
    run_dir: Path,
    bar: ProgressBar,
) -> int:
    """Run each student's command, one per environment at a time; returns the first exit code that was not 0, in the end.

    One that fails does not keep the others from running. After a signal, which the running ones get too, none is started.
    """
    waiting, running, code = list(commands), [], 0
    try:
        while running or (waiting and not stop()):
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                code = code or job.join()
            free = sorted(set(range(len(environments))) - {job.place for job in running})
            while waiting and free and not stop():
                name, place = waiting.pop(0), free.pop(0)
                running.append(Job(name, commands[name], place, environments[place]))
                stop.forward_to(running[-1].process)
            for job in running:
                if line := last_line(run_dir / job.name / "metrics.jsonl"):
                    bar.update(f"student {job.name}", line["step"], line["total_steps"], progress_note(line))
            time.sleep(POLL_S if running else 0)
    finally:
        for job in running:  # none, unless something went wrong here
            job.process.terminate()
    return code


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics.jsonl, or None."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None
