"""What is asked of a student from the store alone: agreement with the teacher's first token, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import LAB_VOCAB_SIZE, make_plan, make_rows, with_broad, write_store

from duet.cache.codec import Layout, encode
from duet.cache.location import Folder
from duet.cache.reader import Store
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
        return (one.subset_N == 0).float(), torch.where(one.is_first_N, said_N, -1)

    found = ask(probe, answer, torch.device("cpu"))
    assert found == {
        "rows": 5, "held_out": True, "loss": pytest.approx(2 * 6 / (2 * 6 + 4)),
        "agreement.forget": pytest.approx(2 / 3), "agreement.retain": 0.5,
        "refusal.forget": 1.0, "refusal.retain": 0.5,
    }  # fmt: skip


def test_broad_rows_are_probed_by_themselves(tmp_path):
    """Also in what tells a refusal: the teacher may refuse broad queries too."""
    plan = make_plan(12, 4, top_k=2, vocab_size=LAB_VOCAB_SIZE)
    rows = make_rows(range(12), 2, top_k=2, vocab_size=LAB_VOCAB_SIZE, forget=4)
    for row in range(12):
        rows.topk_ids_NK[2 * row] = [9 if 4 <= row < 7 else 7, 600]
    write_store(tmp_path / "s", *with_broad(plan, rows, 5))
    settings = TrainSettings(probe=ProbeSettings(steps=1, rows=2))
    teachers = Teachers.of({"teacher": Store(Folder(tmp_path / "s"))}, settings)
    probe = Probe.of(teachers, teachers.order(settings), settings, 0)
    assert (probe.num_rows, probe.refusal_ids.tolist()) == (6, [7])
    assert {number: sum((one.subset_N[one.is_first_N] == number).sum().item() for one in probe.passes)
            for number in range(3)} == {0: 2, 1: 2, 2: 2}  # fmt: skip
    found = ask(probe, lambda one: (one.weight_N, torch.where(one.subset_N == 2, 7, 9)), torch.device("cpu"))
    assert {key: value for key, value in found.items() if "." in key} == {
        "agreement.forget": 0.0, "agreement.retain": 1.0, "agreement.broad": 1.0,
        "refusal.forget": 0.0, "refusal.retain": 0.0, "refusal.broad": 1.0,
    }  # fmt: skip
    held = TrainSettings(probe=ProbeSettings(steps=1, holdout=0.2))
    assert Probe.of(teachers, teachers.order(held), held, 0).num_rows == 3  # one of each subset


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
