"""The baselines' losses against values that were worked out by hand from their papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from duet.stages.compare import losses
from duet.stages.compare.repselect import selected

LN2, LN3 = math.log(2), math.log(3)


def test_log_probabilities_are_over_the_whole_vocabulary_and_sum_over_each_row():
    logits_NV = tensor([[0.0, LN3], [LN3, 0.0], [5.0, 5.0]])
    logprob_N = losses.token_logprobs(logits_NV, tensor([1, 1, 0]))
    assert logprob_N.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4), math.log(1 / 2)])
    sums_B, lengths_B = losses.per_row(logprob_N, tensor([0, 0, 1]), 2)
    assert sums_B.tolist() == pytest.approx([math.log(3 / 16), math.log(1 / 2)])
    assert lengths_B.tolist() == [2, 1]


def test_likelihood_and_its_ascent_are_means_over_answer_tokens():
    logprob_N = tensor([-1.0, -2.0, -6.0])  # two rows of one and two tokens would have the mean of means 2.5
    assert losses.nll(logprob_N).item() == pytest.approx(3)
    assert losses.gradient_ascent(logprob_N).item() == pytest.approx(-3)


def test_npo():
    # A ratio of 1 is sigmoid(0) = 1/2; a ratio of 2 with beta 1 is sigmoid(-ln 2) = 1/3.
    assert losses.npo(tensor([-4.0]), tensor([-4.0]), beta=0.1).item() == pytest.approx(20 * LN2)
    assert losses.npo(tensor([LN2 - 4]), tensor([-4.0]), beta=1).item() == pytest.approx(2 * LN3)
    both = losses.npo(tensor([-4.0, LN2 - 4]), tensor([-4.0, -4.0]), beta=1).item()
    assert both == pytest.approx(LN2 + LN3)


def test_npo_weighs_whole_answers_and_ends_where_gradient_ascent_does():
    sums_B = tensor([-4.0, -9.0], requires_grad=True)
    losses.npo(sums_B, tensor([-4.0, -9.0]), beta=1e-3).backward()
    assert sums_B.grad is not None
    assert sums_B.grad.tolist() == pytest.approx([0.5, 0.5])  # that of the mean of the sums, at the start for any beta


def test_simnpo_divides_by_the_length_and_keeps_a_margin():
    sums_B, lengths_B = tensor([-2 * LN2]), tensor([2.0])
    assert losses.simnpo(sums_B, lengths_B, beta=1, gamma=0).item() == pytest.approx(2 * math.log(3 / 2))
    assert losses.simnpo(sums_B, lengths_B, beta=1, gamma=LN2).item() == pytest.approx(2 * LN2)
    assert losses.simnpo(sums_B, lengths_B, beta=2, gamma=0).item() == pytest.approx(
        math.log(5 / 4)
    )  # sigmoid(2 ln 2) = 4/5


def test_dpo_prefers_the_refusal():
    found = losses.dpo(tensor([LN3 - 7]), tensor([-7.0]), tensor([-5.0]), tensor([-5.0]), beta=1)
    assert found.item() == pytest.approx(math.log(4 / 3))  # sigmoid(ln 3) = 3/4
    rejected = losses.dpo(tensor([-7.0]), tensor([-7.0]), tensor([-5 - LN3]), tensor([-5.0]), beta=1)
    assert rejected.item() == pytest.approx(math.log(4 / 3)), "a fall of the gold answer counts as much"
    assert losses.dpo(*map(tensor, ([1.0], [1.0], [2.0], [2.0])), beta=0.5).item() == pytest.approx(2 * LN2)


def test_undial_lowers_the_gold_tokens_logit():
    # softmax([0, ln 3] - [0, ln 3]) is even, so the cross-entropy is the mean of -ln 1/4 and -ln 3/4.
    logits_NV = reference_NV = tensor([[0.0, LN3]])
    found = losses.undial(logits_NV, reference_NV, tensor([1]), gamma=LN3)
    assert found.item() == pytest.approx(-0.5 * math.log(1 / 4) - 0.5 * math.log(3 / 4))
    entropy = losses.undial(logits_NV, reference_NV, tensor([1]), gamma=0).item()
    assert entropy == pytest.approx(-0.25 * math.log(1 / 4) - 0.75 * math.log(3 / 4))


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("kl", math.exp(1 - 1) - 0.5),
        ("tv", (math.tanh(1) - math.tanh(0.5)) / 2),
        ("js", -math.log(2 - 2 / (1 + math.exp(-1))) - math.log(2 / (1 + math.exp(-0.5)))),
        ("pearson", 1 / 4 + 1 - 0.5),
    ],
)
def test_flat(divergence, expected):
    """P(template) = 1/2, P(forget) = 1: f*(g*(1)) - g*(1/2)."""
    assert losses.flat(tensor([0.5]), tensor([1.0]), divergence).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("divergence", "f"),
    [("kl", lambda u: u * math.log(u)), ("pearson", lambda u: (u - 1) ** 2)],
)
def test_flats_conjugates_are_those_of_their_divergences(divergence, f):
    """f*(t) = sup over u of u t - f(u), here by trying."""
    gain, conjugate = losses.DIVERGENCES[divergence]
    for v in (0.1, 0.5, 0.9):
        t = gain(tensor(v)).item()
        tried = max(u * t - f(u) for u in (number / 1000 for number in range(1, 5000)))
        assert conjugate(tensor(v)).item() == pytest.approx(tried, abs=1e-4)


def test_rmu_is_squared_distances():
    hidden_ND = tensor([[1.0, 2.0], [0.0, 0.0]])
    assert losses.rmu_forget(hidden_ND, tensor([1.0, 0.0])).item() == pytest.approx((4 + 1) / 2)
    assert losses.rmu_retain(hidden_ND, torch.ones(2, 2)).item() == pytest.approx((1 + 2) / 2)


def test_answer_preservation_prefers_the_answer_to_the_refusal():
    found = losses.answer_preservation(tensor([LN3 - 7]), tensor([-7.0]), beta=1)
    assert found.item() == pytest.approx(math.log(4 / 3))  # sigmoid(ln 3) = 3/4
    assert losses.answer_preservation(tensor([-2.0]), tensor([-2.0]), beta=0.1).item() == pytest.approx(10 * LN2)


def test_answer_preservation_pulls_the_answer_up_and_the_refusal_down():
    answer_B, refusal_B = tensor([-3.0], requires_grad=True), tensor([-3.0], requires_grad=True)
    losses.answer_preservation(answer_B, refusal_B, beta=0.1).backward()
    assert answer_B.grad is not None
    assert refusal_B.grad is not None
    assert answer_B.grad.item() == pytest.approx(-0.5)  # -(1/beta) beta (1 - sigmoid(0))
    assert refusal_B.grad.item() == pytest.approx(0.5)


def test_jensen_shannon():
    """p = (1/4, 3/4), q = (1, 0), m = (5/8, 3/8): by the two divergences from m."""
    found = losses.jensen_shannon(tensor([[0.0, LN3]]), tensor([[1.0, 0.0]])).item()
    of_p = 1 / 4 * math.log(2 / 5) + 3 / 4 * math.log(2)
    of_q = math.log(8 / 5)
    assert found == pytest.approx((of_p + of_q) / 2, abs=1e-6)
    assert losses.jensen_shannon(tensor([[0.0, LN3]]), tensor([[0.25, 0.75]])).item() == pytest.approx(0, abs=1e-6)
    apart = losses.jensen_shannon(tensor([[200.0, 0.0]]), tensor([[0.0, 1.0]])).item()
    assert apart == pytest.approx(LN2, abs=1e-6), "never more, however far apart"


def test_jensen_shannon_has_a_finite_slope_where_a_probability_is_0():
    logits_NV = tensor([[0.0, 300.0, -300.0]], requires_grad=True)
    losses.jensen_shannon(logits_NV, tensor([[1.0, 0.0, 0.0]])).sum().backward()
    assert logits_NV.grad is not None
    assert torch.isfinite(logits_NV.grad).all()
    near_NV = tensor([[0.0, 1.0, -1.0]], requires_grad=True)
    losses.jensen_shannon(near_NV, tensor([[1.0, 0.0, 0.0]])).sum().backward()
    assert near_NV.grad is not None
    assert near_NV.grad[0, 0] < 0, "a step down raises the wanted token's logit"
    assert near_NV.grad[0, 1] > 0


def test_a_rows_first_token_has_its_share_and_rows_count_alike():
    values_N, row_N = tensor([8.0, 1.0, 3.0, 5.0]), tensor([0, 0, 0, 1])
    assert losses.first_weighted(values_N, row_N, 2, 0.5).item() == pytest.approx((8 / 2 + 2 / 2 + 5) / 2)
    assert losses.first_weighted(values_N, row_N, 2, 0.75).item() == pytest.approx((6 + 0.5 + 5) / 2)


def test_repselect_shrinks_the_leading_components_below_the_others():
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    found = selected(turn @ torch.diag(tensor([4.0, 2.0, 1.0])), 2)
    assert torch.allclose(found, turn @ torch.diag(tensor([1.0, 2.0, 1.0])), atol=1e-5)  # 2^2 / 4 and 2^2 / 2


def test_repselect_divides_on_both_sides_as_its_paper_says():
    gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    u, s, v = u[:, :3], s[:3], vh[:3].T
    shrunk = gradient
    for _ in range(2):  # right side, then left side by transposition
        along = shrunk @ v
        shrunk = (shrunk - (along - along / (s / s.min())) @ v.T).T
        u, v = v, u
    assert torch.allclose(selected(gradient, 3), shrunk, atol=1e-10)
