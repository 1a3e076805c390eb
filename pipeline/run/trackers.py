"""Where a student's metrics go beside metrics.jsonl: TensorBoard, Weights & Biases or Trackio, through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"train.trackers: {name} is not installed", f"pip install 'duet-unlearn[{name}]'")


@contextmanager
def tracking(
    names: tuple[str, ...], run: str, student: str, student_dir: Path, facts: Mapping[str, Any]
) -> Iterator[Callable[[Any], None]]:
    """Yield a function that logs a StepReport. `facts` are logged once, as the run's configuration.

    Trackers start with the first report: a student that is done already leaves no empty run behind.
    """
    trackers: list[Any] = []

    def log(report: Any) -> None:
        if not trackers:
            trackers.extend(_started(name, run, student, student_dir, flat(facts)) for name in names)
        values = {key: value for key, value in flat(asdict(report)).items() if key != "step"}
        for tracker in trackers:
            tracker.log(values, step=report.step)

    try:
        yield log
    finally:
        for tracker in trackers:
            tracker.finish()


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values as `group/key`; lists as text, and what is None left out: trackers know numbers and texts only."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= {f"{key}/{inner}": found for inner, found in flat(value).items()}
        elif value is not None:
            result[key] = value if isinstance(value, bool | int | float | str) else ", ".join(map(str, value))
    return result


def _started(name: str, run: str, student: str, student_dir: Path, facts: dict[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate import tracking as theirs

    PartialState()  # without it accelerate's trackers cannot write to their own log
    if name == "tensorboard":
        tracker: Any = theirs.TensorBoardTracker("tensorboard", student_dir)  # makes a folder of that name there
    elif name == "wandb":
        tracker = theirs.WandBTracker(run, name=student, dir=str(student_dir))
    else:
        tracker = theirs.TrackioTracker(run, name=student)
    tracker.start()
    tracker.store_init_configuration(facts)
    return tracker
