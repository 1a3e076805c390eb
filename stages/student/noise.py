"""Damaged start weights: a part of every matrix is noise, so that a student keeps only what it is taught again.

UNDO (arXiv 2506.06278) trains a damaged copy to give the outputs of a silent model: in undamaged weights, knowledge that is
no longer said stays, and a few steps bring it back. Used by `model.py`, before a checkpoint is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

SCALE = "own"  # how the noise is scaled, in identities; those that do not say it had the model's initial scale
BLOCK = 2**22  # weights that are squared at a time


def damage(parameters: Mapping[str, torch.Tensor], alpha: float, seed: int) -> None:
    """theta <- (1 - alpha) theta + alpha N, in place, for every parameter of two dimensions or more; N is `noise_of`.

    `parameters` are those of a model, or some of them, by the model's names for them.

    N has the parameter's own scale, so that alpha means the same of every model: UNDO takes the initial scale, which config
    files need not tell, or tell wrongly. Vectors (norms, biases) stay. A head that is tied to the embeddings is one parameter
    with them. The sum is taken in float32.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.ndim > 1:
                noise = noise_of(name, parameter.shape, scale_of(parameter), seed)
                mixed = parameter.float().mul(1 - alpha).add_(noise, alpha=alpha)
                parameter.data = mixed.to(parameter.dtype)  # in memory of its own, not in what is mapped from a file


def scale_of(weights: torch.Tensor) -> float:
    """The root mean square, which is the standard deviation around 0. Summed in float64, so that threads make no difference."""
    total = sum(block.double().square().sum().item() for block in weights.detach().flatten().split(BLOCK))
    return math.sqrt(total / weights.numel())


def noise_of(name: str, shape: torch.Size, scale: float, seed: int) -> torch.Tensor:
    """Float32 on the CPU, normal around 0 with the standard deviation `scale`.

    A function of these arguments alone: neither the order of parameters nor the number of processes or devices plays a part.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    drawn = np.random.default_rng(int.from_bytes(digest)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(drawn).mul_(scale)


def noise_identity(alpha: float) -> dict[str, Any]:
    """What the noise adds to the identity of a student; nothing where there is none."""
    return {"start_noise": alpha, "noise_scale": SCALE} if alpha else {}
