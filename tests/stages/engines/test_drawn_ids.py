"""Ids that are drawn: the estimate that they make has the full KL's gradient as its expectation."""

from __future__ import annotations

import numpy as np
import torch

from duet.stages.engines.topk import drawn_ids, order_ties
from duet.stages.student.losses import TopK, forward_kl_sampled, forward_kl_topk


def test_the_expectation_is_the_gradient_of_the_full_kl():
    """10^5 draws, in float64: within five standard errors at every id, where the same number of likeliest ids is far off."""
    rows, k, width = 20_000, 6, 12
    generator = torch.Generator().manual_seed(0)
    teacher_V, student_V = 1.5 * torch.randn(2, width, generator=generator, dtype=torch.float64)
    teacher_NV = teacher_V.expand(rows, -1)
    ids_NK, _, draws_NK = drawn_ids(teacher_NV, k, width, list(range(rows)), [0] * rows)
    assert draws_NK.sum() == rows * (k - 1) == 10**5

    def gradients(ids_NK: torch.Tensor, share_NK: torch.Tensor | None) -> torch.Tensor:
        student_NV = student_V.repeat(len(ids_NK), 1).requires_grad_()
        ids = ids_NK.long()
        student = TopK(student_NV.gather(1, ids), student_NV.logsumexp(-1))
        teacher_rows = teacher_NV[: len(ids)]
        teacher = TopK(teacher_rows.gather(1, ids), teacher_rows.logsumexp(-1), share_NK=share_NK)
        loss_N = forward_kl_topk(student, teacher, 1.0) if share_NK is None else forward_kl_sampled(student, teacher)
        losses.append(loss_N.detach())
        return torch.autograd.grad(loss_N.sum(), student_NV)[0]

    losses: list[torch.Tensor] = []
    found_NV = gradients(ids_NK, draws_NK.double() / (k - 1))
    error_V = found_NV.std(0) / rows**0.5
    full_V = student_V.softmax(-1) - teacher_V.softmax(-1)
    assert ((found_NV.mean(0) - full_V).abs() <= 5 * error_V).all()
    p, q = teacher_V.log_softmax(-1), student_V.log_softmax(-1)
    full = (p.exp() * (p - q)).sum()
    assert abs(losses[0].mean() - full) <= 5 * losses[0].std() / rows**0.5
    likeliest_V = gradients(teacher_V.topk(k).indices[None], None)[0]
    assert ((likeliest_V - full_V).abs() > 50 * error_V).any()


def test_slots_hold_the_drawn_ids_and_the_likeliest_of_the_others():
    logits_NV = torch.randn(70, 300, generator=torch.Generator().manual_seed(1)).mul(3)
    ids, values, draws = (found.numpy() for found in drawn_ids(logits_NV, 9, 256, list(range(70)), [2] * 70))
    assert (draws.sum(1) == 8).all()
    assert ids.max() < 256, "head padding was drawn"
    assert np.array_equal(values, np.take_along_axis(logits_NV.numpy(), ids.astype(int), 1))
    assert (np.diff(values, axis=1) <= 0).all()
    for row, kept, drawn in zip(logits_NV[:, :256].numpy(), ids, draws, strict=True):
        assert len(set(kept)) == 9
        assert kept[0] == row.argmax()
        others = [i for i in np.argsort(-row) if i not in kept[drawn > 0]]
        assert set(kept[drawn == 0]) == set(others[: (drawn == 0).sum()])
    assert len({tuple(row) for row in ids}) > 60, "seeds change nothing"


def test_a_draw_depends_on_its_own_row_alone():
    logits_NV = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    together = drawn_ids(logits_NV, 5, 64, list(range(40)), [3] * 40)
    alone = drawn_ids(logits_NV[37:38], 5, 64, [37], [3])
    later = drawn_ids(logits_NV[37:38], 5, 64, [37], [4])
    assert all(torch.equal(a[37:38], b) for a, b in zip(together, alone, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone, later, strict=True))


def test_every_id_has_its_slot_where_there_are_as_many():
    logits_NV = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    ids, _, draws = drawn_ids(logits_NV, 7, 7, [0, 1, 2], [0, 0, 0])
    assert [sorted(row) for row in ids.tolist()] == [list(range(7))] * 3
    assert draws.sum(1).tolist() == [6, 6, 6]


def test_numbers_of_draws_follow_their_ids_where_ties_are_ordered():
    ids, draws = np.array([[5, 3, 9]], np.int32), np.array([[1, 0, 1]], np.int32)
    order_ties(ids, np.array([[2.0, 2.0, 1.0]], np.float32), draws)
    assert (ids.tolist(), draws.tolist()) == ([[3, 5, 9]], [[0, 1, 1]])
