"""The settings of `duet compare`: which methods DUET is compared with, what each may try, and which questions decide."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from duet.stages.settings.base import Name, Settings
from duet.stages.settings.data import DataSettings

CONSTANTS = {
    "simnpo": "beta",
    "rmu": "steering",
    "undial": "gamma",
    "npo_sam": "rho",
    "repselect": "largest KL",
}  # of the methods that have one to try
Method = Literal[
    "ga",
    "grad_diff",
    "npo",
    "simnpo",
    "refusal",
    "dpo",
    "rmu",
    "undial",
    "flat",
    "idk_ap",
    "npo_sam",
    "jensun",
    "repselect",
]


class GridSettings(Settings):
    """What one method tries: every learning rate with every value of its constant."""

    lr: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, min_length=1, description="peak learning rates; default: train.lr times each of lr_factors"
    )
    constant: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="values of the method's constant, see docs/baselines.md; default: its own",
    )


class OracleSettings(Settings):
    """An oracle that is trained here: the base model's architecture, from scratch, without the forget set."""

    data: tuple[DataSettings, ...] = Field(min_length=1, description="questions with answers that it learns")
    epochs: int = Field(default=40, ge=1, description="passes over them")
    batch_size: int = Field(default=16, ge=1, description="questions per optimizer step")
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's decoupled weight decay")


class CompareSettings(Settings):
    """`duet compare`: DUET against other unlearning methods, on the same data and budget."""

    methods: tuple[Method, ...] = Field(
        default=Method.__args__, description="the methods beside DUET; see docs/baselines.md"
    )
    lr_factors: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        min_length=1,
        description="learning rates to try, as multiples of train.lr",
    )
    grid: dict[Literal["duet"] | Method, GridSettings] = Field(
        default={}, description="what a method tries, if not the default; duet has no constant"
    )
    validation_share: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="share of every set's questions used to choose settings; the rest is reported",
    )
    refusals: tuple[str, ...] = Field(
        default=(), description="refusals that some methods teach, drawn by the seed; default: evaluate.refusal"
    )
    oracle: str | OracleSettings | None = Field(
        default=None, description="a model that never saw the forget set: its directory or hub id, or how to train it"
    )
    harden: tuple[Name, ...] = Field(
        default=("none",),
        min_length=1,
        description="presets of `harden` that DUET is trained with, a row each; all are compared with the first",
    )
    seeds: int = Field(
        default=3,
        ge=1,
        description="trainings of each method's chosen setting: with train.seed, which chooses, and the numbers after it",
    )
    seed: int = Field(
        default=0, ge=0, description="seed of the split and, with each training's own added, of what a method draws"
    )

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> CompareSettings:
        for name, grid in self.grid.items():
            if grid.constant is not None and name not in CONSTANTS:
                raise ValueError(f"{name} has no constant: leave it out; {', '.join(CONSTANTS)} have one")
            if name not in ("duet", *self.methods):
                raise ValueError(f"grid.{name} does nothing: add {name} to compare.methods, or leave it out")
        for name, values in (("methods", self.methods), ("harden", self.harden)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice: leave one out")
        return self
