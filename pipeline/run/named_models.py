"""The models that a config names: what they are called in what we write, and what is refused before stage one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from duet.pipeline.config.schema import Config
from duet.stages.settings.student import StudentSettings
from duet.stages.settings.teacher import AdaptedModel, Model


def start_model(config: Config, student: StudentSettings) -> Model:
    """The model that a student starts from, as the config names it."""
    return student.model or config.teacher.model


def model_name(model: Model | Mapping[str, str]) -> str:
    """How a model is called in what we write: its hub id or its directory's name.

    A mapping is an adapted model as plain data.
    """
    if isinstance(model, Mapping):
        return model_name(AdaptedModel(**model))
    if isinstance(model, AdaptedModel):
        return f"{model_name(model.model)} + {model_name(model.adapter)}"
    return Path(model).resolve().name if Path(model).exists() or Path(model).is_absolute() else model


def is_here(model: Model) -> bool:
    """Are all its parts local directories?"""
    parts = (model.model, model.adapter) if isinstance(model, AdaptedModel) else (model,)
    return all(Path(part).is_dir() for part in parts)


def check_before_stage_one(config: Config, whole_run: bool = False) -> None:
    """Refuse quantised models that cannot run here, and those that no student can start from.

    Looks at local directories only: other models may be on the machines of other stages. `whole_run`: stage three follows here,
    which loads all models through transformers.
    """
    from duet.stages.engines.choose import engine_order
    from duet.stages.models.directory import check_quantisation, check_trainable_start, resolve_model

    trusted = config.teacher.trust_remote_code
    for settings in config.teacher_settings().values():
        if is_here(settings.model) and (whole_run or engine_order(settings.engine) == ["transformers"]):
            folder = resolve_model(settings.model, "teacher.model")
            check_quantisation(folder, f"teacher.model: {settings.model}", trusted)
    for where, model in _starts(config):
        if is_here(model):
            check_trainable_start(resolve_model(model, where), where)
    for name, model in config.evaluate.models.items():
        if whole_run and is_here(model):
            where = f"evaluate.models.{name}"
            check_quantisation(resolve_model(model, where), f"{where}: {model}", trusted)


def _starts(config: Config) -> Iterator[tuple[str, Model]]:
    for student in config.students:
        yield f"students.{student.name}.model", start_model(config, student)
