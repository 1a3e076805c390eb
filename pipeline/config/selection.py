"""Which students a command works on: those of the config, one per combination of a sweep's values, or only some of them."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from duet.cache.errors import UserError
from duet.pipeline.config.explain import merged, validated
from duet.pipeline.config.load import load_config, parse_value
from duet.pipeline.config.schema import Config, check_students, seeded_name
from duet.stages.settings.student import StudentSettings

# What a student has of its own and a sweep may set, beside entries of `train`.
TRAIN = "train."
OWN = tuple(key for key in StudentSettings.model_fields if key not in ("name", "train", "push_to_hub"))


@dataclass(frozen=True)
class Selection:
    """What the command line says about the experiment."""

    config_path: str
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()

    def load(self) -> Config:
        """The config with the students that are asked for."""
        return choose(load_config(self.config_path, self.overrides), self.sweeps, self.only)

    def with_only(self, name: str) -> Selection:
        return replace(self, only=(name,))

    def arguments(self, students: bool = True) -> list[str]:
        """The same as a command line says it; `students` False leaves out which of them."""
        options = [("--set", self.overrides)]
        if students:
            options += [("--only", self.only), ("--sweep", self.sweeps)]
        return ["--config", self.config_path, *(part for flag, values in options for v in values for part in (flag, v))]


def choose(config: Config, sweeps: tuple[str, ...], only: tuple[str, ...]) -> Config:
    """The config with its students swept, then reduced to those named by their own name or by that of their origin."""
    swept = [(student.name, variant) for student in config.students for variant in _variants(student, sweeps)]
    known = list(dict.fromkeys([variant.name for _, variant in swept] + [origin for origin, _ in swept]))
    for name in only:
        if name not in known:
            raise UserError(f"--only {name}: no such student", f"the students are {', '.join(known)}")
    students = tuple(variant for origin, variant in swept if not only or {origin, variant.name} & set(only))
    chosen = config.model_copy(update={"students": students})
    check_students(chosen, "--sweep" if sweeps else "--only")
    return chosen


def _variants(student: StudentSettings, sweeps: tuple[str, ...]) -> list[StudentSettings]:
    """One student per combination of values, named after them: `base-lr1e-05-top_k5`; a seed of several stays the last word."""
    axes = [_axis(sweep) for sweep in sweeps]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep {key} is given twice", "list all its values in one, separated by commas")
    origin = student.name.removesuffix(seeded_name("", student.train.get("seed", 0)))
    variants = []
    for values in itertools.product(*(values for _, values in axes)):
        raw = student.model_dump() | {"name": origin}
        for key, value in zip(keys, values, strict=True):
            raw = merged(raw, _nested(key, value))
            raw["name"] += f"-{key.removeprefix(TRAIN)}{_as_name(value)}"
        raw["name"] += student.name.removeprefix(origin)
        variants.append(validated(StudentSettings, raw, "--sweep"))
    return variants


def _axis(sweep: str) -> tuple[str, list[Any]]:
    """`train.lr=1e-5,1e-4` as ("train.lr", [1e-5, 1e-4])."""
    key, separator, text = sweep.partition("=")
    if not separator or not text or not (key in OWN or key.removeprefix(TRAIN) not in ("", key)):
        raise UserError(
            f"--sweep {sweep!r} is not of the form KEY=VALUE,VALUE,…, with KEY train.… or one of {', '.join(OWN)}",
            "for example --sweep train.lr=1e-5,1e-4 or --sweep start_noise=0,0.3",
        )
    return key, [parse_value(part, f"--sweep {sweep!r}") for part in split_outside_brackets(text)]


def split_outside_brackets(text: str) -> list[str]:
    """Cut at the commas that stand in no brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _as_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
