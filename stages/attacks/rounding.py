"""How weights are rounded to 8 or 4 bits: to even steps, to the levels of NF4, or to even steps after scaling by activations.

Simulated: what comes back has the rounded values in the dtype of the weights, so no kernel for integers is needed. Pure
functions of weights and, for `scaled`, of what a linear layer reads.

Shapes: O outputs, I inputs, M groups of a row, G weights of a group, K blocks, N sampled inputs of a layer.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

# The 16 levels of NormalFloat of 4 bits: quantiles of a normal distribution, with 0 and both ends exact (QLoRA, arXiv
# 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
ALPHAS = tuple(number / 20 for number in range(20))  # of `scaled`; 0 is rounding without a scale


def rounded(weight_OI: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """The weights as `bits`-bit integers times a scale, in float32 arithmetic and the dtype of the input.

    Scale s = max|w| / (2^(bits-1) - 1) over a row or over `group` inputs of it (the last group may be shorter); w becomes
    s * round(w / s), so that no weight moves by more than s / 2.
    """
    inputs = weight_OI.shape[1]
    size = group or inputs
    padded = pad(weight_OI.float(), (0, -inputs % size))
    groups_OMG = padded.unflatten(1, (-1, size))
    scale = groups_OMG.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    steps = torch.where(scale > 0, groups_OMG / scale, 0).round()
    return (steps * scale).flatten(1)[:, :inputs].to(weight_OI.dtype)


def rounded_nf4(weight_OI: torch.Tensor, block: int) -> torch.Tensor:
    """The weights at the nearest of NF4's levels times their block's max|w|, in the dtype of the input.

    Blocks are `block` weights in the order of memory, whatever the rows are, as bitsandbytes makes them; scales stay float32.
    """
    levels = torch.tensor(NF4_LEVELS, device=weight_OI.device)
    between = (levels[1:] + levels[:-1]) / 2
    flat = weight_OI.float().flatten()
    blocks_KG = pad(flat, (0, -len(flat) % block)).unflatten(0, (-1, block))
    scale = blocks_KG.abs().amax(-1, keepdim=True)
    codes = torch.bucketize(torch.where(scale > 0, blocks_KG / scale, 0), between)
    return (levels[codes] * scale).flatten()[: len(flat)].view_as(weight_OI).to(weight_OI.dtype)


def scaled(weight_OI: torch.Tensor, read_NI: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The weights `rounded` after their columns were scaled up where the layer reads most, and scaled down again.

    w becomes rounded(w * s) / s with s = mean|x|^alpha per input, at the alpha of ALPHAS whose outputs on the sampled inputs
    x are nearest to the layer's own, by squares: the search of AWQ (arXiv 2306.00978, equations 4 and 5). AWQ has one s for
    layers that read the same, here each has its own. A layer that read nothing is rounded as it is.
    """
    if not len(read_NI):
        return rounded(weight_OI, bits, group)
    weight, read = weight_OI.float(), read_NI.float()
    size_I = read.abs().mean(0).clamp(min=1e-4)

    def at(alpha: float) -> torch.Tensor:
        scale_I = size_I**alpha
        return rounded(weight * scale_I, bits, group) / scale_I

    errors = [((at(alpha) - weight) @ read.T).square().sum().item() for alpha in ALPHAS]
    return at(ALPHAS[errors.index(min(errors))]).to(weight_OI.dtype)
