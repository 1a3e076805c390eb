"""The passes of a batch: every position beside its teacher's row, whatever is padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import LAB_SMALL, LAB_VOCAB_SIZE, make_rows

from duet.cache.codec import Block, Layout, encode
from duet.stages.models.loading import load_model
from duet.stages.settings.student import TrainSettings
from duet.stages.student.passes import passes_of
from duet.stages.student.targets import Targets, mixed


def block(count: int, positions: int | None = None) -> Block:
    rows = make_rows(range(count), positions, top_k=5, vocab_size=LAB_VOCAB_SIZE)
    return encode(rows, Layout(5, LAB_VOCAB_SIZE), "lossless")[0]


def targets(count: int, positions: int | None = None) -> Targets:
    return mixed([block(count, positions)], [1.0])


def test_each_position_stands_beside_its_teachers_row():
    rows = block(9)
    decoded = rows.decoded()
    settings = TrainSettings(forget_weight=3.0, retain_weight=0.5, position_decay=0.5, top_k=3)
    passes = passes_of(mixed([rows], [1.0]), settings, pad_id=0)
    assert len(passes) > 1
    seen = 0
    for one in passes:
        for n in range(len(one.weight_N)):
            b, t = int(one.batch.batch_index_N[n]), int(one.batch.position_N[n])
            [found] = np.flatnonzero((decoded.topk_ids_NK[:, :3] == one.topk_ids_NK[n].numpy()).all(1) &
                                     (decoded.topk_logits_NK[:, :3] == one.teacher.logits_NK[n].numpy()).all(1))  # fmt: skip
            row = int(np.searchsorted(decoded.position_offsets, found, side="right")) - 1
            index = int(found - decoded.position_offsets[row])
            tokens = decoded.tokens_S[decoded.token_offsets[row] : decoded.token_offsets[row + 1]]
            length = int(one.batch.attention_mask_BT[b].sum())
            assert one.batch.input_ids_BT[b, :length].tolist() == tokens[:-1].tolist()
            num_positions = decoded.position_offsets[row + 1] - decoded.position_offsets[row]
            assert t == len(tokens) - num_positions - 1 + index
            assert one.subset_N[n].item() == decoded.subsets[row]
            assert bool(one.is_first_N[n]) == (index == 0)
            assert one.weight_N[n].item() == (3.0 if decoded.subsets[row] == 0 else 0.5) * 0.5**index
            seen += 1
    assert seen == rows.num_positions
    assert passes_of(mixed([rows[:0]], [1.0]), settings, 0) == []
    assert sum(one.num_tokens for one in passes) == len(rows.tokens_S) - len(rows)


@pytest.mark.parametrize("cut", [{"max_padding": 0.0}, {"pass_tokens": 1}, {"max_padding": 1.0}])
def test_how_a_batch_is_cut_does_not_change_the_gradient(cut):
    model, gradients = load_model(LAB_SMALL, "float32"), []
    for settings in (TrainSettings(), TrainSettings(**cut)):
        model.zero_grad()
        for one in passes_of(targets(7), settings, pad_id=0):
            out = model(input_ids=one.batch.input_ids_BT, attention_mask=one.batch.attention_mask_BT).logits
            rows_NV = out[one.batch.batch_index_N, one.batch.position_N]
            (rows_NV.gather(1, one.topk_ids_NK) - one.teacher.logits_NK).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())
