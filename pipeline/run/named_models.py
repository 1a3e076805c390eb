"""The models that a config names: which one a student starts from, where it lies, and the name under which it is reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from duet.pipeline.config.schema import Config
from duet.stages.settings.student import MODEL_DIR, TRAINING_NAME, StudentSettings
from duet.stages.settings.teacher import AdaptedModel, Model


def start_model(config: Config, student: StudentSettings) -> Model:
    """The model that a student starts from, as the config names it."""
    return student.model or config.teacher.model


def start_folder(config: Config, student: StudentSettings) -> Path:
    """The directory of the model that a student starts from; of one on the hub, without its weights."""
    from duet.stages.models.directory import resolve_model, small_files

    model, where = start_model(config, student), f"students.{student.name}.model"
    return resolve_model(model, where) if is_here(model) else small_files(model, where)


def model_name(model: Model | Mapping[str, str]) -> str:
    """The name of a model in results and pages: its hub id or its directory's name, of a student of a run the student's.

    A mapping is an adapted model as plain data.
    """
    if isinstance(model, Mapping):
        return model_name(AdaptedModel(**model))
    if isinstance(model, AdaptedModel):
        return f"{model_name(model.model)} + {model_name(model.adapter)}"
    if not (Path(model).exists() or Path(model).is_absolute()):
        return model
    folder = Path(model).resolve()
    return folder.parent.name if (folder.parent / TRAINING_NAME).is_file() and folder.name == MODEL_DIR else folder.name


def is_here(model: Model) -> bool:
    """Are all its parts on this machine?"""
    parts = (model.model, model.adapter) if isinstance(model, AdaptedModel) else (model,)
    return all(Path(part).exists() for part in parts)
