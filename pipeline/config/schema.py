"""The schema of a config file: all settings of an experiment, and the rules that involve several of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from duet.cache.errors import UserError
from duet.cache.location import Location, location_of
from duet.cache.record import MAIN_SUBSETS
from duet.pipeline.config.explain import merged, validated
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.slurm import SlurmSettings
from duet.stages.settings.base import Name, Settings
from duet.stages.settings.chain import ChainedRequest
from duet.stages.settings.compare import CompareSettings
from duet.stages.settings.data import ForgetRequest, PromptSettings, TrainingData
from duet.stages.settings.evaluate import AuditSettings, EvaluateSettings
from duet.stages.settings.student import StudentSettings, TrainSettings, check_start_noise, teacher_weights
from duet.stages.settings.teacher import ONE_FOR_ALL, Model, NamedTeacher, StoreSettings, TeacherSettings

# What `harden` sets of what a config leaves open, by group; every student's own settings are under `students`.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "deep": {
        "teacher": {"prefix_on": "forget", "max_positions": 128},
        "train": {"contexts": "texts"},
        "students": {"start_noise": 0.5},
    },
    "wide": {
        "teacher": {"prefix_on": "forget", "max_positions": 8},
        "train": {"contexts": "attacks"},
    },
}


def _in_words(preset: str) -> str:
    return f"{preset} is " + ", ".join(
        f"{group}{'[]' if group == 'students' else ''}.{key} {value}"
        for group, of_group in PRESETS[preset].items()
        for key, value in of_group.items()
    )


def seeded_name(student: str, seed: int) -> str:
    """What a student is called that is trained with one of several seeds."""
    return f"{student}-seed{seed}"


def _per_seed(raw: Any) -> Any:
    """Each student once per seed of train.seeds, in whose place they stand. What is faulty stays, to be refused."""
    if not isinstance(raw, dict) or not isinstance(train := raw.get("train"), dict):
        return raw
    seeds, students = train.get("seeds"), raw.get("students")
    if not isinstance(seeds, list | tuple) or not isinstance(students, list | tuple):
        return raw
    named = [one for one in students if isinstance(one, dict) and isinstance(one.get("name"), str)]
    own = [settings for one in named if isinstance(settings := one.get("train", {}), dict)]
    whole = all(type(seed) is int and seed >= 0 for seed in seeds) and 1 < len(seeds) == len(set(seeds))
    taken = "seed" in train or any({"seed", "seeds"} & set(settings) for settings in own)
    if not whole or taken or len(own) < len(students):
        return raw
    return raw | {
        "train": {key: value for key, value in train.items() if key != "seeds"},
        "students": [
            student | {"name": seeded_name(student["name"], seed), "train": settings | {"seed": seed}}
            for student, settings in zip(named, own, strict=True)
            for seed in seeds
        ],
    }


class Config(Settings):
    """A whole experiment."""

    name: Name = Field(description="the run's folder under runs_dir")
    topic: str = Field(min_length=1, description="the topic to forget, as a person would name it; fills {topic}")
    runs_dir: str = Field(default="runs", description="folder of all runs")
    data_dir: str | None = Field(
        default=None,
        description="folder with copies of the hub's data sets, which are read instead: DIR/NAME.jsonl, or "
        "DIR/NAME/SPLIT.jsonl where the split is not train (of any kind of file); the resolved config names the files",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto is the first CUDA device, else the CPU"
    )
    harden: Literal["none", "wide", "deep"] = Field(
        default="none",
        description="settings for students that are hard to bring back, where the config does not say them itself: "
        f"{_in_words('wide')}; {_in_words('deep')}. Both want broad queries, see docs/hardening.md",
    )
    data: TrainingData = Field(description="the queries of all subsets")
    prompt: PromptSettings = Field(default=PromptSettings(), description="how questions are rendered")
    requests: tuple[ForgetRequest, ...] = Field(default=(), description="forget requests beside that of topic and data")
    teacher: TeacherSettings = Field(description="stage one")
    teachers: tuple[NamedTeacher, ...] = Field(
        default=(),
        description="several teachers, each with its own entries of teacher:; default: the one of teacher:",
    )
    store: StoreSettings = Field(default=StoreSettings(), description="where teacher logits are kept")
    train: TrainSettings = Field(default=TrainSettings(), description="stage two, common to all students")
    students: tuple[StudentSettings, ...] = Field(min_length=1, description="the students, trained one after the other")
    evaluate: EvaluateSettings = Field(default=EvaluateSettings(), description="stage three")
    chain: tuple[ChainedRequest, ...] = Field(
        default=(),
        description="forget requests after that of topic and data, one after another, each a run in <run>/chain/NAME",
    )
    audit: AuditSettings = Field(default=AuditSettings(), description="the audit of prefixes before stage one")
    compare: CompareSettings = Field(default=CompareSettings(), description="DUET against other methods")
    slurm: SlurmSettings = Field(default=SlurmSettings(), description="jobs on a Slurm cluster")

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, raw: Any) -> Any:
        """The settings of a preset under those of the config, so that the resolved config shows them."""
        chosen = raw.get("harden") if isinstance(raw, dict) else None
        preset = PRESETS.get(chosen, {}) if isinstance(chosen, str) else {}  # a list is refused by its type
        for group, defaults in preset.items():
            own = raw.get(group, {})
            if isinstance(own, dict):
                raw = raw | {group: defaults | own}
            elif isinstance(own, list | tuple):
                raw = raw | {group: [defaults | one if isinstance(one, dict) else one for one in own]}
        return _per_seed(raw)

    @model_validator(mode="after")
    def _seeds_are_students(self) -> Config:
        if self.train.seeds is not None:
            raise ValueError(
                f"train.seeds {list(self.train.seeds)}: name each seed once, and set no seed beside them, neither in train nor "
                "in a student's train"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def run(self) -> RunDir:
        """The files in the run's directory."""
        return RunDir(self.run_dir)

    def lying_in(self, run_dir: Path) -> Self:
        """The settings of a run whose directory is here now: it may have been moved, renamed or copied."""
        place = run_dir.resolve() if run_dir.name in ("", "..") else run_dir
        return self.model_copy(update={"runs_dir": str(place.parent), "name": place.name})

    @property
    def store_root(self) -> Location:
        """Where the stores of this run lie, one per fingerprint."""
        store = self.store
        return location_of(store.dir or self.run.teacher, store.cache_dir, int(store.cache_gb * 1e9))

    def teacher_settings(self) -> dict[str, TeacherSettings]:
        """Every teacher's settings by its name: those common to all with its own on top."""
        common = self.teacher.model_dump()
        several = {one.name: TeacherSettings(**merged(common, one.teacher)) for one in self.teachers}
        return several or {"teacher": self.teacher}

    @property
    def bare_teachers(self) -> dict[str, TeacherSettings]:
        """The teachers without a prefix: models that are silent themselves, such as a student of an earlier run."""
        further = any(request.prefix for request in self.requests)
        return {name: one for name, one in self.teacher_settings().items() if not one.prefix and not further}

    @property
    def silent_teachers(self) -> dict[str, TeacherSettings]:
        """The teachers whose models have forgotten something, so that they are measured against `evaluate.base`."""
        return self.bare_teachers or (self.teacher_settings() if self.evaluate.base is not None else {})

    @property
    def base_model(self) -> Model:
        """The model that knows the topic, which all others are measured against."""
        return self.evaluate.base or self.teacher.model

    def seed_rows(self, students: Sequence[StudentSettings]) -> dict[str, list[str]]:
        """Those of these students that differ in their seed alone, by the name without it: two or more of a name."""
        found: dict[str, list[StudentSettings]] = {}
        for student in students:
            origin = student.name.rpartition("-seed")[0]
            if origin and student.name == seeded_name(origin, self.train_settings(student).seed):
                same = {"name": origin, "push_to_hub": None, "train": student.train | {"seed": 0}}
                found.setdefault(student.model_copy(update=same).model_dump_json(), []).append(student)
        several = [members for members in found.values() if len(members) > 1]
        return {members[0].name.rpartition("-seed")[0]: [one.name for one in members] for members in several}

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


def check_students(config: Config, where: str) -> None:
    """Refuse students that get in each other's way, and those whose own settings are faulty."""
    names = [student.name for student in config.students]
    if repeated := _first_repeated(names):
        raise UserError(f"{where}: students: the name {repeated!r} occurs twice", "give each student its own name")
    for taken in {folder.name for folder in config.run.folders} & set(names):
        raise UserError(f"{where}: students: the name {taken!r} is taken by a folder of the run", "choose another name")
    if repeated := _first_repeated([student.push_to_hub for student in config.students if student.push_to_hub]):
        raise UserError(
            f"{where}: students: two are pushed to {repeated}", "give each its own repository; in a sweep, push none"
        )
    bare = config.bare_teachers
    for number, student in enumerate(config.students):
        key = f"{where}: students.{number}.train"
        settings = validated(TrainSettings, merged(config.train.model_dump(), student.train), key)
        if settings.seeds is not None:
            raise UserError(f"{key}.seeds: the seeds are those of all students", "set train.seeds")
        weights = teacher_weights(settings, list(config.teacher_settings()), key)
        check_start_noise(student.start_noise, settings, key.removesuffix(".train"))
        start = student.model or config.teacher.model
        if not student.start_noise and all(name in bare and bare[name].model == start for name in weights):
            raise UserError(
                f"{where}: student {student.name!r} starts from its teacher, which has no prefix, and would learn nothing",
                "set start_noise, for example 0.5, or another model to start from",
            )


def check_teachers(config: Config, where: str) -> None:
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


def check_bare(config: Config, where: str) -> None:
    """Refuse teachers without a prefix where nothing knows more than they, and a base that would do nothing."""
    bare, base = config.bare_teachers, config.evaluate.base
    if base is not None and not bare and all(one.model == base for one in config.teacher_settings().values()):
        raise UserError(
            f"{where}: evaluate.base does nothing: the teacher has a prefix, and its model without it is the base",
            "leave it out, or add the model to evaluate.models",
        )
    for name, teacher in bare.items():
        if teacher.model == config.base_model:
            raise UserError(
                f"{where}: {name} has no prefix, so that base and teacher are one model and nothing would be forgotten",
                "set teacher.prefix; or, where its model is silent already, evaluate.base to the model that knows the topic",
            )


def check_requests(config: Config, where: str) -> None:
    """Refuse requests and evaluation sets whose results would have the same names."""
    if repeated := _first_repeated([request.name for request in config.requests]):
        raise UserError(f"{where}: requests: the name {repeated!r} occurs twice", "give each request its own name")
    trained = {*MAIN_SUBSETS, *(f"{r.name}.{subset}" for r in config.requests for subset in MAIN_SUBSETS)}
    for reserved in sorted(trained & set(config.evaluate.sets)):
        raise UserError(
            f"{where}: evaluate.sets: {reserved!r} is the training set of that name", "name the set otherwise"
        )


def check_tofu(config: Config, where: str) -> None:
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
