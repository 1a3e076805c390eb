"""The model that a student is trained as: which of its weights are trained, and in which dtype. `export.py` writes it out.

Trained weights are float32 whatever the forward pass is computed in; frozen matrices are kept in the forward pass's
dtype, so that a frozen base costs half under bfloat16.

Shapes: N supervised positions of a pass, K kept ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from duet.cache.errors import UserError
from duet.stages.models.layers import decoder_layers
from duet.stages.models.loading import load_model
from duet.stages.settings.lora import LoraSettings
from duet.stages.settings.student import TrainSettings
from duet.stages.student.contexts import Wide
from duet.stages.student.four_bits import is_packed, num_weights, round_base
from duet.stages.student.head import Forward, Head, losses_at
from duet.stages.student.job import StudentJob
from duet.stages.student.losses import LOSSES, TopK, loss_of
from duet.stages.student.noise import damage
from duet.stages.student.passes import Pass
from duet.stages.student.ranks import Processes, in_parts_again, on_first


def load_trainable(
    model_dir: Path,
    name: str,
    settings: TrainSettings,
    forward_dtype: torch.dtype,
    trust_remote_code: bool,
    uniform: bool,
) -> Any:
    """The model in training mode, on the CPU; new adapters are drawn from `settings.seed`.

    `uniform`: all weights in float32, frozen ones too, as FSDP2 wants those of a layer; a base of 4 bits has its
    rounded values.
    """
    return made_trainable(load_model(model_dir, "auto", trust_remote_code), name, settings, forward_dtype, uniform)


def made_trainable(model: Any, name: str, settings: TrainSettings, forward_dtype: torch.dtype, uniform: bool) -> Any:
    """Turn a loaded model, or one on the meta device, into that of `load_trainable`."""
    model = _prepared(model, name, settings, forward_dtype, uniform)
    set_dtypes(model.parameters(), forward_dtype, uniform)
    return model


def set_dtypes(parameters: Iterable[torch.nn.Parameter], forward_dtype: torch.dtype, uniform: bool) -> None:
    """Give a prepared model's parameters, or some of them, the dtypes of `load_trainable`."""
    for parameter in parameters:
        frozen_matrix = not parameter.requires_grad and parameter.ndim > 1 and not uniform
        if parameter.is_floating_point():  # not what is packed
            parameter.data = parameter.data.to(forward_dtype if frozen_matrix else torch.float32)


def _prepared(model: Any, name: str, settings: TrainSettings, forward_dtype: torch.dtype, uniform: bool) -> Any:
    """The model in training mode with its adapters, what is frozen marked, all weights still in the dtypes of their files.

    Weights that nothing changes here are still mapped from the files, so that they take no memory of this process.
    """
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"{type(model).__name__} has no gradient checkpointing", "set train.gradient_checkpointing: false"
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.lora:
        if settings.lora.base_bits:
            round_base(model, settings.lora, forward_dtype, packed=not uniform)
        torch.manual_seed(settings.seed)
        model = _with_adapters(model, settings.lora)
        model.peft_config["default"].base_model_name_or_path = name  # not the directory, which may be private
    elif settings.last_layers:
        _train_last_layers(model, settings.last_layers)
    elif settings.freeze_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(False)
    if settings.compile:
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    return model.train()


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _train_last_layers(model: Any, count: int) -> None:
    layers = decoder_layers(model)
    if count > len(layers):
        raise UserError(f"train.last_layers is {count}, the model has {len(layers)} layers", f"at most {len(layers)}")
    model.requires_grad_(False)
    for layer in layers[len(layers) - count :]:
        layer.requires_grad_(True)


def _with_adapters(model: Any, lora: LoraSettings) -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of optional kernels
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if lora.targets else "all-linear",
        modules_to_save=list(lora.modules_to_save) or None,
    )
    names = [name for name, _ in model.named_modules()]
    for key in ("targets", "modules_to_save"):
        for wanted in getattr(lora, key) or ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                ends = sorted(
                    {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} - {""}
                )
                raise UserError(f"train.lora.{key}: the model has no module {wanted!r}", f"it has {', '.join(ends)}")
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    model = get_peft_model(model, config)
    if embeddings[0].weight is embeddings[1].weight and any(
        module not in list(model.modules()) or module is not now
        for module, now in zip(embeddings, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True)
    ):
        raise UserError(
            "train.lora: this model's output head is tied to its embeddings, and adapters on one would untie them",
            "leave embeddings and head out of train.lora.targets and modules_to_save",
        )
    return model


@dataclass(frozen=True)
class Student:
    """A model with all that it takes to train it."""

    settings: TrainSettings
    processes: Processes
    pad_id: int  # fills up shorter rows
    model: Any
    head: Head
    module: torch.nn.Module  # a Forward, spread over the processes
    optimizer: torch.optim.Optimizer
    loss: Callable[[TopK, TopK], torch.Tensor]
    num_parameters: int
    num_trained: int
    load: (
        Callable[[], Any] | None
    )  # loads the model again, exact but without noise, on the CPU; None where `model` is whole and neither rounded nor packed
    wide: Wide | None = None  # puts its questions into contexts

    @staticmethod
    def of(job: StudentJob, loss: str, pad_id: int, processes: Processes, wide: Wide | None = None) -> Student:
        """Load the model that the job starts from, with its noise, spread it over the processes, and try its head out."""
        settings = job.settings
        spread = in_parts(settings, processes)
        dtype = forward_dtype_of(settings, processes.device)

        def load(dtype: torch.dtype = torch.float32, uniform: bool = True) -> Any:
            return load_trainable(job.model_dir, job.start_name, settings, dtype, job.trust_remote_code, uniform)

        mapped = load_model(job.model_dir, "auto", job.trust_remote_code)
        model = _prepared(mapped, job.start_name, settings, dtype, uniform=spread)
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def ready(part: torch.nn.Module) -> None:
            own = [parameter for parameter in part.parameters() if not isinstance(parameter, DTensor)]
            set_dtypes(own, dtype, uniform=spread)
            if job.start_noise:
                damage({names[id(parameter)]: parameter for parameter in own}, job.start_noise, settings.seed)
            part.to(processes.device)

        counts = (sum(map(num_weights, model.parameters())), sum(p.numel() for p in trained(model).values()))
        rounded = is_packed(settings) or (counts[0] != counts[1] and dtype != torch.float32)
        forward = Forward(model, LOSSES[loss].needs_logsumexp or settings.answer_weight > 0)
        layers = list(decoder_layers(model)) if spread else []
        module = processes.spread(forward, layers, settings.parallel, ready)
        with autocast(settings, processes.device):
            head = forward.try_head()
        in_parts_again(forward)
        optimizer = optimizer_of(list(trained(model).values()), settings)
        loss_fn = loss_of(loss, settings.huber_delta, settings.temperature)
        reload = load if spread or rounded else None
        return Student(settings, processes, pad_id, model, head, module, optimizer, loss_fn, *counts, reload, wide)

    def answer(self, one: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the most likely id at each position, both [N], as the student is when it is used."""
        self.module.eval()
        try:
            with torch.no_grad():
                loss_N, top1_N = losses_at(one, self.module, self.loss, self.autocast())
        finally:
            self.module.train()
            in_parts_again(self.module)
        assert top1_N is not None  # it was in evaluation mode
        return loss_N, top1_N

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return autocast(self.settings, self.processes.device)

    def has_room_for(self, dtype: torch.dtype) -> bool:
        """Whether the device of one process, which had the trained model, has room for the exported one in its place."""
        if self.load is None:  # it is the trained one itself
            return True
        if in_parts(self.settings, self.processes):
            return False
        held = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        return self.processes.device.type == "cpu" or dtype.itemsize * self.num_parameters <= held

    def whole_model(self) -> Any:
        """The model in one piece; in the first process only, but all must ask. Another one than the trained takes its place."""
        if self.load is None:
            return self.model
        parameters = {n: on_first(p.detach(), self.processes) for n, p in trained(self.model).items()}
        if not self.processes.first:
            return None
        model = self.load()
        with torch.no_grad():
            for name, parameter in trained(model).items():
                parameter.copy_(parameters[name])
        if self.processes.device.type != "cpu" and not in_parts(self.settings, self.processes):
            self.model.cpu()
        return model


def in_parts(settings: TrainSettings, processes: Processes) -> bool:
    """Whether each process holds a part of the model only."""
    return processes.rank.world > 1 and settings.parallel == "fsdp"


def forward_dtype_of(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass on this device."""
    return forward_dtype(settings, device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def forward_dtype(settings: TrainSettings, gpu_has_bf16: bool) -> torch.dtype:
    """bfloat16 where asked for, or on "auto" where a GPU has it."""
    wanted = settings.dtype == "bfloat16" or (settings.dtype == "auto" and gpu_has_bf16)
    return torch.bfloat16 if wanted else torch.float32


def export_dtype_of(settings: TrainSettings, config: Any) -> torch.dtype:
    """The dtype of the exported weights: as set, on "auto" that of the model that training starts from."""
    if settings.export_dtype != "auto":
        return getattr(torch, settings.export_dtype)
    return getattr(config, "dtype", None) or torch.float32


def autocast(settings: TrainSettings, device: torch.device) -> AbstractContextManager[Any]:
    dtype = forward_dtype_of(settings, device)
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def optimizer_of(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise UserError(
            "train.optimizer: adamw8bit needs bitsandbytes, which is not installed", "pip install 'duet-unlearn[8bit]'"
        ) from None
    return AdamW8bit(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
