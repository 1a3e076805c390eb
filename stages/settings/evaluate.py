"""Settings of stage three and of the audit: what models are asked, and how it is scored."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

import regex
from pydantic import Field, field_validator, model_validator

from duet.stages.settings.attacks import ALL, ATTACKS, RelearnSettings, SamplingSettings
from duet.stages.settings.base import Name, Settings
from duet.stages.settings.data import EvaluationSet
from duet.stages.settings.judge import JudgeSettings
from duet.stages.settings.teacher import Model


def compiled(pattern: str) -> regex.Pattern[str]:
    """One pattern; ValueError if it is not a regular expression, or would take every answer for a refusal."""
    try:
        found = regex.compile(unicodedata.normalize("NFC", pattern), regex.IGNORECASE)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if found.search(""):
        raise ValueError(f"{pattern!r} matches an empty text, so every answer would be a refusal")
    return found


class MembershipSettings(Settings):
    """Can one tell from likelihoods what the model was trained on? Both sets are query sets of this run."""

    members: str = Field(description="query set that base was trained on, such as forget")
    nonmembers: str = Field(
        description="query set of the same kind that no model was trained on; it is used for nothing else"
    )
    min_k: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="share of an answer's tokens that min-k and min-k++ look at; PrivLeak's is 0.4",
    )
    gradients: bool = Field(
        default=True, description="the gradient norm too, for which one gradient of all weights must fit in memory"
    )
    reference_model: str | None = Field(
        default=None, description="model directory or hub id that saw neither set, for the attack of that name"
    )
    retrained: str | None = Field(
        default=None, description="results.json of a model that was trained without the members, for PrivLeak"
    )
    retrained_name: str = Field(default="base", description="which of that file's models it is")


class OutcomeSettings(Settings):
    """Thresholds of the verdict on each model."""

    max_left: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="largest share of what base has above control or floor that may be left, said or held, of a set to forget",
    )
    max_attacked: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description='smallest share that an attack brings back on average for the verdict "suppressed until attacked"',
    )
    max_above_control: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description='for the verdict "withstands these tests", what a working attack brings back above the control, and what '
        "any measure leaves, lies below this share of what base has above it, with its interval",
    )
    min_kept: float = Field(
        default=0.9, ge=0, le=1, description="share of base's score that must stay on every set to be kept"
    )
    min_utility: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="broken if less of base's score above the floor is kept, mean over the sets",
    )
    max_refusals: float = Field(
        default=0.5, ge=0, le=1, description="broken if more of the kept questions are refused, less base's share"
    )
    max_empty: float = Field(
        default=0.1, ge=0, le=1, description="broken if more answers to kept questions are empty, less base's share"
    )
    max_repetition: float = Field(
        default=0.2, ge=0, le=1, description="broken if more of an answer repeats itself, less base's share"
    )
    max_entropy_change: float = Field(
        default=0.3, gt=0, description="broken if the entropy of the words used changes by more, as a share of base's"
    )
    max_length_factor: float = Field(
        default=2, gt=1, description="broken if answers to kept questions are longer or shorter by a greater factor"
    )
    max_membership: float = Field(
        default=0.2,
        ge=0,
        le=0.5,
        description='the verdict is not "suppressed" if the 95 % interval of a membership AUC lies further than this from 0.5',
    )


class TofuSettings(Settings):
    """Which query sets TOFU's two aggregates are made of; each needs `perturbed_field`. See `stages/metrics/tofu.py`."""

    forget: Name | None = Field(default=None, description="set of the forget quality, which needs a reference")
    retain: Name | None = Field(default=None, description="retain set of the model utility")
    real_authors: Name | None = Field(default=None, description="set of real authors of the model utility")
    world_facts: Name | None = Field(default=None, description="set of world facts of the model utility")
    reference: str | None = Field(
        default=None,
        description="results.json, or open-unlearning's TOFU_EVAL.json, of a model that never saw the forget set; "
        "default: this run, where reference_model is set",
    )
    reference_model: str | None = Field(
        default=None, description="which model of a results.json, or of this run, is the reference; default: base"
    )

    @property
    def utility_sets(self) -> dict[str, str]:
        """The three sets of the model utility by what they are; empty without it."""
        named = {"retain": self.retain, "real_authors": self.real_authors, "world_facts": self.world_facts}
        return {role: name for role, name in named.items() if name is not None}

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> TofuSettings:
        if self.forget is None and not self.utility_sets:
            raise ValueError(
                "it names no set: name those of the model utility or of the forget quality, or leave it out"
            )
        if len(self.utility_sets) not in (0, 3):
            raise ValueError(
                "the model utility is made of three sets: name retain, real_authors and world_facts, or none"
            )
        has_reference = self.reference is not None or self.reference_model is not None
        if has_reference != (self.forget is not None):
            raise ValueError("forget quality needs two things: name both forget and a reference or reference_model")
        return self


class HarnessTask(Settings):
    """One task of lm-evaluation-harness."""

    task: str = Field(min_length=1, description="name of a task or group, as `lm-eval ls` lists them")
    num_fewshot: int = Field(
        ge=0, description="examples in front of each question; no default, because scores depend on it"
    )
    limit: int | None = Field(default=None, ge=1, description="largest number of questions per task; default: all")


class EvaluateSettings(Settings):
    """Stage three: what is asked of base, teacher and students, and how it is scored."""

    sets: dict[Name, EvaluationSet] = Field(
        default={}, description="query sets beside the training's forget and retain"
    )
    base: Model | None = Field(
        default=None,
        description="the model that knows the topic and that all are measured against, where the teacher's does not: one that "
        "has forgotten already, such as a student of an earlier run; named as teacher.model is; default: teacher.model",
    )
    models: dict[Name, Model] = Field(
        default={}, description="further models, made elsewhere, by name, each named as teacher.model is"
    )
    lm_eval: tuple[HarnessTask, ...] = Field(
        default=(), description="tasks of lm-evaluation-harness, which is an extra: pip install 'duet-unlearn[lm-eval]'"
    )
    lm_eval_dir: str | None = Field(default=None, description="folder with task files beside the harness's own")
    attacks: tuple[str, ...] | Literal["all"] = Field(
        default=("reverse", "prefill", "quantize_nf4"),
        description="attacks on the forget queries, by name, or all; docs/attacks.md says what each does",
    )
    attack_texts: str | None = Field(
        default=None, description="YAML file of further texts for attacks, of the form of stages/attacks/attacks.yaml"
    )
    kept_under_attack: int = Field(
        default=20,
        ge=0,
        description="number of questions of each set to be kept that are also asked behind each text of the attacks tried; "
        "0: none",
    )
    sampling: SamplingSettings = Field(default=SamplingSettings(), description="the attack sampling")
    relearn: RelearnSettings = Field(default=RelearnSettings(), description="the attack relearn")
    control_model: Model | None = Field(
        default=None,
        description="a model that never knew the topic, named as teacher.model is: attacked as the others are, and the verdict "
        "is measured against it; default: none",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer, in tokens")
    batch_size: int = Field(
        default=256, ge=1, description="most queries that are decoded together, fewer where they are long"
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="auto takes vLLM on a GPU where it works, else transformers"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is each model's own"
    )
    likelihood: bool = Field(
        default=True, description="score how likely each model finds the given answers, beside what it says"
    )
    tofu: TofuSettings | None = Field(
        default=None, description="TOFU's model utility and forget quality; default: none"
    )
    membership: MembershipSettings | None = Field(default=None, description="membership inference; null leaves it out")
    depth: str | None = Field(
        default=None,
        description="measure the unlearning depth score on the attacked sets, which needs control_model. It says which part of "
        "an answer is the fact: words, the distinctive words; or a file of rows with question and entity, which stands in the "
        "answer as it is; default: not measured",
    )
    neutral_text: str | None = Field(
        default=None,
        description=".txt (a document ends at a blank line) or JSON (field text) whose perplexity is taken",
    )
    judge: JudgeSettings | None = Field(default=None, description="a language model that judges answers; default: none")
    outcome: OutcomeSettings = Field(default=OutcomeSettings(), description="limits of the verdict on each model")
    refusal: str = Field(default="I don't know.", description="the constant refusal whose scores are the floor")
    refusal_patterns: tuple[str, ...] = Field(
        default=(),
        description="further regular expressions that count as a refusal, beside those of stages/metrics/refusals.yaml",
    )
    seed: int = Field(
        default=0, ge=0, description="seed of the bootstrap, of the choice of sample answers and of what attacks draw"
    )

    @field_validator("attacks", mode="before")
    @classmethod
    def _known(cls, attacks: Any) -> Any:
        named = [] if attacks == ALL else list(attacks) if isinstance(attacks, list | tuple) else [attacks]
        if unknown := [name for name in named if name not in ATTACKS]:
            raise ValueError(f"no attack {unknown[0]!r}: a list of {', '.join(ATTACKS)}; or {ALL}")
        if len(set(named)) < len(named):
            raise ValueError(f"{named} names an attack twice: once is enough")
        return attacks

    @field_validator("refusal_patterns")
    @classmethod
    def _regular_expressions(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            compiled(pattern)
        return patterns

    @model_validator(mode="after")
    def _harness_has_tasks(self) -> EvaluateSettings:
        if self.lm_eval_dir is not None and not self.lm_eval:
            raise ValueError("lm_eval_dir does nothing without tasks: name some in lm_eval, or leave it out")
        return self

    @model_validator(mode="after")
    def _depth_is_measured_against_a_control(self) -> EvaluateSettings:
        if self.depth is not None and self.control_model is None:
            raise ValueError(
                "depth is a share of what a model that never knew lacks: name one as evaluate.control_model"
            )
        return self

    @model_validator(mode="after")
    def _tofu_is_made_of_likelihoods(self) -> EvaluateSettings:
        if self.tofu is not None and not self.likelihood:
            raise ValueError("tofu is made of likelihoods: set evaluate.likelihood: true, or leave evaluate.tofu out")
        return self


class AuditSettings(Settings):
    """`duet audit-prefix`: how much is asked, and what a prefix must reach. Answers come as `evaluate` says."""

    rows: int = Field(default=200, ge=1, description="largest number of queries asked of each set, drawn by the seed")
    min_forgotten: float = Field(
        default=0.5, ge=0, le=1, description="share of base's ROUGE-L recall that must go on every set to be forgotten"
    )
    min_kept: float = Field(
        default=0.9, ge=0, le=1, description="share of base's ROUGE-L recall that must stay on every set to be kept"
    )
    choosing_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the queries that a search chooses on; it reports on the others"
    )
    parents: int = Field(default=3, ge=1, description="number of the best prefixes that a search varies")
    seed: int = Field(default=0, ge=0, description="seed of the drawn queries, of their split and of the variations")
