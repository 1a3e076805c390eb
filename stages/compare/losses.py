"""The losses of the unlearning methods that DUET is compared with: pure functions on tensors, each as its paper has it.

`methods.py` takes a model's log-probabilities at answer tokens, and nowhere else, and picks from here. Always:
prompt and padding tokens never reach a loss, and a loss over whole answers sums over its tokens, or averages them, as its
paper does. A loss is a scalar that is minimised. Log-probabilities are natural, over the whole vocabulary.

Shapes: B rows (one question with one answer each), N answer tokens of all rows together, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid, one_hot, softplus


def token_logprobs(logits_NV: torch.Tensor, answer_ids_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of each answer token, [N]: its logit less the log-sum-exp over the vocabulary."""
    return logits_NV.gather(1, answer_ids_N[:, None])[:, 0] - logits_NV.logsumexp(-1)


def per_row(values_N: torch.Tensor, row_N: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of a value per answer token over each row, [B], and the rows' numbers of answer tokens, [B]."""
    sums_B = values_N.new_zeros(num_rows).index_add(0, row_N, values_N)
    lengths_B = values_N.new_zeros(num_rows).index_add(0, row_N, torch.ones_like(values_N))
    return sums_B, lengths_B


def nll(logprob_N: torch.Tensor) -> torch.Tensor:
    """Mean over all answer tokens of -log p: what a model is fine-tuned with. Every method's term on the retain set but RMU's,
    and on the refusals of refusal training (TOFU, arXiv 2401.06121, its "IDK": refusals on forget, answers on retain).
    """
    return -logprob_N.mean()


def gradient_ascent(logprob_N: torch.Tensor) -> torch.Tensor:
    """The negative of `nll`: mean over all answer tokens of log p (TOFU, arXiv 2401.06121, "Gradient Ascent"); unbounded below.

    With `nll` on the retain set it is their GradDiff.
    """
    return logprob_N.mean()


def npo(sums_B: torch.Tensor, reference_sums_B: torch.Tensor, beta: float) -> torch.Tensor:
    """-(2 / beta) E[log sigmoid(-beta log(pi_theta(y|x) / pi_ref(y|x)))] (Zhang et al., arXiv 2404.05868, equation 3).

    y is the whole answer, so the sums of its tokens' log-probabilities are compared, not logits; the reference is the model
    before training. As beta goes to 0 it becomes gradient ascent on the sums.
    """
    return -2 / beta * logsigmoid(-beta * (sums_B - reference_sums_B)).mean()


def simnpo(sums_B: torch.Tensor, lengths_B: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """-(2 / beta) E[log sigmoid(-(beta / |y|) log pi_theta(y|x) - gamma)] (Fan et al., arXiv 2410.07163).

    No reference model; |y| is the number of answer tokens, gamma the margin.
    """
    return -2 / beta * logsigmoid(-beta * sums_B / lengths_B - gamma).mean()


def dpo(
    chosen_B: torch.Tensor,
    reference_chosen_B: torch.Tensor,
    rejected_B: torch.Tensor,
    reference_rejected_B: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """-(1 / beta) E[log sigmoid(beta log(pi/pi_ref)(chosen) - beta log(pi/pi_ref)(rejected))] on sums over whole answers.

    Rafailov et al., arXiv 2305.18290, equation 7, scaled by 1 / beta as in arXiv 2404.05868, equation 2. TOFU's "preference
    optimisation" takes a refusal as the chosen and the gold answer as the rejected one.
    """
    margin_B = (chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B)
    return -logsigmoid(beta * margin_B).mean() / beta


def undial(
    logits_NV: torch.Tensor, reference_logits_NV: torch.Tensor, answer_ids_N: torch.Tensor, gamma: float
) -> torch.Tensor:
    """E over answer tokens of H(softmax(z_ref - gamma onehot(y)), p_theta) (Dong et al., arXiv 2402.10052).

    Cross-entropy to the reference's own distribution after the gold token's logit was lowered by gamma. The mean is over
    answer tokens only, not over prompt and padding.
    """
    lowered_NV = reference_logits_NV - gamma * one_hot(answer_ids_N, logits_NV.shape[1])
    return -(lowered_NV.softmax(-1) * logits_NV.log_softmax(-1)).sum(-1).mean()


# Per divergence: the optimal variational function g* and the conjugate at it, f*(g*(.)) (arXiv 2410.11143, table 2).
DIVERGENCES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "kl": (lambda v: v, lambda v: torch.exp(v - 1)),
    "tv": (lambda v: torch.tanh(v) / 2, lambda v: torch.tanh(v) / 2),
    "js": (lambda v: math.log(2) - softplus(-v), lambda v: softplus(v) - math.log(2)),
    "pearson": (lambda v: v, lambda v: v * v / 4 + v),
}


def flat(template_B: torch.Tensor, forget_B: torch.Tensor, divergence: str) -> torch.Tensor:
    """E[-g*(P(template)) + f*(g*(P(forget)))] (Wang et al., FLAT, arXiv 2410.11143).

    P, [B], is the mean over an answer's tokens of the probability of each, not of its logarithm; the template is a refusal.
    Minimising it maximises the f-divergence between the two in its variational form.
    """
    gain, conjugate = DIVERGENCES[divergence]
    return (conjugate(forget_B) - gain(template_B)).mean()


def rmu_forget(hidden_ND: torch.Tensor, target_D: torch.Tensor) -> torch.Tensor:
    """E over tokens of |h(t) - c u|^2, u a random unit vector and c a number (Li et al., RMU, arXiv 2403.03218)."""
    return (hidden_ND - target_D).square().sum(-1).mean()


def rmu_retain(hidden_ND: torch.Tensor, frozen_ND: torch.Tensor) -> torch.Tensor:
    """E over tokens of |h(t) - h_frozen(t)|^2, to be weighed by alpha (same paper)."""
    return (hidden_ND - frozen_ND).square().sum(-1).mean()


def answer_preservation(answer_B: torch.Tensor, refusal_B: torch.Tensor, beta: float) -> torch.Tensor:
    """-(1 / beta) E[log sigmoid(beta (log p(y|q) - log p(refusal|q)))] on sums over whole answers, of questions to be kept.

    The AP term of IDK+AP (Yuan et al., arXiv 2410.08109): the answer is to stay likelier than the refusal, so that refusing
    does not spread. No reference model.
    """
    return -logsigmoid(beta * (answer_B - refusal_B)).mean() / beta


SMALLEST = 1e-10  # probabilities below it count as it: the slope of p log p has no end at 0


def jensen_shannon(logits_NV: torch.Tensor, other_NV: torch.Tensor) -> torch.Tensor:
    """JSD(p || q) = H((p + q)/2) - (H(p) + H(q))/2 in nats, [N]; p = softmax(logits), q probabilities, H the entropy.

    The same as KL(p || m)/2 + KL(q || m)/2 with m their mean (JensUn, arXiv 2509.02820). Between 0 and log 2, so that a loss of
    it is bounded in both directions.
    """
    p_NV = logits_NV.softmax(-1)
    mixed_N, own_N, other_N = (
        torch.special.entr(probabilities_NV.clamp(min=SMALLEST)).sum(-1)
        for probabilities_NV in ((p_NV + other_NV) / 2, p_NV, other_NV)
    )
    return mixed_N - (own_N + other_N) / 2


def first_weighted(values_N: torch.Tensor, row_N: torch.Tensor, num_rows: int, first: float) -> torch.Tensor:
    """Mean over rows of first x (the row's first value) + (1 - first) x (the mean of its others); of one value, that value.

    JensUn++ (arXiv 2607.09236), w_1 = `first`. A row's values stand together, rows in ascending order.
    """
    new_N = torch.ones_like(row_N, dtype=torch.bool)
    new_N[1:] = row_N[1:] != row_N[:-1]
    length_N = torch.bincount(row_N, minlength=num_rows)[row_N].to(values_N.dtype)
    weight_N = torch.where(new_N, first, (1 - first) / (length_N - 1).clamp(min=1))
    return (values_N * torch.where(length_N == 1, 1.0, weight_N)).sum() / num_rows
