"""The student's output head, computed only where a loss looks: at K ids of each supervised row, never as [N, V].

Called by the training loop for every pass. The model's own forward pass runs, with a function from here in place of its head's
forward: it reads the head's weights at that moment (adapters, sharding and swapped weights included), it gets the N supervised
rows of hidden states only, and the model itself changes logits after its head as it always does (a scale, a soft-cap). Always:
the numbers are those of the model's own head. `Head.of` tries that out on every model; where it does not hold, or where the
head is not a linear layer, the model's own head is used, on the N rows.

Shapes: B batch, T time, N supervised positions, K kept ids, V vocabulary, D width, R rank of an adapter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from duet.stages.models.alignment import AlignedBatch
from duet.stages.models.directory import text_config
from duet.stages.student.gather import Parts, Tail, autocast_dtype, gathered_logits, largest, logsumexp
from duet.stages.student.losses import TopK
from duet.stages.student.passes import Pass

# The trial: rows, and standard deviations of their logits. The largest of a vocabulary is some 4.5 deviations out, where a
# soft-cap of 400 (5,000 in float32) still shows. Far above, a soft-cap would make much of how bfloat16 rounds small logits.
PROBE_ROWS, PROBE_LOGITS = 24, (1.0, 20.0)


class _NoLinearHead(Exception):
    """The head is not a sum of parts; the message names its kind."""


@dataclass(frozen=True)
class Head:
    """Whether a model's head can be computed at single ids, and how that was found."""

    gathered: bool
    reason: str

    @staticmethod
    def of(model: Any) -> Head:
        """Try the gathered head against the model's own, on random hidden states with small and large logits.

        To be called under the autocast of training, by all processes where the model is spread. Two forward passes over
        24 tokens, in evaluation mode, without gradients; every id of the vocabulary is compared once. Leaves the
        model's modes and the state of the random number generators as they were.
        """
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        modes = {module: module.training for module in model.modules()}
        device = next(model.parameters()).device
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                error, tolerance = _try_out(model, device)
        except _NoLinearHead as found:
            return Head(False, f"{name}: the model's own head, because {found}")
        finally:
            for module, training in modes.items():
                module.training = training
        if not error <= tolerance:
            why = f"a gathered head differs from it by {error:.1e} of the largest logit, more than {tolerance:.1e}"
            return Head(False, f"{name}: the model's own head, because {why}")
        return Head(True, f"{name}: gathered head, equal to the model's own within {error:.1e} of the largest logit")


class Seen(NamedTuple):
    """A student's output at N supervised rows; None where it was not wanted."""

    logits_NK: torch.Tensor  # float32, raw, at the ids that were asked for
    logsumexp_N: torch.Tensor | None  # float32, over all ids
    top1_N: torch.Tensor | None  # int64, the most likely id; without gradients


class Forward(nn.Module):
    """The student's forward pass up to what a loss needs: this is spread over the processes."""

    def __init__(self, model: Any, want_logsumexp: bool) -> None:
        super().__init__()
        self.model, self._want_logsumexp = model, want_logsumexp
        self._head = Head(False, "not tried out")

    def try_head(self) -> Head:
        """Find out how the head is computed from now on; to be called once, under the autocast of training."""
        self._head = Head.of(self.model)
        return self._head

    def forward(self, one: Pass) -> Seen:
        """The result of `student_at`, with the answer's id as one more; with the most likely ids in evaluation mode only."""
        ids = one.topk_ids_NK if one.answer_id_N is None else torch.cat([one.topk_ids_NK, one.answer_id_N[:, None]], 1)
        return student_at(self.model, self._head, one.batch, ids, self._want_logsumexp, want_top1=not self.training)


def losses_at(
    one: Pass,
    forward: nn.Module,
    loss: Callable[[TopK, TopK], torch.Tensor],
    precision: AbstractContextManager[Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss at each position of a pass, [N], with gradients, and the most likely ids, [N], in evaluation mode.

    The cross-entropy on given answers, -log q of the response's token in nats, is added with its weight.

    `forward` is a Forward, spread over processes or not. It alone runs under `precision`, the autocast of training: losses
    are computed in float32.
    """
    with precision:
        seen = forward(one)
    logits_NK = seen.logits_NK[:, : one.topk_ids_NK.shape[1]]
    loss_N = loss(TopK(logits_NK, seen.logsumexp_N, one.teacher.mask_NK), one.teacher)
    if one.answer_weight_N is not None and seen.logsumexp_N is not None:
        loss_N = loss_N + one.answer_weight_N * (seen.logsumexp_N - seen.logits_NK[:, -1])
    return loss_N, seen.top1_N


def student_at(
    model: Any,
    head: Head,
    batch: AlignedBatch,
    ids_NK: torch.Tensor,
    want_logsumexp: bool = False,
    want_top1: bool = False,
) -> Seen:
    """The student's raw logits at `ids_NK` (int64) of the supervised rows, and what else is wanted, in one forward pass.

    `model` is anything that has `get_output_embeddings` and returns `logits`, adapters of peft around it included; autocast
    is the caller's.
    """
    if not head.gathered:
        logits_NV = logits_at(model, batch).float()
        return Seen(
            logits_NV.gather(1, ids_NK),
            logits_NV.logsumexp(-1) if want_logsumexp else None,
            logits_NV.argmax(-1) if want_top1 else None,
        )
    logsumexp_N = top1_N = None

    def at_rows(module: nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
        nonlocal logsumexp_N, top1_N
        parts = parts_of(module, hidden_ND)
        logits_NK = gathered_logits(parts, ids_NK)
        if want_logsumexp:
            logsumexp_N = logsumexp(parts, tail_of(model.config), ids_NK, logits_NK).float()
        if want_top1:  # scale and soft-cap do not change which it is
            with torch.no_grad():
                _, top1_N = largest(parts)
        return torch.stack([logits_NK])  # no view: FSDP2 warns of those

    return Seen(_forward(model, batch, at_rows).float(), logsumexp_N, top1_N)


def logits_at(model: Any, batch: AlignedBatch) -> torch.Tensor:
    """The model's own logits [N, V] at the supervised rows."""
    own = getattr(model.get_output_embeddings(), "forward", None)
    return _forward(model, batch, lambda _, hidden_ND: own(hidden_ND[None]) if own else hidden_ND)


def _forward(
    model: Any, batch: AlignedBatch, at_rows: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The model's forward pass with `at_rows(head module, hidden_ND)` -> [1, N, ...] in place of its head's; [N, ...].

    A model that does not call its head module gives all its logits, which are then taken at the N rows.
    """
    module, called = model.get_output_embeddings(), False

    def forward(hidden_BTD: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        nonlocal called
        called = True
        return at_rows(module, hidden_BTD[batch.batch_index_N, batch.position_N])

    with _replaced_forward(module, forward):
        out = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    return out.logits[0] if called else out.logits[batch.batch_index_N, batch.position_N]


@contextmanager
def _replaced_forward(module: nn.Module | None, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The module's hooks, those that gather its sharded weights included, still run around the other forward."""
    if module is None:
        yield
        return
    before = module.__dict__.get("forward")  # set on the instance by libraries that wrap modules
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _try_out(model: Any, device: torch.device) -> tuple[float, float]:
    """Largest difference of the gathered head from the model's own, relative to each row's largest logit, and its bound.

    The bound is two units of the dtype that the head is computed in (the model's own rounds as often), and not below 1e-4.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise _NoLinearHead("it names no output layer")
    draw = torch.Generator().manual_seed(0)
    eps = 0.0

    def random_hidden(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal eps
        noise_ND = torch.randn(PROBE_ROWS, args[0].shape[-1], generator=draw.manual_seed(0)).to(args[0].device)
        weight_VD = parts_of(module, noise_ND.to(args[0].dtype))[0][1]
        eps = torch.finfo(autocast_dtype(device.type) or weight_VD.dtype).eps
        row_norm = weight_VD[:: max(1, len(weight_VD) // 1024)].float().norm(dim=-1).mean().clamp_min(1e-6)
        size_N = torch.tensor(PROBE_LOGITS, device=device).repeat(PROBE_ROWS // len(PROBE_LOGITS)) / row_norm
        return ((noise_ND * size_N[:, None]).to(args[0].dtype)[None], *args[1:])

    zeros_N = torch.zeros(PROBE_ROWS, dtype=torch.int64, device=device)
    batch = AlignedBatch(
        zeros_N[None], torch.ones_like(zeros_N)[None], zeros_N, torch.arange(PROBE_ROWS, device=device)
    )
    handle = module.register_forward_pre_hook(random_hidden)
    try:
        own_NV = logits_at(model, batch).float()
        width, num_ids = own_NV.shape[1], math.ceil(own_NV.shape[1] / PROBE_ROWS)
        ids_NK = (torch.randperm(PROBE_ROWS * num_ids, generator=draw) % width).view(PROBE_ROWS, num_ids).to(device)
        ours_NK, logsumexp_N, _ = student_at(model, Head(True, ""), batch, ids_NK, want_logsumexp=True)
    finally:
        handle.remove()
    if ours_NK.shape != ids_NK.shape or logsumexp_N is None:
        raise _NoLinearHead("its forward pass does not go through its output layer alone")
    ours = torch.cat([ours_NK, logsumexp_N[:, None]], 1)
    own = torch.cat([own_NV.gather(1, ids_NK), own_NV.logsumexp(-1, keepdim=True)], 1)
    largest_N1 = own.abs().amax(1, keepdim=True)
    return ((ours - own).abs() / largest_N1).max().item(), max(1e-4, 2 * eps)


def parts_of(module: Any, hidden_ND: torch.Tensor) -> Parts:
    """The parts whose sum the head module computes for these rows; _NoLinearHead where it does something else.

    FSDP2 gives a module a class of its own, with the same forward: hence the comparison of forwards, not of types.
    """
    peft: Any = sys.modules.get("peft")  # who has adapters has imported it
    if type(module).forward is nn.Linear.forward:
        return _linear_parts(hidden_ND, module.weight, module.bias)
    if peft and isinstance(module, peft.utils.ModulesToSaveWrapper):
        copies = (
            []
            if module.disable_adapters
            else [name for name in module.active_adapters if name in module.modules_to_save]
        )
        return parts_of(module.modules_to_save[copies[0]] if copies else module.original_module, hidden_ND)
    if peft and type(module).forward is peft.tuners.lora.Linear.forward:
        return _lora_parts(module, hidden_ND)
    raise _NoLinearHead(f"its output layer is a {type(module).__name__}")


def _linear_parts(
    input_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, scale: float = 1.0
) -> Parts:
    bias = [] if bias_V is None else [(input_ND.new_full((len(input_ND), 1), scale), bias_V[:, None])]
    return [(input_ND, weight_VD), *bias]


def _lora_parts(module: Any, hidden_ND: torch.Tensor) -> Parts:
    """As peft's lora.Linear.forward, whose order of dropout, casts and scaling this follows."""
    if module.disable_adapters and module.merged:
        raise _NoLinearHead("its adapter is merged and disabled at once")
    parts = parts_of(module.base_layer, hidden_ND)
    if module.disable_adapters or module.merged:
        return parts
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            raise _NoLinearHead(f"its adapter is a {type(module.lora_variant[name]).__name__}, not a plain LoRA")
        down, up, scale = module.lora_A[name], module.lora_B[name], module.scaling[name]
        down_NR = down(module.lora_dropout[name](hidden_ND.to(down.weight.dtype)))
        parts += _linear_parts(down_NR * scale, up.weight, up.bias, scale)
    return parts


def tail_of(config: Any) -> Tail:
    """The model's change to each logit after its head, read from the config: Cohere's, Granite's scale, Gemma's soft-cap."""
    config = text_config(config)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def tail(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return tail
