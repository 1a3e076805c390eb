"""Several child processes at once, at most as many at a time as there are devices: a student each, or a teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import click

from duet.cache.errors import EXIT_INTERRUPTED
from duet.pipeline.run.directory import StopSignal
from duet.pipeline.run.terminal import log

THIS_PROGRAM = (sys.executable, "-m", "duet")
POLL_S = 0.2


def environments_of_children(
    num_jobs: int, devices: Sequence[str], environment: Mapping[str, str], each: int = 1
) -> list[dict[str, str]]:
    """What each of the jobs that run at a time finds in its environment: its `each` GPUs, or its share of the CPU's cores.

    Without the share each would take all cores and wait for the other's: 20 times as slow, two jobs on two cores.
    """
    if devices:
        groups = [",".join(devices[first : first + each]) for first in range(0, len(devices) - each + 1, each)]
        return [{"CUDA_VISIBLE_DEVICES": groups[number % len(groups)]} for number in range(num_jobs)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = max(1, len(cores) // num_jobs)
    found = []
    for number in range(num_jobs):
        own = [str(cores[(number * share + at) % len(cores)]) for at in range(share)]
        ranks = [",".join(own[part::each] or own) for part in range(each)]
        wanted = {"OMP_NUM_THREADS": str(share), "VLLM_CPU_OMP_THREADS_BIND": "|".join(ranks)}
        found.append({name: environment.get(name, value) for name, value in wanted.items()})
    return found


def visible_gpus(kind: str) -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES calls them; none where the device is a CPU."""
    import torch

    return [] if kind == "cpu" else gpus(torch.cuda.device_count(), os.environ)


def gpus(count: int, environment: Mapping[str, str]) -> list[str]:
    """How CUDA_VISIBLE_DEVICES calls each of the GPUs that this process sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


class Child:
    """One command in a process of its own, and at which of the places."""

    def __init__(self, name: str, command: Sequence[str], place: int, environment: Mapping[str, str]) -> None:
        self.name, self.place = name, place
        log.debug("starting %s with %s: %s", name, environment, command)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # a library may print other bytes than UTF-8: unread, they would fill the pipe and stop the child
            env={**os.environ, **environment},
        )
        streams = ((self.process.stdout, False), (self.process.stderr, True))
        self._threads = [threading.Thread(target=_pass_on, args=stream, daemon=True) for stream in streams]
        for thread in self._threads:
            thread.start()

    def join(self) -> int:
        """The exit code, after the last line was passed on; 75 and a word where a signal ended it."""
        for thread in self._threads:
            thread.join()
        code = self.process.wait()
        if code < 0:
            click.echo(f"error: the process of {self.name} was killed by {signal.Signals(-code).name}", err=True)
            return EXIT_INTERRUPTED
        return code


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
    watch: Callable[[list[str]], None],
) -> int:
    """Run each job's command, one per environment at a time; returns the first exit code that was not 0, in the end.

    One that fails does not keep the others from running. After a signal, which the running ones get too, none is started.
    `watch` gets the names of those that run, now and then.
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
                running.append(Child(name, commands[name], place, environments[place]))
                stop.forward_to(running[-1].process)
            watch([job.name for job in running])
            time.sleep(POLL_S if running else 0)
    finally:
        for job in running:  # none, unless something went wrong here
            job.process.terminate()
    return code


def run_quietly(commands: Mapping[str, Sequence[str]], num_jobs: int, devices: Sequence[str], stop: StopSignal) -> int:
    """Run each job's command, `num_jobs` at a time, on these GPUs or shares of the cores; the first exit code not 0."""
    return run_jobs(commands, environments_of_children(num_jobs, devices, os.environ), stop, lambda running: None)


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics.jsonl, or None."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None
