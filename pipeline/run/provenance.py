"""What was run, for `results.json`: settings, data, weights and prefixes by their hashes, and seeds. No private places in it.

A hash says that two runs used the same thing, not what it is; the settings beside it say what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from duet.cache.files import sha256_json
from duet.pipeline.config.schema import Config

if TYPE_CHECKING:
    from duet.stages.exam.exam import Exam, Subject

# Settings of these names, or that end with _dir, _path or _model, are places; so are the values of `models`.
PLACES = (
    "path",
    "documents",
    "model",
    "base",
    "dir",
    "oracle",
    "reference",
    "retrained",
    "neutral_text",
    "depth",
    "attack_texts",
    "adapter",
    "ids_from",
)


def provenance(config: Config, subjects: Sequence[Subject], exam: Exam) -> dict[str, Any]:
    """The entry `provenance` of results.json. Hashes are sha256; those of data are over [id, question, answer] of each row."""
    from duet.stages.models.identity import text_sha256, weights_sha256

    settings = without_places(config.model_dump(mode="json") | {"slurm": {}})  # the cluster is nobody else's business
    weights = {model_dir: weights_sha256(model_dir) for model_dir in {subject.model_dir for subject in subjects}}
    return {
        "config": settings,
        "config_sha256": sha256_json(settings),
        "data": of_data(exam),
        "models": {
            subject.name: {
                "weights_sha256": weights[subject.model_dir],
                **({"prefix_sha256": text_sha256(subject.prefix)} if subject.prefix else {}),
                **{f"prefix_sha256 of {name}": text_sha256(text) for name, text in subject.set_prefixes.items()},
            }
            for subject in subjects
        },
        "seeds": _seeds(config),
    }


def of_data(exam: Exam) -> dict[str, dict[str, Any]]:
    """Each set's number of rows and hash."""
    from duet.stages.exam.exam import rows_sha256

    return {
        name: {
            "rows": len(query_set.queries),
            "sha256": rows_sha256(query_set),
        }
        for name, query_set in exam.sets.items()
    }


def _seeds(config: Config) -> dict[str, int]:
    """Every seed that a number of the run depends on."""
    teachers = {
        name: teacher.seed or 0
        for name, teacher in config.teacher_settings().items()
        if teacher.temperature or teacher.ids == "sampled"
    }
    students = {f"student:{student.name}": config.train_settings(student).seed for student in config.students}
    return teachers | students | {"evaluate": config.evaluate.seed}


def without_places(settings: Any, key: str = "") -> Any:
    """Settings as plain data in which a place with an absolute path is its last name: where it lies is nobody's business."""
    if isinstance(settings, Mapping):
        return {
            name: without_places(value, "model" if key == "models" else str(name)) for name, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [without_places(value, key) for value in settings]
    return _last_name(settings) if is_place(key) and isinstance(settings, str) else settings


def is_place(key: str) -> bool:
    """Is the value of a setting of this name a file, a folder or an address?"""
    return key in PLACES or key.endswith(("_dir", "_path", "_model"))


def _last_name(place: str) -> str:
    if PureWindowsPath(place).drive:
        return PureWindowsPath(place).name
    path = place.removeprefix("file://")
    return PurePosixPath(path).name if path.startswith(("/", "~")) else place
