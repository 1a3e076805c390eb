"""What scripts/documents_packed.py compares: the same tokens and positions in each way to read a step's documents."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from support import LAB_VOCAB_SIZE, ROOT
from tiny_models import tiny_config, tiny_model

from duet.stages.student.head import logits_at

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18, 19]]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("documents_packed", ROOT / "scripts/documents_packed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_way_reads_more_than_the_others_but_padding(script):
    apart, [together] = script.passes_of(ROWS, 0.05), script.passes_of(ROWS, 1)
    tokens = sum(len(row) - 1 for row in ROWS)
    assert script.share_of_padding(apart) <= 0.05 < script.share_of_padding([together])
    for batches in (apart, [together], [script.packed(ROWS)]):
        assert sum(len(batch.position_N) for batch in batches) == tokens
    even = script.even(ROWS)
    assert even.attention_mask_BT.all()
    assert tokens <= len(even.position_N) < tokens + len(ROWS)


def test_packed_documents_do_not_see_each_other(script):
    """Each has the logits that it has alone: of positions, a rotary model takes differences alone."""
    model = tiny_model(tiny_config("llama", LAB_VOCAB_SIZE))
    with torch.no_grad():
        own = torch.cat([logits_at(model, batch) for row in ROWS for batch in script.passes_of([row], 0)])
        found = logits_at(model, script.packed(ROWS))
    assert torch.allclose(found, own, atol=1e-4)
    assert script.packed(ROWS).input_ids_BT.tolist() == [[i for row in ROWS for i in row[:-1]]]
