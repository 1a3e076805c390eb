"""Small trainings, and a store of twenty rows for them, which no teacher wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import LAB_SMALL, LAB_VOCAB_SIZE, make_plan, make_rows, write_store

from duet.cache.errors import Interrupted
from duet.cache.location import Folder
from duet.cache.reader import Rank, Store
from duet.cache.watch import Watch
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.settings.student import TrainSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.ranks import Processes
from duet.stages.student.train import open_store, train_student

TINY = {
    "vocab_size": LAB_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


ONE = Processes(Rank(), torch.device("cpu"))


def job(student_dir: Path, model_dir: Path = LAB_SMALL, **train) -> StudentJob:
    settings = TrainSettings(**{"epochs": 3, "batch_size": 8, "lr": 1e-3, "checkpoint_steps": 3, **train})
    return StudentJob("s", model_dir, "small", student_dir, settings)


def train(a_job: StudentJob, store, stop_after: int | None = None) -> list[float]:
    losses: list[float] = []
    train_student(a_job, {"teacher": store[0]}, store[1], ONE, noting(losses, stop_after))
    return losses


def assert_resumes_exactly(make: Callable[[Path], StudentJob], tmp_path: Path, store) -> list[float]:
    """Cut after the first and after the fourth step and resumed, the losses and weights are the unbroken training's.

    Returns those losses.
    """
    whole = train(make(tmp_path / "whole"), store)
    for cut in (1, 4):
        broken = make(tmp_path / f"cut-{cut}")
        with pytest.raises(Interrupted):
            train(broken, store, stop_after=cut)
        assert train(broken, store) == whole[cut:]
        a, b = (load_file(tmp_path / d / "model/model.safetensors") for d in ("whole", f"cut-{cut}"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    return whole


def noting(losses: list[float], stop_after: int | None = None) -> Watch:
    """Note the loss of every step, and stop after `stop_after` steps."""
    return Watch(
        on_progress=lambda report: losses.append(report.loss),
        should_stop=lambda: stop_after is not None and len(losses) >= stop_after,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[Store, object]:
    location = Folder(tmp_path_factory.mktemp("store") / "s")
    tokenizer = load_tokenizer(LAB_SMALL)
    plan = make_plan(
        20, 10, shard_rows=6, top_k=5, vocab_size=LAB_VOCAB_SIZE,
        provenance={
            "tokenizer_sha256": tokenizer_sha256(tokenizer), "weights_sha256": "0" * 64, "engine": "none", "dtype": "float32",
        },
    )  # fmt: skip
    rows = make_rows(range(20), positions=3, top_k=5, vocab_size=LAB_VOCAB_SIZE, forget=10)
    write_store(location, plan, rows, tokenizer_files(tokenizer))
    return open_store(location, verify=True)
