"""The baselines where the forward pass is in bfloat16, as on a GPU: weights in training are float32 all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import LAB_SMALL, ROOT

from duet.stages.compare.methods import METHODS
from duet.stages.compare.rows import TrainingRows, row_of, shuffled_order
from duet.stages.compare.train import BaselineJob, _models, gradient_of
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.questions.prompts import Renderer
from duet.stages.questions.queries import load_queries
from duet.stages.settings.data import DataSettings, PromptSettings
from duet.stages.settings.student import TrainSettings
from duet.stages.student.model import autocast

CPU = torch.device("cpu")


def job_of(method: str, dtype: str) -> BaselineJob:
    renderer = Renderer(load_tokenizer(LAB_SMALL), PromptSettings())
    forget, retain = (
        [row_of(renderer, query) for query in load_queries(DataSettings(path=str(ROOT / f"lab/data/{s}.jsonl")), s)[:4]]
        for s in ("forget", "retain")
    )
    rows, settings = TrainingRows(forget, retain, []), TrainSettings(batch_size=4, dtype=dtype)
    steps = shuffled_order(8, settings)
    return BaselineJob(method, METHODS[method], 0.0, LAB_SMALL, "small", Path("unused"), settings, rows, steps, 0, CPU)


def test_sam_reads_the_moved_weights_as_in_float32():
    """Autocast keeps rounded copies of weights: those from before the move must not be read behind it."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        job = replace(job_of("npo_sam", dtype), constant=1.0)
        models = _models(job, load_tokenizer(LAB_SMALL))
        with autocast(job.settings, CPU):
            loss = gradient_of(job, models, job.rows.batch(np.arange(8), 0, 0))
        assert loss is not None
        found[dtype] = loss.item()
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)


def test_the_frozen_model_keeps_the_angles_of_positions_that_the_one_in_training_has():
    models = _models(job_of("npo", "bfloat16"), load_tokenizer(LAB_SMALL))
    frozen = dict(models._reference.named_buffers())
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in models.model.named_buffers())
    assert {weight.dtype for weight in models._reference.parameters()} == {torch.bfloat16}
