"""Losses between a student's and the teacher's logits at the teacher's top-k ids.

Pure functions from two [N, K] tensors to one value per supervised position, [N]; N positions, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def huber_raw(student_NK: torch.Tensor, teacher_NK: torch.Tensor, delta: float) -> torch.Tensor:
    """Sum over the k ids of Huber(student - teacher) on raw logits, in squared logits below `delta`.

    DUET (arXiv 2601.21283), its objective J. Raw logits carry an offset per position that the softmax ignores and this
    loss does not, so it is meaningful only for a student that starts from the teacher's own weights.
    """
    return torch.nn.functional.huber_loss(student_NK, teacher_NK, reduction="none", delta=delta).sum(-1)


def huber_centred(student_NK: torch.Tensor, teacher_NK: torch.Tensor, delta: float) -> torch.Tensor:
    """`huber_raw` after each side's mean over the k ids is taken away: free of the offset. Ours, for other students."""
    return huber_raw(
        student_NK - student_NK.mean(-1, keepdim=True), teacher_NK - teacher_NK.mean(-1, keepdim=True), delta
    )


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "huber_raw": huber_raw,
    "huber_centred": huber_centred,
}
