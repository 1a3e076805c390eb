"""The base of a LoRA student in four bits, as QLoRA keeps it (arXiv 2305.14314): NF4, with the scales themselves in 8 bits.

Rounded are the linear layers of the decoder; embeddings, output head, norms and biases stay as they are. `model.py` trains
adapters on the rounded base, and exports the base with the rounded values, so that the saved student is the trained one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from duet.cache.errors import UserError
from duet.stages.models.layers import decoder_layers
from duet.stages.settings.lora import LoraSettings
from duet.stages.settings.student import TrainSettings

BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share one of their own: those of QLoRA


def is_packed(settings: TrainSettings) -> bool:
    """Whether a student of these settings has a base in 4 bits."""
    return settings.lora is not None and settings.lora.base_bits is not None


def round_base(model: Any, lora: LoraSettings, dtype: torch.dtype, packed: bool) -> None:
    """Round the linear layers of the decoder to NF4, in place; of a model on the meta device, only check that it can be done.

    `packed`: the weights stay in 4 bits, and products are computed in `dtype`. Else they are float32 with the rounded values,
    which are the same bit for bit. UserError where bitsandbytes is missing or the decoder has matrices of another kind.
    """
    layers = rounded_layers(model, lora)
    functional, kinds = _bitsandbytes()
    for name, layer in layers.items():
        if layer.weight.is_meta:
            continue
        weight, state = functional.quantize_4bit(
            layer.weight.data.float(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        if packed:
            model.set_submodule(name, _packed(layer, weight, state, dtype, kinds))
        else:
            layer.weight.data = functional.dequantize_4bit(weight, state)


def rounded_layers(model: Any, lora: LoraSettings) -> dict[str, nn.Linear]:
    """The layers that are rounded, by name: those of the decoder that are not trained whole.

    UserError where other matrices of the decoder would stay as they are.
    """
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    trained = tuple(f".{name}" for name in lora.modules_to_save)
    modules = {n: module for n, module in model.named_modules() if id(module) in inside and not n.endswith(trained)}
    for name, module in modules.items():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
        if own and type(module) is not nn.Linear:
            raise UserError(
                f"train.lora.base_bits: {name} is a {type(module).__name__}, and only linear layers can be kept in 4 bits",
                "leave out train.lora.base_bits, or start from a model whose layers are linear, as Llama's and Qwen's are",
            )
    return {name: module for name, module in modules.items() if type(module) is nn.Linear}


def packed_bytes(num_weights: int) -> int:
    """Bytes of a matrix in NF4: 4 bits a weight, 8 a block, and a float32 for 256 blocks."""
    blocks = -(-num_weights // BLOCK)
    return -(-num_weights // 2) + blocks + 4 * -(-blocks // SCALES)


def num_weights(parameter: nn.Parameter) -> int:
    """Numbers in a weight, packed or not."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _packed(layer: nn.Linear, weight: torch.Tensor, state: Any, dtype: torch.dtype, kinds: Any) -> nn.Module:
    """bitsandbytes' layer, without its kernel for newer CPUs, which rounds scales to bfloat16."""
    made = kinds.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    made.weight = kinds.Params4bit(
        weight,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        quant_type="nf4",
        bnb_quantized=True,
        module=made,
    )
    made.quant_state, made.bias = state, layer.bias
    made.support_avx512bf16_for_cpu = False
    return made


def _bitsandbytes() -> tuple[Any, Any]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels whenever it is imported
    try:
        from bitsandbytes import functional, nn
    except ImportError:
        raise UserError(
            "train.lora.base_bits: 4 needs bitsandbytes, which is not installed", "pip install 'duet-unlearn[8bit]'"
        ) from None
    return functional, nn
