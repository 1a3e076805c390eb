"""What scripts/which_ids.py measures: the full divergence of a student from the teacher at each row's first position."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import LAB_SMALL, LAB_VOCAB_SIZE, ROOT, make_plan, make_rows, write_store

from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.cache.record import prompt_and_response
from duet.stages.models.loading import load_model


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("which_ids", ROOT / "scripts/which_ids.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_divergences_are_zero_from_the_same_model_and_the_plain_kl_from_another(tmp_path, script):
    rows = make_rows(range(3), positions=2, top_k=LAB_VOCAB_SIZE, vocab_size=LAB_VOCAB_SIZE)
    model, noise = load_model(LAB_SMALL, "float32"), np.random.default_rng(0).normal(size=(3, LAB_VOCAB_SIZE))
    own = []
    for row in range(3):
        with torch.no_grad():
            prompt = torch.from_numpy(prompt_and_response(rows, row)[0].astype(np.int64))
            own.append(model(prompt[None]).logits[0, -1, :LAB_VOCAB_SIZE].double().numpy())
    for name, teacher in (("same", np.array(own)), ("other", np.array(own) + noise)):
        ids, logits = rows.topk_ids_NK.copy(), rows.topk_logits_NK.copy()
        for row in range(3):
            ids[2 * row] = np.argsort(-teacher[row])
            logits[2 * row] = teacher[row][ids[2 * row]]
        sums = np.log(np.exp(logits.astype(np.float64)).sum(1)).astype(np.float32)
        plan = make_plan(3, top_k=LAB_VOCAB_SIZE, vocab_size=LAB_VOCAB_SIZE)
        write_store(tmp_path / name, plan, replace(rows, topk_ids_NK=ids, topk_logits_NK=logits, logsumexp_N=sums))
        found = list(script.divergences(Store(Folder(tmp_path / name)), LAB_SMALL))
        logp, logq = (torch.from_numpy(side).log_softmax(-1) for side in (teacher, np.array(own)))
        assert found == pytest.approx((logp.exp() * (logp - logq)).sum(1).tolist(), abs=1e-5)
        assert (max(found) < 1e-5) == (name == "same")
