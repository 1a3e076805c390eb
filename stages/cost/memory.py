"""A stage's need of memory and time, before a weight is loaded: from a model's sizes, the settings and the rows.

Weights, gradients and optimizer states are counted, not estimated. Activations follow the formula of `activation_bytes`. Rates
are peak rates times a share, and shares are assumptions. A layer's attention scores count as never kept (flash attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet.stages.cost.gpus import Device
from duet.stages.models.batching import cut_by_length, rows_that_fit
from duet.stages.models.layers import decoder_layers
from duet.stages.models.sizes import DTYPE_BYTES, ModelSizes, meta_model
from duet.stages.settings.student import TrainSettings
from duet.stages.student.four_bits import packed_bytes, rounded_layers
from duet.stages.student.model import forward_dtype, made_trainable

# Assumptions, not measured: the share of a device's peak rates that is reached.
READ_SHARE = 0.4  # of FLOP/s, while prompts are read
TRAIN_SHARE = 0.35  # of FLOP/s, while a student trains
BANDWIDTH_SHARE = 0.7  # of bytes/s
OVERHEAD_BYTES = 1e9  # of the driver's context; on a CPU of the imported libraries, measured: 0.97 GB
FRAGMENTS = 0.05  # of all else, which the allocator cannot use
STEP_BYTES = (
    32  # per trained weight and step: gradient read twice, written once, weight and two states read and written
)
BLOCK8 = 256  # values that share one scale in an 8-bit state (bitsandbytes, blockwise)
SMALL8 = 4096  # tensors with fewer values keep 32-bit states there (bitsandbytes, min_8bit_size)
ASSUMPTIONS = (
    f"{READ_SHARE:.0%} of the peak rate while prompts are read, {TRAIN_SHARE:.0%} in training, {BANDWIDTH_SHARE:.0%} of the "
    f"memory's bandwidth, {FRAGMENTS:.0%} and {OVERHEAD_BYTES / 1e9:g} GB that nobody can use: assumed, "
    "not measured, but for that 1 GB on a CPU",
    "attention keeps no scores (flash attention), responses reach their longest, nothing else uses the device; vLLM takes "
    "teacher.gpu_memory_utilization of a GPU, whatever it needs",
)


@dataclass(frozen=True)
class Need:
    """Bytes on one device by purpose, and seconds."""

    parts: dict[str, float]
    seconds: float

    @property
    def total(self) -> float:
        return sum(self.parts.values()) * (1 + FRAGMENTS) + OVERHEAD_BYTES

    def fits(self, device: Device) -> bool:
        return self.total <= device.memory_bytes


@dataclass(frozen=True)
class Reading:
    """Prompts that a model is asked."""

    longest: int  # tokens, with the response
    prompt_tokens: int  # to be computed
    new_tokens: int  # of all responses, at most
    batch: int  # prompts at a time, at most


def kv_bytes(sizes: ModelSizes, tokens: int, dtype: str) -> int:
    """Keys and values of all layers: 2 x layers x width of the keys per token."""
    return 2 * sizes.layers * sizes.keys * DTYPE_BYTES[dtype] * tokens


def reading_need(
    sizes: ModelSizes, dtype: str, reading: Reading, device: Device, devices: int = 1, weight_bytes: float | None = None
) -> Need:
    """A model that is asked, spread over `devices` (tensor or pipeline parallel, which divide weights and cache).

    Time: 2 FLOP per parameter and token; a step of decoding is bound by these or by reading the weights once, and a batch
    makes one token per prompt in it. `weight_bytes` per parameter, where weights are quantised.
    """
    weights = sizes.parameters * (weight_bytes or DTYPE_BYTES[dtype])
    batch = rows_that_fit(reading.longest, reading.batch)
    tokens = batch * reading.longest
    rate = device.flops(dtype) * READ_SHARE * devices
    decoded = max(
        2 * sizes.parameters * reading.new_tokens / rate,
        weights / devices / (device.bytes_per_s * BANDWIDTH_SHARE) * reading.new_tokens / batch,
    )
    parts = {
        "weights": weights / devices,
        "KV cache": kv_bytes(sizes, tokens, dtype) / devices,
        "activations": tokens * (4 * sizes.hidden + 3 * sizes.inner) * DTYPE_BYTES[dtype],  # of one layer
        "logits": batch * sizes.vocabulary * (DTYPE_BYTES[dtype] + 4),  # as they come, and in float32
    }
    return Need(parts, 2 * sizes.parameters * reading.prompt_tokens / rate + decoded)


def activation_bytes(sizes: ModelSizes, tokens: int, layers: int, dtype: str, checkpointing: bool) -> int:
    """Bytes kept for the backward pass by layers like Llama's, Qwen's and Mistral's (h hidden, q heads, f inner).

    Counted from the tensors that autograd saves, in bytes per token and layer. float32: two norms keep their input, the
    normed and the weighted value (24 h), attention its queries, keys and values, each as wide as the heads, its result and
    the projection's input (20 q), the feed-forward part four values (16 f). Under bfloat16 autocast the residual stream and
    the norms stay float32 (16 h), each of the five linear layers that read them keeps a copy of its own (10 h), and the rest
    halves (10 q + 8 f). With checkpointing, each layer keeps its input (4 h), and one at a time all of it.
    """
    h, q, f = sizes.hidden, sizes.attention, sizes.inner
    layer = 24 * h + 20 * q + 16 * f if dtype == "float32" else 26 * h + 10 * q + 8 * f
    return tokens * (4 * h * layers + layer if checkpointing else layer * layers)


def adam_bytes(parameters: Sequence[torch.nn.Parameter], optimizer: str) -> int:
    """AdamW's two states, float32 and a step count per tensor; in 8 bits a byte a value and a float32 scale per block."""
    if optimizer == "adamw":
        return sum(8 * p.numel() + 4 for p in parameters)
    return sum(
        2 * (p.numel() + 4 * -(-p.numel() // BLOCK8)) if p.numel() >= SMALL8 else 8 * p.numel() for p in parameters
    )


@dataclass(frozen=True)
class StudentOnMeta:
    """A student of these settings on the meta device, and the rows that it reads."""

    sizes: ModelSizes
    settings: TrainSettings
    dtype: str  # of the forward pass
    model: Any
    layers: int  # that keep something for the backward pass
    spread: bool  # the weights also lie in parts on several devices
    packed: list[torch.Tensor]  # weights in 4 bits

    @staticmethod
    def of(
        model_dir: Path, settings: TrainSettings, device: Device, devices: int, trust_remote_code: bool
    ) -> StudentOnMeta:
        dtype = forward_dtype(settings, device.kind == "cuda" and device.bf16)
        spread = devices > 1 and settings.parallel == "fsdp"
        plain = settings.model_copy(update={"compile": False})
        model = meta_model(model_dir, trust_remote_code)
        lora = settings.lora
        packed = [m.weight for m in rounded_layers(model, lora).values()] if lora and lora.base_bits else []
        model = made_trainable(model, "", plain, dtype, uniform=spread)
        stack = list(decoder_layers(model))
        frozen = next((i for i, layer in enumerate(stack) if any(p.requires_grad for p in layer.parameters())), 0)
        ends_trained = model.get_input_embeddings().weight.requires_grad
        layers = len(stack) - (0 if ends_trained else frozen)
        sizes, dtype_name = ModelSizes.of(model_dir, trust_remote_code), str(dtype).removeprefix("torch.")
        return StudentOnMeta(sizes, settings, dtype_name, model, layers, spread, packed)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def num_trained(self) -> int:
        return sum(p.numel() for p in self.trained)

    @property
    def ends(self) -> list[torch.nn.Parameter]:
        """The weights of embeddings and head; tied ones are one."""
        return [m.weight for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings())]

    def weight_bytes(self) -> int:
        """Trained weights in float32, frozen matrices in the forward pass's dtype or in 4 bits, as they are loaded."""
        packed = {id(p) for p in self.packed}
        others = sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in packed)
        return others + sum(packed_bytes(p.numel()) for p in self.packed)


def student_need(student: StudentOnMeta, lengths: np.ndarray, device: Device, devices: int = 1) -> Need:
    """Training on `devices`, one process each: memory of one of them, and the time of all epochs.

    Time: forward 2 FLOP per parameter and token, backward 2 to pass the gradient on and 2 for each trained weight; the output
    head is gathered and costs nothing beside these. A pass reads all weights three times, and a step moves `STEP_BYTES` per
    trained weight. `lengths` are those of the rows, in tokens; activations are of a pass as large as one can be.

    Against a measurement (a step of a 120M student on a CPU, docs/performance.md): gradients, the one in the making, copies and
    the activations of its largest pass are 872 MB here and 978 MB there in float32, 943 and 1,002 MB in bfloat16.
    """
    settings, sizes = student.settings, student.sizes
    rows = -(-settings.batch_size // devices)  # of a step, on one device
    longest = int(lengths.max())
    tokens = max(longest, min(settings.pass_tokens, rows * longest))
    parts = _held(student, devices)
    parts["activations"] = activation_bytes(
        sizes, tokens, student.layers, student.dtype, settings.gradient_checkpointing
    )
    steps = settings.epochs * -(-len(lengths) // settings.batch_size)
    drawn = np.random.default_rng(0).choice(lengths, min(rows, len(lengths)), replace=False)
    passes = len(cut_by_length(drawn, settings.max_padding, settings.pass_tokens))
    inner = sizes.parameters - sizes.embedding
    forward = 2 * (2 if settings.gradient_checkpointing else 1)
    flop = inner * (forward + 2 * student.layers / sizes.layers) + 2 * min(student.num_trained, inner)
    speed = device.bytes_per_s * BANDWIDTH_SHARE
    computed = flop * float(lengths.mean()) * rows / (device.flops(student.dtype) * TRAIN_SHARE)
    read = 3 * passes * inner * DTYPE_BYTES[student.dtype] / speed
    share = devices if student.spread else 1
    return Need(parts, steps * (max(computed, read) + STEP_BYTES * student.num_trained / share / speed))


def _held(student: StudentOnMeta, devices: int) -> dict[str, float]:
    """Everything that stays in memory from step to step, and the copies of weights."""
    settings, trained = student.settings, student.num_trained
    share = devices if student.spread else 1
    parts = {
        "weights": student.weight_bytes() / share,
        "gradients": 4 * trained / share,
        "optimizer states": adam_bytes(student.trained, settings.optimizer) / share,
    }
    if student.packed:  # one at a time
        largest = max(p.numel() for p in student.packed)
        parts["a matrix of 4 bits, unpacked"] = DTYPE_BYTES[student.dtype] * largest
    ends = {id(p): p.numel() for p in student.ends if p.requires_grad}.values()
    if ends:  # beside the sum, the gradient that is added to it is whole for a moment; those of layers are small
        parts["gradient in the making"] = 4 * (sum(ends) if student.spread else max(ends))
    if student.dtype != "float32":
        cast = sum(p.numel() for p in _cast(student.model))
        parts["16-bit copies of weights"] = 2 * cast / share
    if student.spread:
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(student.model))
        parts["gathered weights"] = 4 * (
            2 * layer + student.sizes.embedding
        )  # the next layer is fetched ahead; the ends stay
    elif devices > 1:
        parts["gradient buckets"] = 4 * trained  # of DistributedDataParallel
    return parts


def _cast(model: Any) -> list[torch.nn.Parameter]:
    """Float32 matrices that autocast copies: trained ones of linear layers, without the head, which is gathered."""
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return [p for m in linear for p in m.parameters() if p.ndim > 1 and p.dtype == torch.float32]
