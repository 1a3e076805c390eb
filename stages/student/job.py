"""One student to be trained: the model that it starts from, its folder and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from duet.stages.questions.requests import AskedAbout
from duet.stages.settings.student import TrainSettings


@dataclass(frozen=True)
class StudentJob:
    """One student to be trained."""

    name: str
    model_dir: Path  # the model that it starts from
    start_name: str  # the name of that model in everything that is written
    student_dir: Path  # gets model/, metrics.jsonl, checkpoints/
    settings: TrainSettings
    trust_remote_code: bool = False
    start_noise: float = 0.0  # share of noise in the matrices that it starts from
    asked: Mapping[str, AskedAbout] | None = None  # the queries by row id, which train.contexts needs
