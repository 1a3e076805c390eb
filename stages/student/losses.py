"""Losses between a student's and the teacher's logits at the teacher's top-k ids, and how much each position counts.

Pure functions on float32 or float64 tensors, with one value per supervised position, [N], as the result; stage two
gathers both sides' logits, picks a loss from `LOSSES` by its name and takes the weighted mean. Divergences are in nats.
No loss reads the teacher's ids: column k of both sides is the same vocabulary entry, whichever it is.

Shapes: N supervised positions, K kept ids; K+1 is the K ids and one bucket for the rest of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import huber_loss, log_softmax

# The least share of the ids outside the top-k. It is above 0 in float32, where log-sum-exps of 16 and more are rounded
# by up to 1e-6, so that a smaller share cannot be distinguished from none.
SMALLEST_TAIL = 1e-6
NO_CHANCE = -1e30  # a logit whose probability is 0 and whose differences are finite, in float32 too


@dataclass(frozen=True)
class TopK:
    """One side's raw logits at the teacher's top-k ids and, where a loss needs it, the log-sum-exp over all ids.

    Where an average of teachers has fewer than K ids, `mask_NK`, the same on both sides, says which columns count: the
    values in the others, as long as they are finite, change neither a loss nor its gradient.
    """

    logits_NK: torch.Tensor
    logsumexp_N: torch.Tensor | None = None
    mask_NK: torch.Tensor | None = None  # bool; None: all count
    share_NK: torch.Tensor | None = None  # each id's share of the teacher's draws; None where ids were not drawn


def huber_raw(student: TopK, teacher: TopK, delta: float) -> torch.Tensor:
    """Sum over the k ids of Huber(student - teacher) on raw logits: d^2 / 2 up to `delta`, delta (|d| - delta/2) above.

    DUET (arXiv 2601.21283), its objective J. Raw logits carry an offset per position that the softmax ignores and this
    loss does not, so it is meaningful only for a student that starts from the teacher's own weights.
    """
    return _summed(huber_loss(student.logits_NK, teacher.logits_NK, reduction="none", delta=delta), teacher)


def huber_centred(student: TopK, teacher: TopK, delta: float) -> torch.Tensor:
    """`huber_raw` after each side's mean over the k ids is taken away: free of the offset. Duet's own, for other students."""
    return huber_raw(_centred(student), _centred(teacher), delta)


def _centred(side: TopK) -> TopK:
    if side.mask_NK is None:
        return TopK(side.logits_NK - side.logits_NK.mean(-1, keepdim=True))
    mean_N = _summed(side.logits_NK, side) / side.mask_NK.sum(-1)
    return TopK(side.logits_NK - mean_N[:, None], mask_NK=side.mask_NK)


def _summed(values_NK: torch.Tensor, side: TopK) -> torch.Tensor:
    """[N]: the sum over the ids that count."""
    return _filled(values_NK, side, 0.0).sum(-1)


def _filled(values_NK: torch.Tensor, side: TopK, value: float) -> torch.Tensor:
    """The values, but for those of ids that do not count."""
    return values_NK if side.mask_NK is None else values_NK.masked_fill(~side.mask_NK, value)


def l1(student: TopK, teacher: TopK) -> torch.Tensor:
    """Sum over the k ids of |student - teacher| on raw logits: `huber_raw` for differences far above its delta of 1."""
    return _summed((student.logits_NK - teacher.logits_NK).abs(), teacher)


def mse(student: TopK, teacher: TopK) -> torch.Tensor:
    """Sum (no mean, no 1/2) over the k ids of (student - teacher)^2 on raw logits: twice `huber_raw` below its delta.

    Logit regression as in Ba and Caruana (arXiv 1312.6184), at the k ids only.
    """
    return _summed((student.logits_NK - teacher.logits_NK).square(), teacher)


def forward_kl_topk(student: TopK, teacher: TopK, temperature: float) -> torch.Tensor:
    """KL(teacher || student), both renormalised on the k ids at `temperature`, times temperature^2.

    Hinton et al. (arXiv 1503.02531), section 2: the factor keeps the gradients' size over temperatures. What either
    side gives to ids outside the top-k plays no part.
    """
    return temperature**2 * _kl(_topk_logprobs(teacher, temperature), _topk_logprobs(student, temperature))


def jsd_topk(student: TopK, teacher: TopK, temperature: float) -> torch.Tensor:
    """Jensen-Shannon divergence, both renormalised on the k ids at `temperature`, times temperature^2.

    With m = (teacher + student) / 2 it is KL(teacher || m) / 2 + KL(student || m) / 2, at most log 2 (Lin 1991, IEEE
    Trans. Inf. Theory 37(1); for distillation Agarwal et al., arXiv 2306.13649, with beta = 1/2).
    """
    student_NK, teacher_NK = _topk_logprobs(student, temperature), _topk_logprobs(teacher, temperature)
    mixture_NK = torch.logaddexp(student_NK, teacher_NK) - math.log(2)
    return temperature**2 * (_kl(teacher_NK, mixture_NK) + _kl(student_NK, mixture_NK)) / 2


def forward_kl_tail(student: TopK, teacher: TopK) -> torch.Tensor:
    """KL(teacher || student) over K+1 outcomes: the k ids with their true probabilities, and all other ids as one.

    Joining outcomes never raises a KL (log-sum inequality), so this is a lower bound of the KL over the vocabulary,
    and equal to it at k = V. No temperature: the stored log-sum-exp is that of temperature 1.
    """
    return _kl(_logprobs_with_tail(teacher), _logprobs_with_tail(student))


def reverse_kl_tail(student: TopK, teacher: TopK) -> torch.Tensor:
    """KL(student || teacher) over the K+1 outcomes of `forward_kl_tail`; MiniLLM's direction (arXiv 2306.08543)."""
    return _kl(_logprobs_with_tail(student), _logprobs_with_tail(teacher))


def forward_kl_sampled(student: TopK, teacher: TopK) -> torch.Tensor:
    """An estimate of KL(teacher || student) over the vocabulary from ids that were drawn from the teacher.

    Sum over the ids of share (log p - log q), each log-probability over the whole vocabulary. A share's expectation is the
    id's probability p, so the estimate and its gradient have the full KL's as their expectations: "Sparse Logit Sampling"
    (arXiv 2503.16870). One position's estimate may be negative.
    """
    if student.logsumexp_N is None or teacher.logsumexp_N is None or teacher.share_NK is None:
        raise ValueError("forward_kl_sampled needs shares and both log-sum-exps over the vocabulary; hint: see LOSSES")
    logp_NK, logq_NK = (side.logits_NK - side.logsumexp_N[:, None] for side in (teacher, student))  # pyright: ignore
    return (teacher.share_NK * (logp_NK - logq_NK)).sum(-1)


def _kl(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last axis."""
    return (logp.exp() * (logp - logq)).sum(-1)


def _topk_logprobs(side: TopK, temperature: float) -> torch.Tensor:
    """[N, K]: log-probabilities that sum to one over the k ids; NO_CHANCE, or about that, for those that do not count."""
    return log_softmax(_filled(side.logits_NK / temperature, side, NO_CHANCE), -1)


def _logprobs_with_tail(side: TopK) -> torch.Tensor:
    """[N, K+1]: log-probabilities over the vocabulary of the k ids, then that of all other ids together.

    With s the log of the k ids' share, the last is log(1 - e^s) = log(-expm1(s)) (Maechler 2012, "Accurately computing
    log(1 - exp(-|a|))"). Where the k ids hold everything, as at k = V, s is 0 up to rounding of either sign and the log
    has no finite value or slope: the tail then counts as SMALLEST_TAIL and has no gradient.
    """
    if side.logsumexp_N is None:
        raise ValueError("a loss with a tail needs the log-sum-exp over the vocabulary of both sides; hint: see LOSSES")
    share_N = side.logits_NK.logsumexp(-1) - side.logsumexp_N
    tail_N = torch.log(-torch.expm1(share_N.clamp(max=math.log1p(-SMALLEST_TAIL))))
    return torch.cat([side.logits_NK - side.logsumexp_N[:, None], tail_N[:, None]], -1)


@dataclass(frozen=True)
class Loss:
    """A loss and the facts that its users need."""

    function: Callable[..., torch.Tensor]
    option: str | None = None  # the setting that is its third argument: "huber_delta" or "temperature"
    needs_logsumexp: bool = False  # of both sides
    needs_draws: bool = False  # for stores whose ids were drawn, and only for those
    offset_free: bool = True  # unchanged when a constant is added to all of a position's student logits

    @property
    def least_ids(self) -> int:
        """Ids that a position must have: a loss that compares the ids with each other alone is 0 where there is but one."""
        return 2 if self.offset_free and not self.needs_logsumexp else 1


LOSSES: dict[str, Loss] = {
    "huber_raw": Loss(huber_raw, option="huber_delta", offset_free=False),
    "huber_centred": Loss(huber_centred, option="huber_delta"),
    "l1": Loss(l1, offset_free=False),
    "mse": Loss(mse, offset_free=False),
    "forward_kl_topk": Loss(forward_kl_topk, option="temperature"),
    "forward_kl_tail": Loss(forward_kl_tail, needs_logsumexp=True),
    "reverse_kl_tail": Loss(reverse_kl_tail, needs_logsumexp=True),
    "jsd_topk": Loss(jsd_topk, option="temperature"),
    "forward_kl_sampled": Loss(forward_kl_sampled, needs_logsumexp=True, needs_draws=True),
}


def loss_of(
    name: str, huber_delta: float | None = None, temperature: float | None = None
) -> Callable[[TopK, TopK], torch.Tensor]:
    """The loss of this name with its option bound, 1.0 where that is None; the other option is not used."""
    loss = LOSSES[name]
    if loss.option is None:
        return loss.function
    setting = {"huber_delta": huber_delta, "temperature": temperature}[loss.option]
    value = 1.0 if setting is None else setting
    return lambda student, teacher: loss.function(student, teacher, value)


def position_weights(
    subset_N: torch.Tensor, index_N: torch.Tensor, subset_weights: Sequence[float], decay: float
) -> torch.Tensor:
    """float32 [N]: the weight of the position's subset, times decay^index.

    `subset_N` is int64, the number of the position's subset; `index_N` int64, the position's index in its own row's response,
    from 0. A `decay` of 1 counts all positions alike, one of 0 the first only.
    """
    return torch.tensor(subset_weights, dtype=torch.float32)[subset_N] * decay ** index_N.float()
