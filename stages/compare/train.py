"""Other unlearning methods, trained like a student: the same batches of the same queries, optimizer, schedule and export.

`methods.py` holds each method's loss. DUET's student reads a store, these read the data's answers. Rows and their order are
those of the student (`store_order`), so that a step of either sees the same queries; methods that use no retain data leave
those rows out, and all of them broad rows. A training can be stopped after any step and goes on bit for bit on a CPU.

The loop is not that of `duet.stages.student.loop`: it does not prefetch, cut passes, probe or share its steps with other
processes, and a loss that is not finite is a result here. The optimizer step, its learning rate and its random numbers are.
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
from duet.cache.watch import Watch
from duet.stages.compare.methods import Batch, Method, Models, QuestionAnswer, loss_of, train_only_rmus_layers
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer, pad_id_of
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.student import CHECKPOINTS_NAME, TrainSettings
from duet.stages.student import checkpoint
from duet.stages.student.card import compared_card
from duet.stages.student.checkpoint import TrainingState
from duet.stages.student.export import export
from duet.stages.student.loop import lr_at, seed_everything, update
from duet.stages.student.model import (
    autocast,
    export_dtype_of,
    forward_dtype_of,
    load_trainable,
    optimizer_of,
    trained,
)
from duet.stages.student.ranks import Processes


def row_of(renderer: Renderer, query: Query, answer: str | None = None) -> QuestionAnswer:
    """A question with its answer, or with another one, as token ids, without a prefix, as a student sees it."""
    asked = Prompt.plain(query)
    return QuestionAnswer(
        renderer.prompt(asked), renderer.answer(asked, query.answer or "" if answer is None else answer).ids
    )


@dataclass(frozen=True)
class TrainingRows:
    """The queries of a run as token ids, from which a step's rows are drawn.

    Numbers are the store's: forget, then retain, then broad rows, which have no answers to learn from and are left out.
    """

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
            retain=[self.retain[at] for at in numbers - len(self.forget) if 0 <= at < len(self.retain)],
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
    """One training: a method with its constant, from one model, on these rows."""

    name: str  # in errors and on the model card
    method: Method
    constant: float  # of the method; 0 where it has none
    model_dir: Path
    start_name: str  # the name of that model in everything that is written
    folder: Path  # gets model/
    settings: TrainSettings
    rows: TrainingRows
    steps: Steps
    seed: int  # of drawn refusals and of RMU's direction
    device: torch.device
    trust_remote_code: bool = False


def train_baseline(job: BaselineJob, watch: Watch) -> dict[str, Any]:
    """Train from the newest checkpoint or the start, and export `model/`; returns steps, seconds and the curve.

    `watch.on_progress` gets the job's name, the steps done, their number and the loss in words. A loss or gradient that is not
    finite ends the training with the weights before that step (`diverged_at`): that a method diverges at a learning rate is a
    result, not an error. Raises Interrupted, after a checkpoint, when `watch.should_stop()` is true.
    """
    settings, device, total = job.settings, job.device, job.steps.total
    tokenizer = load_tokenizer(job.model_dir, job.trust_remote_code)
    models = _models(job, tokenizer)
    model = models.model
    optimizer = optimizer_of(list(trained(model).values()), settings)
    checkpoint_dir, alone = job.folder / CHECKPOINTS_NAME, Processes(Rank(), device)
    state = checkpoint.load_newest(checkpoint_dir, model, optimizer) or TrainingState()
    curve: list[list[float]] = []
    diverged_at = None
    while state.step < total and diverged_at is None:
        started, step = time.perf_counter(), state.step
        batch = job.rows.batch(job.steps.numbers(step), job.seed, step)
        with autocast(settings, device):
            seed_everything(settings.seed, step, 0)
            loss = loss_of(job.method, models, batch, job.constant)
        if loss is not None and not _stepped(model, optimizer, loss, settings, lr_at(step, total, settings)):
            diverged_at = step + 1
        value = math.nan if loss is None else loss.item()
        state = replace(state, step=step + 1, train_s=state.train_s + time.perf_counter() - started)
        if math.isfinite(value):
            curve.append([step + 1, value])
        watch.on_progress(job.name, step + 1, total, f"loss {value:.3g}")
        stop = watch.should_stop() and state.step < total
        if stop or state.step % settings.checkpoint_steps == 0:
            checkpoint.save(checkpoint_dir, model, optimizer, state, alone, settings.keep_last)
        if stop:
            raise Interrupted(f"{job.name}: step {state.step} of {total} is saved in {job.folder}")
    steps = state.step - (diverged_at is not None)
    card = compared_card(job.name, job.method.title, job.method.paper, job.start_name, steps, settings)
    export(model, tokenizer, job.folder, export_dtype_of(settings, model.config), settings.lora, card)
    shutil.rmtree(checkpoint_dir, ignore_errors=True)
    return {"steps": steps, "train_s": state.train_s, "diverged_at": diverged_at, "curve": curve}


def _models(job: BaselineJob, tokenizer: Any) -> Models:
    """The model to be trained and, where the method needs it, the frozen one that it begins as."""
    dtype = forward_dtype_of(job.settings, job.device)
    uniform = dtype == torch.float32
    model = load_trainable(job.model_dir, job.start_name, job.settings, dtype, job.trust_remote_code, uniform)
    model = model.to(job.device)
    if job.method.layers_only:
        train_only_rmus_layers(model)
    reference = None
    if job.method.reference:
        reference = load_model(job.model_dir, "auto", job.trust_remote_code).to(job.device, dtype).requires_grad_(False)
    pad_id = pad_id_of(tokenizer, model.get_input_embeddings().weight.shape[0])
    return Models(model, reference, pad_id, job.device, job.seed)


def _stepped(
    model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor, settings: TrainSettings, lr: float
) -> bool:
    """Take one optimizer step; False, without a step, where loss or gradient is not finite."""
    loss.backward()
    if not torch.isfinite(loss):
        return False
    return math.isfinite(update(model, optimizer, lr, settings.max_grad_norm))
