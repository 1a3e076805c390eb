"""training.json: how a student was trained. A student is done once it is there; only this file writes and reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import publish_json, read_json
from duet.stages.settings.student import MODEL_DIR, TRAINING_NAME


@dataclass(frozen=True)
class TeacherShare:
    """One of a student's teachers: its store, and its weight among them."""

    fingerprint: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """The content of training.json, in the order of its keys. Rates count all processes, `parameters` are of the model."""

    name: str
    start_noise: float | None = None  # share of noise in the matrices that it started from
    trained_on: Sequence[str] | None = None  # families of attacks whose texts stood around its questions
    loss: str
    loss_reason: str
    teachers: Mapping[str, TeacherShare]
    combine: str | None  # "mix" or "average"; None with one teacher
    position_share: float | None = None  # of an average only, as the next: see `Teachers.comparable`
    ids_per_position: float | None = None
    head: str  # how its output head was computed
    steps: int
    stopped_early: bool
    rows: int  # that it was trained on
    train_s: float
    rows_per_s: float
    tokens_per_s: float
    stall_share: float  # of the seconds, those that the first process waited for the store
    peak_memory_gb: float  # of the first process, in 10^9 bytes
    parameters: int
    trained_parameters: int
    processes: int
    left_out: Sequence[str]  # flags of the start's generation_config.json that could not be saved again
    added_ends: Sequence[int]  # ids that end its responses beside those of the model that it starts from
    curve: Sequence[Sequence[float]]  # step and loss, of each step
    probe: Mapping[str, Any]  # as `probe.ask` gives it; shares of the exported weights, where a device held them

    @property
    def teacher_weights(self) -> dict[str, float]:
        return {name: teacher.weight for name, teacher in self.teachers.items()}

    def as_json(self) -> dict[str, Any]:
        """As it lies in training.json."""
        optional = ("start_noise", "trained_on", "position_share", "ids_per_position")
        return {key: value for key, value in asdict(self).items() if value is not None or key not in optional}


def is_trained(student_dir: Path) -> bool:
    """Whether the student in this folder is done."""
    return (student_dir / TRAINING_NAME).is_file()


def write_summary(student_dir: Path, summary: TrainingSummary) -> None:
    publish_json(student_dir / TRAINING_NAME, summary.as_json())


def read_summary(student_dir: Path) -> TrainingSummary:
    """The summary of a student that is done; UserError where its file has other entries."""
    path = student_dir / TRAINING_NAME
    raw = read_json(path)
    try:
        teachers = {name: TeacherShare(**teacher) for name, teacher in raw["teachers"].items()}
        return TrainingSummary(**{**raw, "teachers": teachers})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is not as this version of Duet writes it: {error}", "restore the file, or train the student again"
        ) from error


def seen_by(model_dir: Path) -> tuple[str, ...]:
    """The attacks of whose kinds of text a model saw some in training, or the model that it started from: of a student that
    lies where Duet has put it, whatever run that is. Of any other model nothing is known.
    """
    folder = model_dir.resolve().parent
    if model_dir.resolve().name != MODEL_DIR or not is_trained(folder):
        return ()
    raw = read_json(folder / TRAINING_NAME)
    return tuple(raw.get("trained_on") or ()) if isinstance(raw, dict) else ()
