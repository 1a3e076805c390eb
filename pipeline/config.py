"""One YAML file per experiment, read into frozen settings; `--set a.b=v` overrides; every error names the key.
`sweep.py` makes several students of one.

Validation never edits: what a stage resolves itself (engine, dtype, device) stays "auto" here and is told by the stage.
"""

from __future__ import annotations

import datetime
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

import click
from pydantic import BaseModel, Field, ValidationError

from cache.errors import UserError
from cache.places import Place, check_url, is_url, place_of
from cache.record import SUBSETS
from pipeline.slurm_settings import SlurmSettings
from pipeline.yaml_file import read_mapping
from stages.baseline_settings import CompareSettings
from stages.exam_settings import AuditSettings, EvaluateSettings
from stages.settings import (
    ONE_FOR_ALL,
    Name,
    NamedTeacher,
    PromptSettings,
    RequestSettings,
    Settings,
    StoreSettings,
    StudentSettings,
    TeacherSettings,
    TrainingData,
    TrainSettings,
    teacher_weights,
)
from stages.yaml_text import parse_yaml

# folders of the run directory that are no students
TAKEN_NAMES = ("teacher", "answers", "likelihoods", "lm_eval", "open-unlearning", "audit", "compare", "slurm")

CONFIG_NAME = "config.yaml"  # in the run's directory: the settings of the run, resolved

SITE_VARIABLE = "DUET_SITE"  # names another site file; empty: none
SITE_KEYS = {"slurm": None, "runs_dir": None, "store": ("dir", "cache_dir", "cache_gb", "lease_s")}  # None: all below


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
    requests: tuple[RequestSettings, ...] = Field(
        default=(), description="forget requests beside that of topic and data"
    )
    teacher: TeacherSettings = Field(description="stage one")
    teachers: tuple[NamedTeacher, ...] = Field(
        default=(),
        description="several teachers, each with entries of teacher: of its own; default: the one of teacher:",
    )
    store: StoreSettings = Field(default=StoreSettings(), description="where teacher logits are kept")
    train: TrainSettings = Field(default=TrainSettings(), description="stage two, common to all students")
    students: tuple[StudentSettings, ...] = Field(min_length=1, description="the students, trained one after the other")
    evaluate: EvaluateSettings = Field(default=EvaluateSettings(), description="stage three")
    audit: AuditSettings = Field(default=AuditSettings(), description="the audit of prefixes before stage one")
    compare: CompareSettings = Field(default=CompareSettings(), description="DUET against other methods")
    slurm: SlurmSettings = Field(default=SlurmSettings(), description="jobs on a Slurm cluster")

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def store_root(self) -> Place:
        """Where the stores of this run lie, one per fingerprint."""
        store = self.store
        return place_of(store.dir or self.run_dir / "teacher", store.cache_dir, int(store.cache_gb * 1e9))

    def teacher_settings(self) -> dict[str, TeacherSettings]:
        """Every teacher's settings by its name: those common to all with its own on top."""
        common = self.teacher.model_dump()
        several = {one.name: TeacherSettings(**merged(common, one.teacher)) for one in self.teachers}
        return several or {"teacher": self.teacher}

    def train_settings(self, student: StudentSettings) -> TrainSettings:
        """The common training settings with the student's own on top."""
        return TrainSettings(**merged(self.train.model_dump(), student.train))


def with_models(config: Config, models: Sequence[str]) -> Config:
    """The config with models of a command line, PATH or NAME=PATH each, among `evaluate.models`."""
    named = dict(config.evaluate.models)
    for text in models:
        name, _, model = text.rpartition("=")
        name = name or Path(model).name
        if name in named:
            raise UserError(f"--model {text}: there is a model {name!r} already", "name it with --model NAME=PATH")
        named[name] = model
    raw = config.model_dump() | {"evaluate": config.evaluate.model_dump() | {"models": named}}
    return validated(Config, raw, "--model")


def merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` on top of `common`, group by group: what a group does not name stays; null switches a whole group off."""
    result = dict(common)
    for key, value in own.items():
        both_groups = isinstance(value, dict) and isinstance(common.get(key), dict)
        result[key] = merged(common[key], value) if both_groups else value
    return result


def load_config(path: str, overrides: tuple[str, ...] = ()) -> Config:
    """Read a config file, apply `key=value` overrides, validate; raises UserError for anything a user can mend."""
    raw = merged(site_defaults(os.environ), read_mapping(path))
    for override in overrides:
        _apply(raw, override)
    try:
        config = validated(Config, raw, path)
    except UserError as error:
        of = next((text for text in overrides if error.what.startswith(f"{path}: {text.partition('=')[0]}:")), None)
        raise UserError(error.what.replace(path, f"--set {of}", 1) if of else error.what, error.hint) from None
    _check_teachers(config, path)
    _check_requests(config, path)
    _check_tofu(config, path)
    check_students(config, path)
    if is_url(config.store.dir or ""):
        check_url(config.store.dir or "")  # before the settings are written anywhere
    return _dated(config)


def _dated(config: Config) -> Config:
    """The config with the day that chat templates are told: its own, else that of the run if it has begun, else today's."""
    if config.prompt.date is not None:
        return config
    of_run = config.run_dir / CONFIG_NAME
    try:
        recorded = read_mapping(str(of_run)).get("prompt", {}).get("date") if of_run.is_file() else None
    except PermissionError:  # somebody else's run: what needs it will say so
        recorded = None
    day = datetime.date.fromisoformat(str(recorded)) if recorded else datetime.date.today()
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"date": day})})


def site_defaults(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the machine's site file says of every config that does not say it itself; only where and how, never what.

    `~/.config/duet/site.yaml`, or the file that DUET_SITE names.
    """
    named = environment.get(SITE_VARIABLE)
    file = Path(click.get_app_dir("duet")) / "site.yaml" if named is None else Path(named)
    if named == "" or (named is None and not file.is_file()):
        return {}
    if not file.is_file():
        raise UserError(f"{SITE_VARIABLE} names no file: {named}", "correct it, or unset it")
    raw = read_mapping(str(file))
    for group, value in raw.items():
        keys = SITE_KEYS.get(group, ())
        refused = [f"{group}.{key}" for key in value if key not in keys] if keys and isinstance(value, dict) else []
        if refused or keys == ():
            raise UserError(
                f"{file}: {(refused or [group])[0]} is no default of a site",
                "only where and how a run is made belongs here: slurm, runs_dir, "
                + ", ".join(f"store.{key}" for key in SITE_KEYS["store"] or ()),
            )
    return raw


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
    value = parse_value(text, f"--set {override!r}")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def parse_value(text: str, where: str) -> Any:
    """A value of the command line, as YAML reads it."""
    return parse_yaml(text, f"{where}: the value") if text else ""


def _index(node: list[Any], part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise UserError(f"--set {key}: {part!r} is not an index of a list of {len(node)}", f"use 0 to {len(node) - 1}")


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> tuple[str, str]:
    errors = error.errors(include_url=False)
    # Of a group where a name would do as well, what is wrong in the group.
    first = next((e for e in errors if not (e["type"] == "string_type" and isinstance(e["input"], dict))), errors[0])
    loc = [part for part in first["loc"] if part not in ("[key]", "str", "AdaptedModel")]
    key = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(model, loc[:-1])
        near = _elsewhere(model, loc) or difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: unknown key {key}", f"{hint}valid here: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing", _describe(model, loc)
    at = f"{where}: {key}" if key else where
    if first["type"] == "value_error":  # of our own validators, which say "what: hint"
        what, _, hint = str(first.get("ctx", {})["error"]).partition(": ")
        return f"{at}: {what}", hint or _describe(model, loc)
    found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
    quotes = ""
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        quotes = 'YAML reads it as another kind of value: write it in quotes, "…"; '
    return f"{at}: {first['msg']}{found}", f"{quotes}{_describe(model, loc)}"


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


def _elsewhere(model: type[BaseModel], loc: list[Any]) -> list[str]:
    """Where a key that stands outside every group would be right."""
    groups = {name: _node(model, [name]) for name in model.model_fields} if len(loc) == 1 else {}
    return [f"{name}.{loc[0]}" for name, group in groups.items() if group and loc[0] in group.model_fields]


def _valid_keys(model: type[BaseModel], loc: list[Any]) -> list[str]:
    node = _node(model, loc)
    return list(node.model_fields) if node else []


def _describe(model: type[BaseModel], loc: list[Any]) -> str:
    node = _node(model, loc[:-1])
    field = node.model_fields.get(str(loc[-1])) if node and loc else None
    return f"{loc[-1]} is {field.description}" if field else "see the comments in configs/lab.yaml"


def check_students(config: Config, where: str) -> None:
    """Refuse students that get in each other's way, and those whose own settings are faulty."""
    names = [student.name for student in config.students]
    if repeated := _first_repeated(names):
        raise UserError(f"{where}: students: the name {repeated!r} occurs twice", "give each student its own name")
    for taken in set(TAKEN_NAMES) & set(names):
        raise UserError(f"{where}: students: the name {taken!r} is taken by a folder of the run", "choose another name")
    if repeated := _first_repeated([student.push_to_hub for student in config.students if student.push_to_hub]):
        raise UserError(
            f"{where}: students: two are pushed to {repeated}", "give each its own repository; in a sweep, push none"
        )
    for number, student in enumerate(config.students):
        key = f"{where}: students.{number}.train"
        settings = validated(TrainSettings, merged(config.train.model_dump(), student.train), key)
        teacher_weights(settings, list(config.teacher_settings()), key)


def _check_teachers(config: Config, where: str) -> None:
    """Refuse teachers that get in each other's way, and those whose own settings are faulty."""
    if repeated := _first_repeated([teacher.name for teacher in config.teachers]):
        raise UserError(f"{where}: teachers: the name {repeated!r} occurs twice", "give each teacher its own name")
    for taken in sorted({teacher.name for teacher in config.teachers} & {student.name for student in config.students}):
        raise UserError(
            f"{where}: teachers: {taken!r} is a student's name too", "give each its own: results tell them apart"
        )
    for number, teacher in enumerate(config.teachers):
        key = f"{where}: teachers.{number}"
        validated(TeacherSettings, merged(config.teacher.model_dump(), teacher.teacher), key)
        for entry in ONE_FOR_ALL:
            if entry in teacher.teacher:
                raise UserError(f"{key}: {entry} is one for all teachers", f"set teacher.{entry}")


def _check_requests(config: Config, where: str) -> None:
    """Refuse requests and evaluation sets whose results would have the same names."""
    if repeated := _first_repeated([request.name for request in config.requests]):
        raise UserError(f"{where}: requests: the name {repeated!r} occurs twice", "give each request its own name")
    trained = {*SUBSETS, *(f"{request.name}.{subset}" for request in config.requests for subset in SUBSETS)}
    for reserved in sorted(trained & set(config.evaluate.sets)):
        raise UserError(
            f"{where}: evaluate.sets: {reserved!r} is the training set of that name", "name the set otherwise"
        )


def _check_tofu(config: Config, where: str) -> None:
    """Refuse TOFU aggregates of query sets that are not there or have no wrong answers."""
    tofu = config.evaluate.tofu
    if tofu is None:
        return
    data = {"forget": config.data.forget, "retain": config.data.retain, **config.evaluate.sets}
    for role, name in {"forget": tofu.forget, **tofu.utility_sets}.items():
        if name is not None and name not in data:
            raise UserError(f"{where}: evaluate.tofu.{role}: no query set {name!r}", f"the sets are {', '.join(data)}")
        if name is not None and data[name].perturbed_field is None:
            raise UserError(
                f"{where}: evaluate.tofu.{role}: the set {name!r} has no perturbed_field",
                "name the field with its wrong answers; TOFU's files with them end in _perturbed",
            )


def _first_repeated(values: list[str]) -> str | None:
    return min((value for value in values if values.count(value) > 1), default=None)
