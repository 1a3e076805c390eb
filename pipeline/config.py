"""One YAML file per experiment, read into frozen settings; `--set a.b=v` overrides; every error names the key.

Validation never edits: what a stage resolves itself (engine, dtype, device) stays "auto" here and is told by the stage.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from cache.errors import UserError
from cache.places import Place, check_url, is_url, place_of
from stages.settings import (
    EvaluateSettings,
    Name,
    PromptSettings,
    Settings,
    StoreSettings,
    StudentSettings,
    TeacherSettings,
    TrainingData,
    TrainSettings,
)


class Config(Settings):
    """A whole experiment."""

    name: Name = Field(description="the run's folder under runs_dir")
    topic: str = Field(min_length=1, description="what is to be forgotten, as a person would name it; fills {topic}")
    runs_dir: str = Field(default="runs", description="folder of all runs")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto is the first CUDA device, else the CPU"
    )
    data: TrainingData = Field(description="the queries of both subsets")
    prompt: PromptSettings = Field(default=PromptSettings(), description="how questions are rendered")
    teacher: TeacherSettings = Field(description="stage one")
    store: StoreSettings = Field(default=StoreSettings(), description="where teacher logits are kept")
    train: TrainSettings = Field(default=TrainSettings(), description="stage two, common to all students")
    students: tuple[StudentSettings, ...] = Field(min_length=1, description="the students, trained one after the other")
    evaluate: EvaluateSettings = Field(default=EvaluateSettings(), description="stage three")

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def store_root(self) -> Place:
        """Where the stores of this run lie, one per fingerprint."""
        store = self.store
        return place_of(store.dir or self.run_dir / "teacher", store.cache_dir, int(store.cache_gb * 1e9))

    def train_settings(self, student: StudentSettings) -> TrainSettings:
        """The common training settings with the student's own on top."""
        return TrainSettings(**{**self.train.model_dump(), **student.train})


def load_config(path: str, overrides: tuple[str, ...] = ()) -> Config:
    """Read a config file, apply `key=value` overrides, validate; raises UserError for anything a user can mend."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no such config file: {path}", "the configs that come with Duet are in configs/")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}", "mind indentation and quotes"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of settings, found {type(raw).__name__}", "see configs/lab.yaml")
    for override in overrides:
        _apply(raw, override)
    config = validated(Config, raw, path)
    _check_students(config, path)
    if is_url(config.store.dir or ""):
        check_url(config.store.dir or "")  # before the settings are written anywhere
    return config


def validated(model: type[BaseModel], raw: dict[str, Any], where: str) -> Any:
    """Build settings from plain data; the first fault becomes a two-line UserError."""
    try:
        return model(**raw)
    except ValidationError as error:
        raise UserError(*_explain(model, error, where)) from None
    except TypeError as error:  # keys that are no strings
        raise UserError(f"{where}: {error}", "keys must be words") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r} is not of the form key=value", "for example --set train.lr=1e-5")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = node[_index(node, part, key)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"--set {key}: {part} is {node!r}, not a group of settings", "leave out what follows it")
    value = _parse_value(text, override)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _parse_value(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise UserError(
            f"--set {override!r}: the value is not valid YAML", "quote texts with special characters"
        ) from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text; people mean a number
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def _index(node: list[Any], part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise UserError(f"--set {key}: {part!r} is not an index of a list of {len(node)}", f"use 0 to {len(node) - 1}")


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> tuple[str, str]:
    first = error.errors(include_url=False)[0]
    loc = [part for part in first["loc"] if part != "[key]"]
    key = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(model, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: unknown key {key}", f"{hint}valid here: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing", _describe(model, loc)
    found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
    return f"{where}: {key}: {first['msg']}{found}", _describe(model, loc)


def _node(model: type[BaseModel], loc: list[Any]) -> Any:
    """The settings class at `loc`, or None where that is no settings class."""
    node: Any = model
    free_key = False  # the next part is a key or index that the user chose
    for part in loc:
        if free_key or node is None:
            free_key = False
            continue
        field = node.model_fields.get(str(part))
        free_key = field is not None and get_origin(field.annotation) in (dict, tuple)
        node = _settings_in(field.annotation) if field else None
    return node


def _settings_in(annotation: Any) -> Any:
    """The settings class within an annotation such as tuple[X, ...] or dict[str, X], or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_settings_in, getattr(annotation, "__args__", ()))), None)


def _valid_keys(model: type[BaseModel], loc: list[Any]) -> list[str]:
    node = _node(model, loc)
    return list(node.model_fields) if node else []


def _describe(model: type[BaseModel], loc: list[Any]) -> str:
    node = _node(model, loc[:-1])
    field = node.model_fields.get(str(loc[-1])) if node and loc else None
    return f"{loc[-1]} is {field.description}" if field else "see the comments in configs/lab.yaml"


def _check_students(config: Config, path: str) -> None:
    names = [student.name for student in config.students]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: students: the name {repeated[0]!r} occurs twice", "give each student its own name")
    for taken in {"teacher", "answers"} & set(names):
        raise UserError(f"{path}: students: the name {taken!r} is taken by a folder of the run", "choose another name")
    for number, student in enumerate(config.students):
        validated(TrainSettings, {**config.train.model_dump(), **student.train}, f"{path}: students.{number}.train")
    for reserved in {"forget", "retain"} & set(config.evaluate.sets):
        raise UserError(
            f"{path}: evaluate.sets: {reserved!r} is the training set of that name", "name the set otherwise"
        )
