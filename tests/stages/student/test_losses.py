"""Losses against textbook forms at k = V, hand-computed values, known bounds and limits, and float64 gradients."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from duet.stages.student.losses import LOSSES, SMALLEST_TAIL, TopK, loss_of, position_weights

DELTA, TEMPERATURE = 0.7, 2.5
TAIL_LOSSES = [name for name, loss in LOSSES.items() if loss.needs_logsumexp and not loss.needs_draws]
NOT_DRAWN = [name for name, loss in LOSSES.items() if not loss.needs_draws]  # at any k, at least 0


def top_of(logits_NV: torch.Tensor, ids_NK: torch.Tensor) -> TopK:
    """One side as stage two hands it over: gathered logits, the log-sum-exp of the whole row, the shares of endless draws."""
    p_NK = logits_NV.detach().softmax(-1).gather(1, ids_NK)
    return TopK(logits_NV.gather(1, ids_NK), logits_NV.logsumexp(-1), share_NK=p_NK)


def random_sides(
    n: int, v: int, k: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student [n, v], teacher [n, v], the teacher's top-k ids [n, k])."""
    generator = torch.Generator().manual_seed(seed)
    student_NV, teacher_NV = scale * torch.randn(2, n, v, generator=generator, dtype=dtype)
    return student_NV, teacher_NV, teacher_NV.topk(k, dim=-1).indices


def dense_kl(p_NV: torch.Tensor, q_NV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of probabilities; torch's kl_div takes the log of its SECOND argument first."""
    return F.kl_div(q_NV.log(), p_NV, reduction="none").sum(-1)


def dense_forward_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return temperature**2 * dense_kl((teacher_NV / temperature).softmax(-1), (student_NV / temperature).softmax(-1))


def dense_jsd(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """By entropies instead of divergences: H(mixture) - (H(p) + H(q)) / 2."""
    p_NV, q_NV = (student_NV / temperature).softmax(-1), (teacher_NV / temperature).softmax(-1)

    def entropy(x_NV: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(x_NV, x_NV).sum(-1)

    return temperature**2 * (entropy((p_NV + q_NV) / 2) - (entropy(p_NV) + entropy(q_NV)) / 2)


DENSE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "huber_raw": lambda s, t: F.huber_loss(s, t, reduction="none", delta=DELTA).sum(-1),
    "huber_centred": lambda s, t: F.huber_loss(
        s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True), reduction="none", delta=DELTA
    ).sum(-1),
    "l1": lambda s, t: F.l1_loss(s, t, reduction="none").sum(-1),
    "mse": lambda s, t: F.mse_loss(s, t, reduction="none").sum(-1),
    "forward_kl_topk": lambda s, t: dense_forward_kl(s, t, TEMPERATURE),
    "forward_kl_tail": lambda s, t: dense_forward_kl(s, t, 1.0),
    "reverse_kl_tail": lambda s, t: dense_forward_kl(t, s, 1.0),
    "jsd_topk": lambda s, t: dense_jsd(s, t, TEMPERATURE),
    "forward_kl_sampled": lambda s, t: dense_forward_kl(s, t, 1.0),
}


def test_every_loss_has_a_textbook_form_here():
    assert DENSE.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_k_equal_to_v_is_the_dense_loss_whatever_the_order_of_ids(name):
    student_NV, teacher_NV, _ = random_sides(6, 11, 11)
    ids_NK = torch.stack([torch.randperm(11) for _ in range(6)])
    gathered = loss_of(name, DELTA, TEMPERATURE)(top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK))
    assert gathered.shape == (6,)
    # the tail's share is never below SMALLEST_TAIL, yet costs nothing where both sides are at that floor
    torch.testing.assert_close(gathered, DENSE[name](student_NV, teacher_NV), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NOT_DRAWN if name not in TAIL_LOSSES])
def test_k_below_v_is_the_dense_loss_of_the_gathered_logits(name):
    student_NV, teacher_NV, ids_NK = random_sides(6, 50, 7)
    student, teacher = top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK)
    expected = DENSE[name](student.logits_NK, teacher.logits_NK)
    torch.testing.assert_close(loss_of(name, DELTA, TEMPERATURE)(student, teacher), expected)


def joined(logits_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Probabilities [N, K+1]: those of `ids_NK`, then the plain sum of all others."""
    p_NV = logits_NV.softmax(-1)
    outside_NV = torch.ones_like(p_NV).scatter(1, ids_NK, 0)
    return torch.cat([p_NV.gather(1, ids_NK), (p_NV * outside_NV).sum(-1, keepdim=True)], -1)


def test_tail_losses_are_the_dense_divergence_of_k_plus_one_outcomes():
    student_NV, teacher_NV, ids_NK = random_sides(20, 50, 7)
    p, q = joined(teacher_NV, ids_NK), joined(student_NV, ids_NK)
    student, teacher = top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK)
    torch.testing.assert_close(loss_of("forward_kl_tail")(student, teacher), dense_kl(p, q))
    torch.testing.assert_close(loss_of("reverse_kl_tail")(student, teacher), dense_kl(q, p))


def test_tail_losses_grow_with_k_up_to_the_divergence_over_the_vocabulary():
    student_NV, teacher_NV, ids_NV = random_sides(20, 30, 30)
    for name in TAIL_LOSSES:
        by_k = [loss_of(name)(top_of(student_NV, ids_NV[:, :k]), top_of(teacher_NV, ids_NV[:, :k])) for k in (1, 5, 30)]
        assert (by_k[0] < by_k[1]).all()
        assert (by_k[1] < by_k[2]).all()
        torch.testing.assert_close(by_k[2], DENSE[name](student_NV, teacher_NV))


def test_the_tail_in_float32_is_near_float64():
    student_NV, teacher_NV, ids_NK = random_sides(50, 1000, 64, scale=4.0)
    for name in TAIL_LOSSES:
        exact = loss_of(name)(top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK))
        single = loss_of(name)(top_of(student_NV.float(), ids_NK), top_of(teacher_NV.float(), ids_NK))
        torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)


# Values by hand. Raw losses: differences 0.5, 3 and 0. Divergences: two ids, teacher (3/4, 1/4), student (1/2, 1/2).
# With a tail: teacher (1/2, 1/4; 1/4), student (1/4, 1/4; 1/2), whose divergence is log(2)/4 in both directions.
RAW = ([[0.5, 3.0, 7.0]], [[0.0, 0.0, 7.0]])
LOG = ([[math.log(2), math.log(2)]], [[math.log(3), 0.0]])


def by_hand(values: tuple[list, list], logsumexp: float | None = None) -> tuple[TopK, TopK]:
    lse_N = None if logsumexp is None else torch.tensor([logsumexp])
    return TopK(torch.tensor(values[0]), lse_N), TopK(torch.tensor(values[1]), lse_N)


@pytest.mark.parametrize(
    ("name", "option", "values", "expected"),
    [
        ("huber_raw", {}, RAW, 0.125 + 1 * (3 - 0.5)),
        ("huber_raw", {"huber_delta": 2.0}, RAW, 0.125 + 2 * (3 - 1)),
        # means 3.5 and 7/3: differences -2/3, 11/6 and -7/6
        ("huber_centred", {}, RAW, (2 / 3) ** 2 / 2 + (11 / 6 - 0.5) + (7 / 6 - 0.5)),
        ("l1", {}, RAW, 3.5),
        ("mse", {}, RAW, 9.25),
        ("forward_kl_topk", {}, LOG, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        # at temperature 1/2 the odds of 3 become 9: teacher (0.9, 0.1)
        ("forward_kl_topk", {"temperature": 0.5}, LOG, 0.25 * (0.9 * math.log(1.8) + 0.1 * math.log(0.2))),
        # mixture (5/8, 3/8)
        ("jsd_topk", {}, LOG, 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3) + 0.5 * math.log(16 / 15))),
    ],
)
def test_values_by_hand(name, option, values, expected):
    assert loss_of(name, **option)(*by_hand(values)).item() == pytest.approx(expected)


@pytest.mark.parametrize(("name", "expected"), [("forward_kl_tail", math.log(2) / 4), ("reverse_kl_tail", None)])
def test_values_by_hand_with_a_tail(name, expected):
    # logits up to the constant log 4, which is then the log-sum-exp
    student, teacher = by_hand(([[0.0, 0.0]], [[math.log(2), 0.0]]), logsumexp=math.log(4))
    assert loss_of(name)(student, teacher).item() == pytest.approx(expected or math.log(2) / 4)
    # teacher (1/2; 1/2), student (1/4; 3/4): the directions differ
    student, teacher = by_hand(([[0.0]], [[math.log(2)]]), logsumexp=math.log(4))
    forward, reverse = (math.log(2) + math.log(2 / 3)) / 2, (math.log(1 / 2) + 3 * math.log(3 / 2)) / 4
    assert loss_of(name)(student, teacher).item() == pytest.approx(forward if expected else reverse)


@pytest.mark.parametrize("share", [1e-5, 2e-6, SMALLEST_TAIL, 1e-9, 0.0, -1e-5])
def test_a_tail_counts_with_its_own_share_down_to_the_smallest_tail(share):
    """`share` is what the student's log-sum-exp leaves outside one id; less than nothing is a rounding error."""
    logits_NK = torch.zeros(1, 1, dtype=torch.float64)
    student = TopK(logits_NK, torch.tensor([-math.log1p(-share)], dtype=torch.float64, requires_grad=True))
    teacher = TopK(logits_NK, torch.tensor([math.log(2)], dtype=torch.float64))
    value = loss_of("forward_kl_tail")(student, teacher)
    value.sum().backward()
    expected = (math.log(0.5 / (1 - share)) + math.log(0.5 / max(share, 1e-6))) / 2
    assert value.item() == pytest.approx(expected, rel=1e-9)
    assert student.logsumexp_N is not None
    assert student.logsumexp_N.grad is not None
    assert abs(student.logsumexp_N.grad.item()) <= 0.5 / SMALLEST_TAIL + 1
    if share < SMALLEST_TAIL:  # of the id alone
        assert student.logsumexp_N.grad.item() == 0.5


@pytest.mark.parametrize("name", NOT_DRAWN)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 9), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_never_below_zero_and_zero_at_equality(name, seed, k, scale):
    student_NV, teacher_NV, ids_NK = random_sides(4, 9, k, seed, scale)
    loss, student, teacher = loss_of(name), top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK)
    # a tail at its floor makes the outcomes' shares sum to 1 + SMALLEST_TAIL at most
    assert (loss(student, teacher) > -2 * SMALLEST_TAIL).all()
    assert loss(teacher, teacher).abs().max() < 1e-12


@pytest.mark.parametrize("name", NOT_DRAWN)
def test_differing_sides_cost_something(name):
    student_NV, teacher_NV, ids_NK = random_sides(50, 9, 4)
    assert (loss_of(name)(top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK)) > 1e-3).all()


def test_jensen_shannon_is_symmetric_and_bounded():
    student, teacher = TopK(torch.tensor([[80.0, -80.0]])), TopK(torch.tensor([[-80.0, 80.0]]))
    assert loss_of("jsd_topk")(student, teacher).item() == pytest.approx(math.log(2))
    student_NV, teacher_NV, _ = random_sides(6, 5, 5)
    loss, student, teacher = loss_of("jsd_topk", temperature=0.5), TopK(student_NV), TopK(teacher_NV)
    torch.testing.assert_close(loss(student, teacher), loss(teacher, student))


def test_at_high_temperature_divergences_are_squared_differences_of_centred_logits():
    # second order in 1/T: T^2 KL -> sum d^2 / (2K) with d the centred difference; Jensen-Shannon is a quarter of it
    student_NV, teacher_NV, _ = random_sides(6, 8, 8)
    d_NV = student_NV - student_NV.mean(-1, keepdim=True) - (teacher_NV - teacher_NV.mean(-1, keepdim=True))
    limit_N = d_NV.square().sum(-1) / (2 * 8)
    student, teacher = TopK(student_NV), TopK(teacher_NV)
    torch.testing.assert_close(
        loss_of("forward_kl_topk", temperature=1e4)(student, teacher), limit_N, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(loss_of("jsd_topk", temperature=1e4)(student, teacher), limit_N / 4, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [1, 4, 6])
def test_gradients(name, k):
    """Through the gather and the log-sum-exp, as in training; k = 6 is the whole vocabulary."""
    student_NV, teacher_NV, ids_NK = random_sides(3, 6, k)
    loss, teacher = loss_of(name, 0.9, 1.7), top_of(teacher_NV, ids_NK)
    assert torch.autograd.gradcheck(lambda s_NV: loss(top_of(s_NV, ids_NK), teacher), (student_NV.requires_grad_(),))


WITHOUT_TAIL = [name for name in NOT_DRAWN if name not in TAIL_LOSSES]


def masked_sides(dtype: torch.dtype, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student [6, 5], teacher [6, 5], mask): 5 to 1 columns count, 0 stands in the teacher's others."""
    student_NK, teacher_NK, _ = random_sides(6, 5, 5, scale=scale, dtype=dtype)
    mask_NK = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 3])[:, None]
    return student_NK, teacher_NK.masked_fill(~mask_NK, 0.0), mask_NK


@pytest.mark.parametrize("name", WITHOUT_TAIL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_that_do_not_count_change_neither_the_loss_nor_its_gradient(name, dtype):
    student_NK, teacher_NK, mask_NK = masked_sides(dtype)
    student_NK.requires_grad_()
    loss = loss_of(name, DELTA, TEMPERATURE)
    value_N = loss(TopK(student_NK, mask_NK=mask_NK), TopK(teacher_NK, mask_NK=mask_NK))
    [gradient_NK] = torch.autograd.grad(value_N.sum(), student_NK)
    assert not gradient_NK[~mask_NK].any()
    for n, counted in enumerate(mask_NK):
        alone_1C = student_NK[n, counted].detach()[None].requires_grad_()
        expected = loss(TopK(alone_1C), TopK(teacher_NK[n, counted][None]))
        torch.testing.assert_close(value_N[n : n + 1], expected)
        torch.testing.assert_close(gradient_NK[n, counted][None], torch.autograd.grad(expected.sum(), alone_1C)[0])


@pytest.mark.parametrize("name", WITHOUT_TAIL)
def test_gradients_beside_ids_that_do_not_count(name):
    student_NK, teacher_NK, mask_NK = masked_sides(torch.float64)
    loss, teacher = loss_of(name, 0.9, 1e-3), TopK(teacher_NK, mask_NK=mask_NK)
    assert loss(TopK(student_NK, mask_NK=mask_NK), teacher).isfinite().all()
    loss = loss_of(name, 0.9, 1.7)
    assert torch.autograd.gradcheck(lambda s: loss(TopK(s, mask_NK=mask_NK), teacher), (student_NK.requires_grad_(),))


@pytest.mark.parametrize("name", TAIL_LOSSES)
def test_losses_with_a_tail_have_no_use_for_an_average(name):
    student_NK, teacher_NK, mask_NK = masked_sides(torch.float64)
    with pytest.raises(ValueError, match="needs the log-sum-exp"):
        loss_of(name)(TopK(student_NK, mask_NK=mask_NK), TopK(teacher_NK, mask_NK=mask_NK))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_extreme_logits_have_finite_values_and_gradients(name, dtype, k):
    student_NV = torch.tensor([[80.0, -80, 80, -80], [-80, -80, -80, 80], [80, 80, 80, 80]], dtype=dtype)
    teacher_NV = torch.tensor([[-80.0, 80, 80, -80], [80, -80, -80, -80], [80, 80, 80, 80]], dtype=dtype)
    ids_NK = teacher_NV.topk(k, dim=-1).indices
    value_N = loss_of(name)(top_of(student_NV.requires_grad_(), ids_NK), top_of(teacher_NV, ids_NK))
    value_N.sum().backward()
    assert value_N.isfinite().all()
    assert student_NV.grad is not None
    assert student_NV.grad.isfinite().all()
    assert student_NV.grad.abs().max() <= 2 * 160 + 1  # that of mse; above all no 1 / SMALLEST_TAIL


@pytest.mark.parametrize("name", TAIL_LOSSES)
@pytest.mark.parametrize("off", [-1e-5, -1e-6, 0.0, 1e-6, 1e-5, 1e-2])
def test_a_stored_logsumexp_that_is_slightly_off_harms_nothing(name, off):
    student_NV, teacher_NV, ids_NK = random_sides(6, 9, 9, scale=8.0, dtype=torch.float32)
    teacher = top_of(teacher_NV, ids_NK)
    shifted = dataclasses.replace(teacher, logsumexp_N=teacher_NV.logsumexp(-1) + off)
    exact, value = (loss_of(name)(top_of(student_NV.requires_grad_(), ids_NK), side) for side in (teacher, shifted))
    value.sum().backward()
    torch.testing.assert_close(value, exact, rtol=0.02, atol=20 * abs(off) + 1e-5)  # log(SMALLEST_TAIL) is -14
    assert student_NV.grad is not None
    assert student_NV.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_what_each_function_does(name):
    loss = LOSSES[name]
    options = {None: [], "huber_delta": ["delta"], "temperature": ["temperature"]}[loss.option]
    assert list(inspect.signature(loss.function).parameters) == ["student", "teacher", *options]

    student_NV, teacher_NV, ids_NK = random_sides(6, 20, 5)
    student, teacher, bound = top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK), loss_of(name, DELTA, TEMPERATURE)
    value_N = bound(student, teacher)
    assert torch.equal(value_N, loss_of(name)(student, teacher)) == (loss.option is None)

    bare = TopK(student.logits_NK), TopK(teacher.logits_NK)
    if loss.needs_logsumexp:
        for sides in ((bare[0], teacher), (student, bare[1])):
            with pytest.raises(ValueError, match="log-sum-exp"):
                bound(*sides)
    else:
        assert torch.equal(bound(*bare), value_N)

    offset_N1 = torch.linspace(1, 40, 6, dtype=torch.float64)[:, None]
    moved_N = bound(top_of(student_NV + offset_N1, ids_NK), teacher)
    assert torch.allclose(moved_N, value_N) == loss.offset_free
    same_N = bound(top_of(teacher_NV + offset_N1, ids_NK), teacher)
    assert (same_N.abs().max().item() < 1e-12) == loss.offset_free


@pytest.mark.parametrize(("name", "loss"), LOSSES.items())
def test_loss_of_binds_its_own_option_and_one_where_there_is_none(name, loss):
    student_NV, teacher_NV, ids_NK = random_sides(6, 20, 5)
    sides = top_of(student_NV, ids_NK), top_of(teacher_NV, ids_NK)
    options = {None: [], "huber_delta": [DELTA], "temperature": [TEMPERATURE]}[loss.option]
    assert torch.equal(loss_of(name, DELTA, TEMPERATURE)(*sides), loss.function(*sides, *options))
    assert torch.equal(loss_of(name, None, None)(*sides), loss.function(*sides, *[1.0 for _ in options]))


def test_position_weights_by_hand():
    subset_N, index_N = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 0, 3, 1])
    weights_N = position_weights(subset_N, index_N, [2.0, 0.5, 3.0], decay=0.5)
    assert weights_N.dtype == torch.float32
    assert weights_N.tolist() == [2.0, 1.0, 0.5, 0.5, 0.0625, 1.5]


def test_position_weights_without_decay_and_of_the_first_position_only():
    subset_N, index_N = torch.tensor([0, 0, 1]), torch.tensor([0, 7, 0])
    assert position_weights(subset_N, index_N, [3.0, 1.0, 1.0], decay=1.0).tolist() == [3.0, 3.0, 1.0]
    assert position_weights(subset_N, index_N, [3.0, 1.0, 1.0], decay=0.0).tolist() == [3.0, 0.0, 1.0]
