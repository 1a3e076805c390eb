"""Cross-entropy on given answers beside the loss: its value, whose rows have it, and where it makes no sense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from student_jobs import ONE, job

from duet.cache.errors import UserError
from duet.cache.record import prompt_and_response
from duet.stages.models.loading import load_model
from duet.stages.settings.student import TrainSettings, deciding_settings
from duet.stages.student.checks import check_settings
from duet.stages.student.model import Student
from duet.stages.student.passes import RETAIN, passes_of
from duet.stages.student.targets import Targets, mixed


def losses(rows: Targets, loss: str, **settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the loss, the subset, the response's token) at every position, in the order of the passes."""
    student = Student.of(job(Path("unused"), **settings), loss, pad_id=0, processes=ONE)
    passes = passes_of(rows, student.settings, student.pad_id)
    with_ids = passes_of(rows, TrainSettings(answer_weight=1, batch_size=8), 0)
    ids = torch.cat([one.answer_id_N for one in with_ids if one.answer_id_N is not None])
    return torch.cat([student.answer(one)[0] for one in passes]), torch.cat([one.subset_N for one in passes]), ids


@pytest.mark.parametrize("loss", ["huber_raw", "forward_kl_tail"])
def test_retain_rows_have_the_cross_entropy_of_their_answers_and_no_others_do(store, loss):
    rows = mixed([store[0].block_of(np.arange(20))], [1.0])
    plain_N, subset_N, _ = losses(rows, loss, max_padding=1.0)
    mixed_N, _, ids_N = losses(rows, loss, max_padding=1.0, answer_weight=0.5)
    model, expected = load_model(job(Path("unused")).model_dir, "float32"), {}
    for row in range(20):
        prompt, response = prompt_and_response(rows, row)
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt.tolist(), *response.tolist()]])).logits[0, len(prompt) - 1 : -1]
        for token, logp_V in zip(response.tolist(), logits_TV.log_softmax(-1), strict=True):
            expected.setdefault(int(rows.subsets[row]), []).append(-float(logp_V[token]))
    added_N = mixed_N - plain_N
    assert torch.equal(added_N != 0, subset_N == RETAIN)
    assert sorted(added_N[subset_N == RETAIN].tolist()) == pytest.approx(
        sorted(np.array(expected[RETAIN]) / 2), abs=1e-3
    )
    assert len(ids_N) == len(added_N)


def test_what_it_needs_and_what_it_forbids(store):
    made = store[0].manifest
    given = replace(made, provenance=made.provenance | {"responses": "given"})
    settings = TrainSettings(answer_weight=0.5)
    check_settings(settings, "huber_raw", [given], None, None)
    with pytest.raises(UserError, match="answer_weight needs given answers"):
        check_settings(settings, "huber_raw", [made], None, None)
    with pytest.raises(UserError, match="answer_weight does nothing: the store has no retain rows"):
        check_settings(settings, "huber_raw", [replace(given, subsets={"forget": 20, "retain": 0})], None, None)
    probe = {"steps": 1, "holdout": 0.1, "stop_within": 0.1}
    with pytest.raises(ValidationError, match="answer_weight adds to it"):
        TrainSettings(answer_weight=0.5, loss="forward_kl_tail", probe=probe)


def test_a_student_of_before_is_found_again():
    assert "answer_weight" not in deciding_settings(TrainSettings())
