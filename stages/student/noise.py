"""Damaged start weights: a part of every matrix is noise, so that a student keeps only what it is taught again.

UNDO (arXiv 2506.06278) trains a damaged copy to give the outputs of a silent model: in undamaged weights, knowledge that is
no longer said stays, and a few steps bring it back. Used by `model.py`, before a checkpoint is loaded.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch

from duet.stages.models.directory import text_config


def damage(model: Any, alpha: float, seed: int) -> None:
    """theta <- (1 - alpha) theta + alpha N, in place, for every parameter of two dimensions or more; N is `noise_of`.

    Vectors (norms, biases) stay. A head that is tied to the embeddings is one parameter with them. The sum is taken in float32.
    """
    scale = getattr(text_config(model.config), "initializer_range", None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                noise = noise_of(name, parameter.shape, scale, seed)
                parameter.copy_(parameter.float().mul_(1 - alpha).add_(noise, alpha=alpha))


def noise_of(name: str, shape: torch.Size, scale: float | None, seed: int) -> torch.Tensor:
    """Float32 on the CPU, normal around 0 with the standard deviation `scale`: the `initializer_range` of the model's config.

    Where the config has none, sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010), from the last two dimensions. A function
    of these arguments alone: neither the order of parameters nor the number of processes or devices plays a part.
    """
    if scale is None:
        scale = math.sqrt(2 / (shape[-1] + shape[-2]))
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    drawn = np.random.default_rng(int.from_bytes(digest)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(drawn).mul_(scale)
