"""What holds on a CPU holds on a GPU: the head's numbers and gradients, and a training's losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from student_jobs import ONE, job, noting
from torch.nn.functional import linear

from duet.cache.reader import Rank
from duet.stages.student.gather import gathered_logits, logsumexp
from duet.stages.student.ranks import Processes
from duet.stages.student.train import train_student

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gathered_head_is_the_whole_one(dtype, tolerance):
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(40, 32).to("cuda", dtype), (torch.randn(900, 32) / 6).to("cuda", dtype)
    ids_NK = torch.randint(900, (40, 7), device="cuda")
    found = []
    for gathered in (True, False):
        hidden, weight = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        if gathered:
            parts = [(hidden, weight)]
            logits_NK = gathered_logits(parts, ids_NK)
            sums_N = logsumexp(parts, lambda logits: logits, ids_NK, logits_NK)
        else:
            logits_NV = linear(hidden.float(), weight.float())
            logits_NK, sums_N = logits_NV.gather(1, ids_NK), logits_NV.logsumexp(-1)
        (logits_NK.square().sum() + sums_N.sum()).backward()
        found.append([logits_NK, sums_N, hidden.grad, weight.grad])
    for ours, whole in zip(*found, strict=True):
        assert (ours.float() - whole.float()).abs().max() <= tolerance * whole.float().abs().max()


def test_a_training_has_the_losses_of_one_on_a_cpu(tmp_path: Path, store):
    curves = []
    for processes in (ONE, Processes(Rank(), torch.device("cuda"))):
        losses: list[float] = []
        a_job = job(tmp_path / processes.device.type, dtype="float32", loss="huber_raw")
        train_student(a_job, {"teacher": store[0]}, store[1], processes, noting(losses))
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
