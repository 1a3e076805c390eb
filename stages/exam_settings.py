"""The settings of stage three and of the audit: what models are asked, and how it is scored. See `settings.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.settings import DataSettings, Name, Settings


class EvaluationSet(DataSettings):
    """A query set that is only evaluated."""

    expect: Literal["forgotten", "kept"] = Field(description="what a good student does with it")


class EvaluateSettings(Settings):
    """Stage three: what is asked of base, teacher and students, and how it is scored."""

    sets: dict[Name, EvaluationSet] = Field(
        default={}, description="query sets beside the training's forget and retain"
    )
    attacks: tuple[Literal["reverse"], ...] = Field(default=("reverse",), description="attacks on the forget queries")
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer, in tokens")
    batch_size: int = Field(default=64, ge=1, description="queries per engine call")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="auto takes vLLM on a GPU where it works, else transformers"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is each model's own"
    )
    refusal: str = Field(default="I don't know.", description="the constant refusal whose scores are the floor")
    refusal_patterns: tuple[str, ...] = Field(
        default=(), description="further regular expressions that count as a refusal"
    )
    seed: int = Field(default=0, ge=0, description="seed of the bootstrap and of the choice of sample answers")


class AuditSettings(Settings):
    """`duet audit-prefix`: how much is asked, and what a prefix must reach. Answers come as `evaluate` says."""

    rows: int = Field(default=200, ge=1, description="at most so many queries of each set are asked, drawn by the seed")
    min_forgotten: float = Field(
        default=0.5, ge=0, le=1, description="share of base's ROUGE-L recall that must go on every set to be forgotten"
    )
    min_kept: float = Field(
        default=0.9, ge=0, le=1, description="share of base's ROUGE-L recall that must stay on every set to be kept"
    )
    choosing_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the queries that a search chooses on; it reports on the others"
    )
    parents: int = Field(default=3, ge=1, description="so many of the best prefixes are varied by a search")
    seed: int = Field(default=0, ge=0, description="seed of the drawn queries, of their split and of the variations")
