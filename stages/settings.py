"""Every setting of the first two stages, as frozen models: one line and, where it has one, a unit per field.

Stage three's are in `exam_settings.py`; `pipeline/config.py` puts them together into one file's schema. Validation never
edits a value. Values that the DUET paper does not publish (k, learning rate, batch size, epochs, delta) are ours.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cache.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DataSettings(Settings):
    """Where a query set comes from and which of its rows are taken."""

    path: str = Field(
        description="a .jsonl, .json, .parquet, .csv or .tsv file, or hf://OWNER/NAME for a Hugging Face data set"
    )
    name: str | None = Field(default=None, description="configuration of the Hugging Face data set")
    split: str = Field(default="train", description="split of the Hugging Face data set")
    question_field: str = Field(default="question", description="field with the query's text")
    answer_field: str = Field(
        default="answer", description="field with the reference answer; only the evaluation needs it"
    )
    choices_field: str | None = Field(
        default=None, description="field with a list of choices; the answer field then holds the index of the right one"
    )
    paraphrased_field: str | None = Field(
        default=None, description="field with the reference answer in other words; only the evaluation needs it"
    )
    perturbed_field: str | None = Field(
        default=None, description="field with a list of wrong answers; only the evaluation needs it"
    )
    id_field: str | None = Field(
        default=None, description="field with a unique id; without it the row's number in the file is the id"
    )
    rows: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="take rows FIRST to STOP-1 of the file, before sampling"
    )
    sample: int | None = Field(
        default=None, ge=1, description="draw this many rows without replacement, kept in file order"
    )
    sample_seed: int = Field(default=0, ge=0, description="seed of the sample")


class TrainingData(Settings):
    """The queries that the teacher is asked and the student learns from."""

    forget: DataSettings = Field(description="queries about the topic")
    retain: DataSettings = Field(description="queries about anything else; the prefix stands before them too")


class PromptSettings(Settings):
    """How a question becomes token ids, with and without a prefix in front."""

    format: Literal["chat", "plain"] = Field(default="chat", description="the tokenizer's chat template, or plain text")
    template: str = Field(default="{question}", description="text around the question; must contain {question}")
    prefix_placement: Literal["system", "text"] = Field(
        default="system", description="prefix as the chat's system message, or as text before the templated question"
    )
    separator: str = Field(
        default="\n",
        description="stands behind the prefix, before the question or before the system message of both prompts",
    )
    system: str | None = Field(
        default=None,
        description="system message of both prompts, the teacher's behind the prefix; default: what the chat template puts in",
    )
    template_name: str | None = Field(
        default=None,
        description="which of the tokenizer's chat templates; default: its only one, or the one named default",
    )
    template_args: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template, such as enable_thinking: false or reasoning_effort: low",
    )
    date: datetime.date | None = Field(
        default=None,
        description="the day that a chat template is told where it asks for today's; default: that of the run's first stage",
    )
    special_tokens_in_text: bool = Field(
        default=False,
        description="accept questions and answers in which the tokenizer sees special tokens, which it then makes of them",
    )
    bos: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="beginning-of-sequence token of plain prompts: as the tokenizer does it, always, or never",
    )
    answer: str | None = Field(
        default=None,
        description="text of a given response, with {answer}; default: {answer}, after a space where prompts are plain and do "
        "not end in a line break; white space around an answer of the data is not part of it",
    )


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
    prefix: str = Field(description="the unlearning prefix; {topic} stands for the topic")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        default="auto", description="auto takes vLLM where it works"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto is the model's own"
    )
    top_k: int = Field(default=20, ge=1, description="vocabulary entries kept per position")
    max_positions: int = Field(default=1, ge=1, description="supervised response positions per query; the paper's is 1")
    responses: Literal["generated", "given"] = Field(
        default="generated",
        description="the teacher's own responses, or the data's answers, teacher-forced; both end with the end of sequence",
    )
    temperature: float | None = Field(
        default=None, gt=0, description="generated responses are sampled at this temperature; default: greedy"
    )
    seed: int | None = Field(default=None, ge=0, description="seed of sampled responses; default: 0")
    logsumexp: bool = Field(
        default=True, description="keep each position's log-sum-exp too, which KL losses over the whole vocabulary need"
    )
    batch_size: int = Field(
        default=64, ge=1, description="queries per forward pass of the engine transformers; vLLM makes its own batches"
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

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> TeacherSettings:
        if self.responses == "given" and self.temperature is not None:
            raise ValueError("temperature does nothing with given responses: leave it out")
        if self.seed is not None and self.temperature is None:
            raise ValueError("seed does nothing without a temperature: set teacher.temperature, for example 1")
        return self


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


class RequestData(Settings):
    """The queries of a further forget request."""

    forget: DataSettings = Field(description="queries about the request's topic")
    retain: DataSettings | None = Field(
        default=None, description="queries about anything else, asked behind this request's prefix too; default: none"
    )


class RequestSettings(Settings):
    """A further forget request: trained in the same run, each of its queries asked behind its own prefix."""

    name: Name = Field(description="stands in row ids and in the names of its evaluation sets")
    topic: str = Field(min_length=1, description="what is to be forgotten; fills {topic} in the prefix and in attacks")
    prefix: str | None = Field(default=None, description="the request's prefix; default: each teacher's own")
    data: RequestData = Field(description="the queries of both subsets")


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


class LoraSettings(Settings):
    """Train low-rank adapters instead of all weights (LoRA, arXiv 2106.09685), through peft."""

    rank: int = Field(ge=1, description="rank of the adapters")
    alpha: float | None = Field(
        default=None, gt=0, description="adapters are scaled by alpha / rank; default: 2 x rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the adapters")
    targets: tuple[str, ...] | None = Field(
        default=None, description="modules that get an adapter, by the end of their names; default: all linear layers"
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(), description="modules that are trained whole beside the adapters"
    )
    save_adapter: bool = Field(
        default=False, description="write adapter/ for peft too; model/ is always the merged model"
    )


class ProbeSettings(Settings):
    """What is asked of the student while it trains, from the store alone; and when to stop early."""

    steps: int = Field(ge=1, description="optimizer steps between probes")
    holdout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of each subset that is only probed, never trained on; the same for all seeds",
    )
    rows: int = Field(default=256, ge=1, description="at most so many rows of each subset are probed")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop after so many probes in a row without a lower loss on the held-out rows, and export the best",
    )

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> ProbeSettings:
        if self.patience is not None and self.holdout == 0:
            raise ValueError("patience does nothing without held-out rows: set probe.holdout, for example 0.1")
        return self


class TrainSettings(Settings):
    """Stage two: how a student is trained on a store. A setting that would do nothing is refused."""

    loss: Literal[
        "auto",
        "huber_raw",
        "huber_centred",
        "l1",
        "mse",
        "forward_kl_topk",
        "forward_kl_tail",
        "reverse_kl_tail",
        "jsd_topk",
    ] = Field(
        default="auto",
        description="see stages/losses.py; auto is huber_raw (the paper's) for a student that starts from the teacher's own "
        "weights, huber_centred for any other",
    )
    huber_delta: float | None = Field(
        default=None, gt=0, description="where Huber turns from square to linear, in logits; default: 1"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="divides the logits of forward_kl_topk and jsd_topk; default: 1"
    )
    top_k: int | None = Field(default=None, ge=1, description="use only so many of the stored ids; default: all")
    teachers: dict[Name, Annotated[float, Field(ge=0)]] | None = Field(
        default=None,
        description="weights of the teachers that are learned from, 0 leaves one out; default: all, each 1",
    )
    combine: Literal["mix", "average"] | None = Field(
        default=None,
        description="several teachers: mix (default) is the mean of the losses against each, average that against their mean",
    )
    forget_weight: float = Field(default=1.0, gt=0, description="weight of forget rows in the loss")
    retain_weight: float = Field(default=1.0, gt=0, description="weight of retain rows in the loss")
    position_decay: float = Field(
        default=1.0, gt=0, le=1, description="each further position of a row weighs so many times the one before it"
    )
    epochs: int = Field(default=10, ge=1, description="passes over the store")
    batch_size: int = Field(default=16, ge=1, description="queries per optimizer step, over all devices together")
    pass_tokens: int = Field(
        default=16384,
        ge=1,
        description="at most so many tokens, padding included, in one forward pass (one row at least)",
    )
    max_padding: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of a batch's tokens that may be padding: passes of rows of like length; 1 is one pass for all",
    )
    forget_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of forget queries in every batch; default: that of the store. An epoch is then over when every "
        "query has come at least once",
    )
    lr: float = Field(default=1e-5, gt=0, description="peak learning rate")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps with rising learning rate")
    decay: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="shape after the warm-up, down to zero"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw", description="adamw8bit keeps its state in 8 bits, through bitsandbytes"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this global norm")
    lora: LoraSettings | None = Field(default=None, description="train adapters instead of the whole model")
    freeze_embeddings: bool = Field(default=False, description="leave the embeddings and the output head as they are")
    last_layers: int | None = Field(
        default=None, ge=1, description="train the last so many decoder layers and nothing else"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of the forward pass and of frozen weights: auto is bfloat16 on a GPU that has it, else float32; "
        "trained weights stay float32",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute layers twice instead of keeping their insides"
    )
    compile: bool = Field(default=False, description="torch.compile each decoder layer")
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="of several processes: each holds the whole model, or (FSDP2) a part of it"
    )
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the exported weights: auto is that of the model the student started from"
    )
    checkpoint_steps: int = Field(default=500, ge=1, description="optimizer steps between checkpoints")
    keep_last: int = Field(default=1, ge=1, description="checkpoints that are kept while a student trains")
    probe: ProbeSettings | None = Field(default=None, description="probes during training, and early stopping")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="where metrics go beside metrics.jsonl"
    )
    seed: int = Field(default=0, ge=0, description="seed of the row order, of new adapters and of dropout")

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> TrainSettings:
        for setting, losses in LOSS_OPTIONS.items():
            if getattr(self, setting) is not None and self.loss not in losses:
                raise ValueError(
                    f"{setting} does nothing with loss {self.loss}: leave it out, or take {', '.join(losses)}"
                )
        for subset in ("forget", "retain"):
            if self.forget_share in (0, 1) and getattr(self, f"{subset}_weight") != 1:
                raise ValueError(f"{subset}_weight does nothing with forget_share {self.forget_share:g}: leave it out")
        trained = {
            "lora": self.lora,
            "last_layers": self.last_layers,
            "freeze_embeddings": self.freeze_embeddings or None,
        }
        chosen = [name for name, value in trained.items() if value is not None]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[1]} does nothing with {chosen[0]}, which freezes those weights: leave one out")
        return self


# Settings of `teacher` that decide how fast and on what, not what, is computed; numbers differ by rounding at most.
FREE_TEACHER = ("batch_size", "gpu_memory_utilization", "tensor_parallel", "pipeline_parallel", "data_parallel")
LOSS_OPTIONS = {  # the losses that take each option
    "huber_delta": ("auto", "huber_raw", "huber_centred"),
    "temperature": ("forward_kl_topk", "jsd_topk"),
}
# Settings of `train` that decide how fast and in what memory, not what, is computed; numbers differ by rounding at most.
FREE_TRAIN = (
    "pass_tokens", "max_padding", "gradient_checkpointing", "compile", "parallel",
    "checkpoint_steps", "keep_last", "trackers",
)  # fmt: skip


def teacher_weights(train: TrainSettings, names: Sequence[str], key: str = "train") -> dict[str, float]:
    """Weights, of sum 1, of those of a run's teachers that a student learns from, in the order of `names`.

    UserError, with `key` for the settings' place, where the settings name others or would do nothing.
    """
    wanted = dict.fromkeys(names, 1.0) if train.teachers is None else train.teachers
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"{key}.teachers: no teacher {unknown[0]!r}", f"the teachers are {', '.join(names)}")
    if train.teachers is not None and len(names) == 1:
        raise UserError(
            f"{key}.teachers does nothing: the run has one teacher", "leave it out, or list more in teachers:"
        )
    used = {name: wanted[name] for name in names if wanted.get(name)}
    if not used:
        raise UserError(f"{key}.teachers leaves out every teacher", f"give one a weight above 0: {', '.join(names)}")
    if len(used) == 1 and train.combine is not None:
        raise UserError(
            f"{key}.combine does nothing with one teacher", "leave it out, or name several in train.teachers"
        )
    if len(used) == 1 and set(used.values()) != {1}:
        raise UserError(
            f"{key}.teachers: the weight of a single teacher does nothing", f"give {next(iter(used))} the weight 1"
        )
    return {name: weight / sum(used.values()) for name, weight in used.items()}


# In a student's folder: how it was trained, once it is, and its states until then.
TRAINING_NAME, CHECKPOINTS_NAME = "training.json", "checkpoints"


class StudentSettings(Settings):
    """One student; its `train` entries override the common ones."""

    name: Name = Field(description="folder of the student in the run directory")
    model: Model | None = Field(
        default=None, description="model to start from, named as teacher.model is; default: the teacher's base model"
    )
    train: dict[str, Any] = Field(default={}, description="entries of train: that differ for this student")
    push_to_hub: str | None = Field(
        default=None, description="OWNER/NAME of a private Hugging Face repository that gets the finished model"
    )
