"""Other unlearning methods, trained like a student: the same batches of the same queries, optimizer, schedule and export.

`baseline_methods.py` says what each does in a step. DUET's student reads a store, these read the data's answers. Rows and
their order are those of the student (`store_order`), so that a step of either sees the same queries; methods that use no
retain data leave those rows out. A run can be stopped after any step and goes on bit for bit on a CPU.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet.cache.errors import Interrupted
from duet.cache.files import sha256_json
from duet.cache.order import Cursor, Order
from duet.cache.reader import Rank
from duet.stages.compare.methods import Batch, Method, Models, QuestionAnswer, loss_of, train_only_rmus_layers
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer, pad_id_of
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.student import CHECKPOINTS_NAME, TrainSettings
from duet.stages.student import checkpoint
from duet.stages.student.checkpoint import TrainingState
from duet.stages.student.export import export
from duet.stages.student.loop import lr_factor, seed_everything
from duet.stages.student.model import autocast, forward_dtype_of, load_trainable, optimizer_of, trained
from duet.stages.student.ranks import Processes


def row_of(renderer: Renderer, query: Query, answer: str | None = None) -> QuestionAnswer:
    """A question with its answer, or with another one, as token ids, without any prefix, as a student sees it."""
    asked = Prompt.plain(query)
    return QuestionAnswer(
        renderer.prompt(asked), renderer.answer(asked, query.answer or "" if answer is None else answer).ids
    )


@dataclass(frozen=True)
class TrainingRows:
    """The queries of a run as token ids: what a step's rows are drawn from. Numbers are the store's: forget, then retain."""

    forget: list[QuestionAnswer]
    retain: list[QuestionAnswer]
    refusals: list[list[QuestionAnswer]]  # each forget question with each refusal

    def batch(self, numbers: np.ndarray, seed: int, step: int) -> Batch:
        """The rows of these numbers; each forget question's refusal is a function of seed, step and number."""
        forget = [int(number) for number in numbers if number < len(self.forget)]
        count = len(self.refusals[0]) if self.refusals else 0
        drawn = [int(np.random.default_rng([seed, step, number]).integers(count)) for number in forget]
        return Batch(
            forget=[self.forget[number] for number in forget],
            refused=[self.refusals[number][at] for number, at in zip(forget, drawn, strict=True)],
            retain=[self.retain[number - len(self.forget)] for number in numbers if number >= len(self.forget)],
        )

    def sha256(self) -> str:
        """Hash of all rows and refusals."""
        rows = [[list(row.prompt_ids), list(row.answer_ids)] for row in (*self.forget, *self.retain)]
        refusals = [[list(row.answer_ids) for row in of_question] for of_question in self.refusals]
        return sha256_json([len(self.forget), rows, refusals])


@dataclass(frozen=True)
class Steps:
    """Which rows come in which step, from 0 to `total`-1."""

    total: int
    numbers: Callable[[int], np.ndarray]


def store_order(order: Order, settings: TrainSettings) -> Steps:
    """The steps of a student that is trained on a store in this order: the same rows in each."""
    per_epoch = math.ceil(order.num_slots / settings.batch_size)

    def numbers(step: int) -> np.ndarray:
        epoch, at = divmod(step, per_epoch)
        places = order.draw(Cursor(epoch, at * settings.batch_size), settings.batch_size)
        rows = [np.concatenate([np.arange(*block) for block in order.ranges(window)])[at] for window, at in places]
        return np.concatenate(rows)

    return Steps(settings.epochs * per_epoch, numbers)


def shuffled_order(num_rows: int, settings: TrainSettings) -> Steps:
    """Every row once in each epoch, in an order drawn from the seed and the epoch."""
    per_epoch = math.ceil(num_rows / settings.batch_size)

    def numbers(step: int) -> np.ndarray:
        epoch, at = divmod(step, per_epoch)
        drawn = np.random.default_rng([settings.seed, epoch]).permutation(num_rows)
        return drawn[at * settings.batch_size : (at + 1) * settings.batch_size]

    return Steps(settings.epochs * per_epoch, numbers)


@dataclass(frozen=True)
class BaselineJob:
    """One training: a method with its constant, from one model, on these lessons."""

    name: str  # what errors and the model card call it
    method: Method
    constant: float  # of the method; 0 where it has none
    model_dir: Path
    start_name: str  # what that is called in what we write
    folder: Path  # gets model/
    settings: TrainSettings
    lessons: TrainingRows
    steps: Steps
    seed: int  # of drawn refusals and of RMU's direction
    device: torch.device
    trust_remote_code: bool = False


def train_baseline(
    job: BaselineJob, on_step: Callable[[int, int, float], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train from the newest checkpoint or the start, and export `model/`; returns steps, seconds and the curve.

    A loss or gradient that is not finite ends the training with the weights before that step (`diverged_at`): what a method
    does at a learning rate is a result, not an error. Raises Interrupted, after a checkpoint, when `should_stop()` is true.
    """
    settings, device, total = job.settings, job.device, job.steps.total
    dtype = forward_dtype_of(settings, device)
    model = load_trainable(
        job.model_dir, job.start_name, settings, dtype, job.trust_remote_code, uniform=dtype == torch.float32
    ).to(device)
    if job.method.layers_only:
        train_only_rmus_layers(model)
    reference = None
    if job.method.reference:
        reference = load_model(job.model_dir, "auto", job.trust_remote_code).to(device, dtype).requires_grad_(False)
    tokenizer = load_tokenizer(job.model_dir, job.trust_remote_code)
    models = Models(
        model, reference, pad_id_of(tokenizer, model.get_input_embeddings().weight.shape[0]), device, job.seed
    )
    optimizer = optimizer_of(list(trained(model).values()), settings)
    checkpoints, alone = job.folder / CHECKPOINTS_NAME, Processes(Rank(), device)
    progress = checkpoint.load_newest(checkpoints, model, optimizer) or TrainingState()
    curve: list[list[float]] = []
    diverged_at = None
    while progress.step < total and diverged_at is None:
        started, step = time.perf_counter(), progress.step
        batch = job.lessons.batch(job.steps.numbers(step), job.seed, step)
        with autocast(settings, device):
            seed_everything(settings.seed, step, 0)
            loss = loss_of(job.method, models, batch, job.constant)
        if loss is not None and not _stepped(model, optimizer, loss, settings, lr_at(step, total, settings)):
            diverged_at = step + 1
        value = math.nan if loss is None else loss.item()
        progress = replace(progress, step=step + 1, train_s=progress.train_s + time.perf_counter() - started)
        if math.isfinite(value):
            curve.append([step + 1, value])
        on_step(step + 1, total, value)
        stop = should_stop() and progress.step < total
        if stop or progress.step % settings.checkpoint_steps == 0:
            checkpoint.save(checkpoints, model, optimizer, progress, alone, settings.keep_last)
        if stop:
            raise Interrupted(f"{job.name}: step {progress.step} of {total} is saved in {job.folder}")
    steps = progress.step - (diverged_at is not None)
    stored = getattr(model.config, "dtype", None) or torch.float32
    export_dtype = stored if settings.export_dtype == "auto" else getattr(torch, settings.export_dtype)
    export(model, tokenizer, job.folder, export_dtype, settings.lora, _card(job, steps))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {"steps": steps, "train_s": progress.train_s, "diverged_at": diverged_at, "curve": curve}


def lr_at(step: int, total: int, settings: TrainSettings) -> float:
    return settings.lr * lr_factor(step, total, settings.warmup, settings.decay)


def _stepped(
    model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor, settings: TrainSettings, lr: float
) -> bool:
    """One optimizer step; False, and none is made, where loss or gradient is not finite."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained(model).values(), settings.max_grad_norm)
    fine = bool(torch.isfinite(loss) & torch.isfinite(norm))
    if fine:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return fine


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [unlearning]
---

# {name}

Trained by Duet for a comparison of unlearning methods: {title} (arXiv {paper}), from {start_name}, {steps} steps of
{batch_size} rows, peak learning rate {lr:g}. What was asked of it is suppressed under the tests that it was given, at most.
"""


def _card(job: BaselineJob, steps: int) -> str:
    return CARD.format(
        name=job.name,
        title=job.method.title,
        paper=job.method.paper,
        start_name=job.start_name,
        steps=steps,
        batch_size=job.settings.batch_size,
        lr=job.settings.lr,
    )
