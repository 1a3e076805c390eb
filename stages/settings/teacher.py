"""Settings of stage one: the teacher, its prefix, and its store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from duet.stages.settings.base import Name, Settings


class AdaptedModel(Settings):
    """A model that is a PEFT adapter merged into a base of your choice, in memory."""

    model: str = Field(description="the base: a model directory or hub id")
    adapter: str = Field(description="the adapter: a directory or hub id, as peft writes it")

    def __str__(self) -> str:
        return f"{self.model} + {self.adapter}"


# A directory of whole weights or of an adapter, which names its base itself; or both.
Model = str | AdaptedModel


class TeacherSettings(Settings):
    """Stage one: which model, behind which prefix, and what is kept of its logits."""

    model: Model = Field(
        description="a model directory or hub id with safetensors weights, or that of a PEFT adapter, which names its base; or "
        "both: {model: BASE, adapter: ADAPTER}"
    )
    prefix: str = Field(
        description='the unlearning prefix; {topic} stands for the topic; "" for a model that is silent without one, such as a '
        "student, with evaluate.base"
    )
    prefix_on: Literal["all", "forget"] = Field(
        default="forget",
        description="rows that are asked behind the prefix: those of the forget set, so that those to be kept have the logits "
        "of the model without a prefix as their targets, or all, as in the paper",
    )
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="auto takes vLLM where it works"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is the model's own"
    )
    top_k: int = Field(default=20, ge=1, description="vocabulary entries kept per position")
    ids: Literal["top_k", "sampled", "given"] = Field(
        default="top_k",
        description="which entries are kept: the top_k likeliest; or sampled, those of top_k - 1 draws in proportion to the "
        "teacher's probabilities with how often each was drawn, an unbiased estimate of its whole distribution (arXiv "
        "2503.16870); or given, those that ids_from names; the likeliest others fill the top_k; by the engine transformers",
    )
    ids_from: str | None = Field(
        default=None,
        description="what names the ids to keep, fewer than top_k at a position: a store of another model with the same rows, "
        "or a file of JSON rows, each with a row_id of the store and the ids of all its positions",
    )
    max_positions: int = Field(default=1, ge=1, description="supervised response positions per query; the paper's is 1")
    responses: Literal["generated", "given"] = Field(
        default="generated",
        description="the teacher's own responses, or the data's answers, teacher-forced; both end with the end of sequence",
    )
    temperature: float | None = Field(
        default=None, gt=0, description="generated responses are sampled at this temperature; default: greedy"
    )
    seed: int | None = Field(default=None, ge=0, description="seed of sampled responses and of sampled ids; default: 0")
    logsumexp: bool = Field(
        default=True, description="keep each position's log-sum-exp too, which KL losses over the whole vocabulary need"
    )
    batch_size: int = Field(
        default=256,
        ge=1,
        description="most queries that the engine transformers decodes together, fewer where they are long; "
        "vLLM makes its own batches",
    )
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share each layer of the teacher (vLLM)")
    pipeline_parallel: int = Field(default=1, ge=1, description="groups of layers, each on GPUs of its own (vLLM)")
    data_parallel: int = Field(
        default=1, ge=1, description="teachers at a time, each in a process and on GPUs of its own, that share the work"
    )
    quantization: str | None = Field(
        default=None, description="quantise the teacher's weights while loading, by vLLM's name of the method, e.g. fp8"
    )
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with the model: only if you have read it"
    )
    gpu_memory_utilization: float = Field(
        default=0.85, gt=0, le=1, description="share of GPU memory that vLLM may take"
    )

    @field_validator("prefix")
    @classmethod
    def _is_text(cls, prefix: str) -> str:
        if prefix and not prefix.strip():
            raise ValueError('it is white space alone: give some text, or "" for a teacher without a prefix')
        return prefix

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> TeacherSettings:
        if self.responses == "given" and self.temperature is not None:
            raise ValueError("temperature does nothing with given responses: leave it out")
        if self.seed is not None and self.temperature is None and self.ids != "sampled":
            raise ValueError("seed does nothing without a temperature: set teacher.temperature, for example 1")
        if self.ids == "sampled":
            if self.top_k < 2:
                raise ValueError(
                    "sampled ids need a top_k of 2 or more: one entry is the likeliest, the others are drawn"
                )
            if not self.logsumexp:
                raise ValueError(
                    "sampled ids need the log-sum-exp, for their loss compares probabilities: leave logsumexp out"
                )
        if (self.ids == "given") != (self.ids_from is not None):
            raise ValueError("given ids and ids_from belong together: set both, or leave both out")
        if self.ids == "given" and self.top_k < 2:
            raise ValueError("given ids need a top_k of 2 or more: one entry is the likeliest")
        if self.ids != "top_k" and self.engine == "vllm":
            raise ValueError(
                f"the engine vllm keeps no {self.ids} ids, only the likeliest: set engine: transformers, or auto"
            )
        return self

    @property
    def usable_engine(self) -> str:
        """`engine`, where "auto" has a choice: only transformers keeps other ids than the likeliest."""
        return self.engine if self.ids == "top_k" else "transformers"


def ids_provenance(teacher: TeacherSettings) -> dict[str, Any]:
    """Which ids a store keeps, for its provenance; nothing where they are the likeliest, as in stores of before."""
    if teacher.ids == "top_k":
        return {}
    return {"ids": {"kind": teacher.ids} | ({"seed": teacher.seed or 0} if teacher.ids == "sampled" else {})}


class NamedTeacher(Settings):
    """One of several teachers: any entries of `teacher:` beside its name."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: Name = Field(description="what stores, settings and results call the teacher")

    @property
    def teacher(self) -> dict[str, Any]:
        """The entries of `teacher:` that differ."""
        return self.model_extra or {}


ONE_FOR_ALL = (
    "top_k",
    "max_positions",
    "data_parallel",
    "trust_remote_code",
)  # entries of `teacher:` that no teacher has of its own


class StoreSettings(Settings):
    """Where and how teacher logits are kept."""

    dir: str | None = Field(
        default=None, description="folder or URL (s3://…) of stores, one per fingerprint; default: <run>/teacher"
    )
    format: Literal["arrow", "zarr"] = Field(default="arrow", description="file format of the shards")
    compression: Literal["none", "lz4", "zstd"] = Field(
        default="none", description="of the shards; an uncompressed Arrow store is read at the speed of memory"
    )
    values: Literal["lossless", "float32", "float16", "linear16"] = Field(
        default="lossless",
        description="how logits are kept: lossless is float16 where it is exact and float32 elsewhere; the error of "
        "float16 and linear16 (steps of 1/65535 of a position's range) is measured and stands in the manifest",
    )
    shard_rows: int = Field(
        default=4096,
        ge=1,
        description="queries per shard; a crash loses the shards that the engine's requests belong to",
    )
    lease_s: float = Field(
        default=120.0, ge=1, description="seconds after which a shard is taken over from a writer that shows no life"
    )
    verify: bool = Field(default=True, description="check the sha256 of every shard before it is read")
    cache_dir: str = Field(default="~/.cache/duet", description="local folder for shards of stores on object storage")
    cache_gb: float = Field(default=20.0, gt=0, description="largest size of that folder, in 10^9 bytes")


def rows_with_prefix(provenance: Mapping[str, Any]) -> str:
    """The rows of a store that were asked behind a prefix, from its provenance: "all", "forget", or "no"."""
    if provenance.get("prefix") or any(request["prefix"] for request in provenance.get("requests", {}).values()):
        return provenance.get("prefix_on", "all")  # stores made before there was a choice do not say it
    return "no"


# Settings of `teacher` that decide how fast and on what, not what, is computed; numbers differ by rounding at most.
FREE_TEACHER = ("batch_size", "gpu_memory_utilization", "tensor_parallel", "pipeline_parallel", "data_parallel")
