"""What is asked of a student from the store alone: agreement with the teacher's first token, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import LAB_VOCAB_SIZE, make_rows

from duet.cache.codec import Layout, encode
from duet.stages.settings.student import ProbeSettings, TrainSettings
from duet.stages.student.passes import passes_of
from duet.stages.student.probe import Probe, ask, refusal_ids
from duet.stages.student.targets import Targets, Teachers, mixed


def rows_with_first_ids(forget: list[int], retain: list[int]) -> Targets:
    """Rows of two positions each whose teacher begins with these tokens."""
    rows = make_rows(range(len(forget) + len(retain)), 2, top_k=2, vocab_size=LAB_VOCAB_SIZE, forget=len(forget))
    for row, first in enumerate([*forget, *retain]):
        rows.topk_ids_NK[2 * row] = [first, 600]
    return mixed([encode(rows, Layout(2, LAB_VOCAB_SIZE), "lossless")[0]], [1.0])


def test_refusal_tokens_are_those_of_forget_rows_more_than_of_retain_rows():
    # 7 begins nearly all forget rows; 8 a fifth of either; 9 only retain rows; 5 one forget row of twenty
    forget, retain = [7] * 15 + [8] * 4 + [5], [9] * 8 + [8] * 2
    assert refusal_ids(rows_with_first_ids(forget, retain)) == [7]
    assert refusal_ids(rows_with_first_ids([7, 7], [])) == [7]
    assert refusal_ids(rows_with_first_ids([], [9])) == []


def test_answers_are_counted_at_first_positions_by_subset():
    rows = rows_with_first_ids([7, 7, 5], [9, 4])
    settings = TrainSettings(forget_weight=2.0)
    probe = Probe(passes_of(rows, settings, 0), torch.tensor([7]), 5, held_out=True)

    def answer(one):
        """Says the teacher's token where that is 7 or 9, else 7; wrong at all later positions. Loss 1 on forget rows."""
        teacher_N = one.topk_ids_NK[:, 0]
        said_N = torch.where(torch.isin(teacher_N, torch.tensor([7, 9])), teacher_N, 7)
        return one.is_forget_N.float(), torch.where(one.is_first_N, said_N, -1)

    found = ask(probe, answer, torch.device("cpu"))
    assert found == {
        "rows": 5, "held_out": True, "loss": pytest.approx(2 * 6 / (2 * 6 + 4)),
        "agreement.forget": pytest.approx(2 / 3), "agreement.retain": 0.5,
        "refusal.forget": 1.0, "refusal.retain": 0.5,
    }  # fmt: skip


def test_held_out_rows_are_asked_where_there_are_any_and_never_trained_on(store):
    kept = TrainSettings(probe=ProbeSettings(steps=1, holdout=0.25, rows=2))
    order = store[0].order(0, None, 0.25)
    teachers = Teachers.of({"teacher": store[0]}, kept)
    probe = Probe.of(teachers, order, kept, 0)
    assert probe.held_out
    assert probe.num_rows == 4  # two of each subset
    asked = {tuple(ids[mask > 0].tolist()) for one in probe.passes
             for ids, mask in zip(one.batch.input_ids_BT, one.batch.attention_mask_BT, strict=True)}  # fmt: skip
    trained = set()
    for cursor, block in store[0].batches(order, 5):
        if cursor.epoch > 1:
            break
        for one in passes_of(mixed([block], [1.0]), kept, 0):
            rows = zip(one.batch.input_ids_BT, one.batch.attention_mask_BT, strict=True)
            trained |= {tuple(ids[mask > 0].tolist()) for ids, mask in rows}
    assert len(trained) == 20 - len(order.held_out)
    assert not asked & trained
    without = Probe.of(teachers, store[0].order(0), TrainSettings(), 0)
    assert (without.held_out, without.num_rows) == (False, 20)
    assert np.isin(without.refusal_ids.numpy(), np.arange(LAB_VOCAB_SIZE)).all()
