"""What every benchmark does alike: options, one core, the machine's description, a table for people or JSON for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of all benchmarks, described by the first line of one's docstring."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.add_argument("--json", action="store_true", help="print one JSON object")
    found.add_argument("--quick", action="store_true", help="little data; the figures say nothing")
    return found


def on_one_core() -> None:
    """Keep this process, the threads it starts and its children to one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores in use, versions: no names and no paths."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores_used": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


Clock = Callable[[], float]


def seconds(work: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Time of one call: the wall's, or with `time.process_time` that of the processor."""
    started = clock()
    work()
    return clock() - started


def rounds(works: dict[str, Callable[[], Any]], count: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Least seconds of each piece of work, measured in turns so that a busy moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(count):
        for name, work in works.items():
            times[name].append(seconds(work, clock))
    return {name: min(found) for name, found in times.items()}


def reset_peak() -> None:
    """Let the kernel's VmHWM of this process start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def status_mb(key: str) -> float:
    """Memory of this process in MB: VmRSS is what is resident, VmHWM the most that was."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def show(report: dict[str, Any], bounds: dict[str, tuple[str, float]], as_json: bool) -> None:
    """Print the claims beside their bounds (`"<="` or `">="` and a number) and the details, or all as one JSON object."""
    if as_json:
        print(json.dumps(report, indent=1))
        return
    console = Console(highlight=False)
    console.print(*(f"{key}: {value}" for key, value in report["machine"].items()), sep="   ")
    table = Table("claim", "measured", "bound", "holds")
    for name, value in report["claims"].items():
        sign, bound = bounds[name]
        holds = value <= bound if sign == "<=" else value >= bound
        table.add_row(name, f"{value:.4g}", f"{sign} {bound:g}", "yes" if holds else "NO")
    console.print(table)
    for title, rows in report["details"].items():
        table = Table(*rows[0], title=title, title_justify="left")
        for row in rows:
            values = (row.get(column, "") for column in rows[0])
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
        console.print(table)
