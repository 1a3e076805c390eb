"""Settings of stage two: one line and, where it has one, a unit per field.

Validation never edits a value. Values that the DUET paper does not publish (k, learning rate, batch size, epochs, delta) are
Duet's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from duet.cache.errors import UserError
from duet.stages.settings.base import Name, Settings
from duet.stages.settings.lora import LoraSettings
from duet.stages.settings.teacher import Model


class ProbeSettings(Settings):
    """What is asked of the student while it trains, from the store alone; and when to stop early."""

    steps: int = Field(ge=1, description="optimizer steps between probes")
    holdout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of each subset that is only probed, never trained on; the same for all seeds",
    )
    rows: int = Field(default=256, ge=1, description="largest number of rows probed of each subset")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop after this number of probes in a row without a lower loss on the held-out rows, and export the best",
    )
    stop_within: float | None = Field(
        default=None,
        gt=0,
        description="stop once the loss on held-out broad rows, or else retain rows, is at most this many nats above the "
        "teacher's own, which is 0 with a KL loss, and export that student",
    )

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> ProbeSettings:
        if self.patience is not None and self.holdout == 0:
            raise ValueError("patience does nothing without held-out rows: set probe.holdout, for example 0.1")
        if self.stop_within is not None and self.holdout == 0:
            raise ValueError("stop_within does nothing without held-out rows: set probe.holdout, for example 0.1")
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
        "forward_kl_sampled",
    ] = Field(
        default="auto",
        description="see stages/student/losses.py; auto is huber_raw (the paper's) for a student that starts from the "
        "teacher's own weights, huber_centred for any other; with start_noise forward_kl_tail, where the stores serve it; "
        "with sampled ids forward_kl_sampled",
    )
    huber_delta: float | None = Field(
        default=None, gt=0, description="where Huber turns from square to linear, in logits; default: 1"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="divides the logits of forward_kl_topk and jsd_topk; default: 1"
    )
    top_k: int | None = Field(
        default=None, ge=1, description="number of stored ids used per position, the likeliest; default: all"
    )
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
    broad_weight: float = Field(default=1.0, gt=0, description="weight of broad rows in the loss")
    answer_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight, beside the loss, of the cross-entropy on the given answers of retain rows; needs a store with "
        "teacher.responses: given",
    )
    position_decay: float = Field(
        default=1.0, gt=0, le=1, description="loss weight of each position relative to the one before it"
    )
    epochs: int = Field(default=10, ge=1, description="passes over the store")
    batch_size: int = Field(default=16, ge=1, description="queries per optimizer step, over all devices together")
    pass_tokens: int = Field(
        default=16384,
        ge=1,
        description="largest number of tokens, padding included, in one forward pass (at least one row)",
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
        description="share of forget queries in every batch; default: that of the store. Retain and broad rows share the rest "
        "as they do in the store. An epoch is then over when every query has come at least once",
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
        default=None, ge=1, description="number of decoder layers trained, the last ones; nothing else is trained"
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
    contexts: Literal["none", "texts", "attacks"] = Field(
        default="none",
        description="what stands around the student's questions: texts draws texts that attacks are made of; attacks also "
        "begins half of the answers to forget as the model that it starts from would. Targets stay those of the plain question",
    )
    checkpoint_steps: int = Field(default=500, ge=1, description="optimizer steps between checkpoints")
    keep_last: int = Field(default=1, ge=1, description="checkpoints that are kept while a student trains")
    probe: ProbeSettings | None = Field(default=None, description="probes during training, and early stopping")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="where metrics go beside metrics.jsonl"
    )
    seed: int = Field(default=0, ge=0, description="seed of the row order, of new adapters and of dropout")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=2,
        description="train each student once with each of these seeds, as NAME-seed0 and so on, and report them as one row "
        "too; default: once, with seed",
    )

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> TrainSettings:
        for setting, losses in LOSS_OPTIONS.items():
            if getattr(self, setting) is not None and self.loss not in losses:
                raise ValueError(
                    f"{setting} does nothing with loss {self.loss}: leave it out, or take {', '.join(losses)}"
                )
        if self.probe and self.probe.stop_within is not None and self.loss not in DIVERGENCES:
            raise ValueError(
                f"probe.stop_within is a distance in nats, which loss {self.loss} is not: take {', '.join(DIVERGENCES)}"
            )
        if self.probe and self.probe.stop_within is not None and self.answer_weight:
            raise ValueError(
                "probe.stop_within is a distance to the teacher, and answer_weight adds to it: leave one out"
            )
        idle = {0: ("forget",), 1: ("forget", "retain", "broad")}  # by forget_share
        for subset in idle.get(self.forget_share, ()):  # pyright: ignore[reportArgumentType, reportCallIssue]
            if getattr(self, f"{subset}_weight") != 1:
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


LOSS_OPTIONS = {  # the losses that take each option
    "huber_delta": ("auto", "huber_raw", "huber_centred"),
    "temperature": ("forward_kl_topk", "jsd_topk"),
}
DIVERGENCES = ("forward_kl_topk", "forward_kl_tail", "reverse_kl_tail", "jsd_topk")  # 0 where student and teacher agree
# Settings of `train` that decide how fast and in what memory, not what, is computed; numbers differ by rounding at most.
FREE_TRAIN = (
    "pass_tokens", "max_padding", "gradient_checkpointing", "compile", "parallel",
    "checkpoint_steps", "keep_last", "trackers",
)  # fmt: skip


def deciding_settings(train: TrainSettings) -> dict[str, Any]:
    """The settings that decide what is computed, as JSON: equal for two trainings that give the same weights.

    What came later than the first students is not among them where it does nothing: those are found again.
    """
    found = train.model_dump(mode="json", exclude=set(FREE_TRAIN))
    probe, lora = found["probe"], found["lora"]
    for fields, group, keys in (
        (TrainSettings, found, ("broad_weight", "answer_weight", "contexts", "seeds")),
        (ProbeSettings, probe, ("stop_within",)),
        (LoraSettings, lora, ("base_bits",)),
    ):
        for key in keys if group else ():
            if group[key] == fields.model_fields[key].default:
                del group[key]
    return found


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


def check_start_noise(start_noise: float, train: TrainSettings, where: str) -> None:
    """Refuse start noise where some of the noised weights would not be trained; `where` is the student's place in a config."""
    frozen = {"lora": train.lora, "last_layers": train.last_layers, "freeze_embeddings": train.freeze_embeddings}
    if start_noise and (kept := next((name for name, value in frozen.items() if value), None)):
        raise UserError(
            f"{where}.start_noise with train.{kept}: the noise would stay in the weights that are not trained",
            f"leave out start_noise, or train.{kept} so that the whole model is trained",
        )


# In a student's folder: how it was trained, once it is; its states until then; a line for each step; the trained model.
TRAINING_NAME, CHECKPOINTS_NAME, METRICS_NAME, MODEL_DIR = "training.json", "checkpoints", "metrics.jsonl", "model"


class StudentSettings(Settings):
    """One student; its `train` entries override the common ones."""

    name: Name = Field(description="folder of the student in the run directory")
    model: Model | None = Field(
        default=None, description="model to start from, named as teacher.model is; default: the teacher's base model"
    )
    start_noise: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="alpha: each matrix of the start weights becomes (1 - alpha) of itself + alpha noise of its own root "
        "mean square, drawn by train.seed; 0 leaves them as they are",
    )
    train: dict[str, Any] = Field(default={}, description="entries of train: that differ for this student")
    push_to_hub: str | None = Field(
        default=None, description="OWNER/NAME of a private Hugging Face repository that gets the finished model"
    )
