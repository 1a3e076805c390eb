"""Losses against hand-computed values, their dense form at k = V, and float64 gradients."""

from __future__ import annotations

import pytest
import torch

from stages.losses import LOSSES, huber_centred, huber_raw


def test_huber_raw_by_hand():
    # differences 0.5 (square: 0.125) and 3 (linear: 1 * (3 - 0.5) = 2.5) and 0
    student, teacher = torch.tensor([[0.5, 3.0, 7.0]]), torch.tensor([[0.0, 0.0, 7.0]])
    assert huber_raw(student, teacher, 1.0).item() == pytest.approx(2.625)
    # delta 2: 0.125 and 2 * (3 - 1) = 4
    assert huber_raw(student, teacher, 2.0).item() == pytest.approx(4.125)


def test_huber_centred_ignores_an_offset_and_raw_does_not():
    teacher = torch.randn(5, 8)
    assert torch.allclose(huber_centred(teacher + 3, teacher, 1.0), torch.zeros(5), atol=1e-5)
    assert (huber_raw(teacher + 3, teacher, 1.0) > 1).all()


@pytest.mark.parametrize("name", LOSSES)
def test_k_equal_to_v_is_the_dense_loss_whatever_the_order_of_ids(name):
    student_NV, teacher_NV = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    top = teacher_NV.topk(9, dim=-1)
    gathered = LOSSES[name](student_NV.gather(1, top.indices), top.values, 0.7)
    assert torch.allclose(gathered, LOSSES[name](student_NV, teacher_NV, 0.7))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher, 0.9), (student,))
