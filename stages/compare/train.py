"""Other unlearning methods, trained like a student: the same batches of the same queries, optimizer, schedule and export.

`methods.py` holds each method's loss. DUET's student reads a store, these read the data's answers (`rows.py`); methods that use
no retain data leave those rows out, and all of them broad rows. A training can be stopped after any step and goes on bit for
bit on a CPU.

The loop is not that of `duet.stages.student.loop`: it does not prefetch, cut passes, probe or share its steps with other
processes, and a loss that is not finite is a result here. The optimizer step, its learning rate and its random numbers are.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duet.cache.errors import Interrupted
from duet.cache.reader import Rank
from duet.cache.watch import Watch
from duet.stages.compare.methods import Method, Models, loss_of, train_only_rmus_layers
from duet.stages.compare.rows import Batch, Steps, TrainingRows
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer, pad_id_of
from duet.stages.settings.student import CHECKPOINTS_NAME, TrainSettings
from duet.stages.student import checkpoint
from duet.stages.student.card import compared_card
from duet.stages.student.checkpoint import TrainingState
from duet.stages.student.export import export
from duet.stages.student.four_bits import is_packed
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
    seed: int  # of what a method draws
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
    state = checkpoint.load_newest(checkpoint_dir, model, optimizer, alone) or TrainingState()
    curve: list[list[float]] = []
    diverged_at = None
    while state.step < total:
        started, step = time.perf_counter(), state.step
        batch = job.rows.batch(job.steps.numbers(step), job.seed, step, job.method.in_context)
        with autocast(settings, device):
            seed_everything(settings.seed, step, 0)
            loss = gradient_of(job, models, batch)
        if loss is not None and not _stepped(model, optimizer, loss, settings, lr_at(step, total, settings)):
            diverged_at = step + 1
        value = math.nan if loss is None else loss.item()
        state = replace(state, step=step + 1, train_s=state.train_s + time.perf_counter() - started)
        if math.isfinite(value):
            curve.append([step + 1, value])
        watch.on_progress(job.name, step + 1, total, f"loss {value:.3g}")
        if diverged_at is not None:
            break  # without a checkpoint, behind which it would go on
        stop = watch.should_stop() and state.step < total
        if stop or state.step % settings.checkpoint_steps == 0:
            checkpoint.save(checkpoint_dir, model, optimizer, state, alone, settings.keep_last)
        if stop:
            raise Interrupted(f"{job.name}: step {state.step} of {total} is saved in {job.folder}")
    steps = state.step - (diverged_at is not None)
    card = compared_card(job.name, job.method.title, job.method.paper, job.start_name, steps, settings)
    export(model, tokenizer, job.folder, export_dtype_of(settings, model.config), settings.lora, lambda _: card)
    shutil.rmtree(checkpoint_dir, ignore_errors=True)
    return {"steps": steps, "train_s": state.train_s, "diverged_at": diverged_at, "curve": curve}


def _models(job: BaselineJob, tokenizer: Any) -> Models:
    """The model to be trained and, where the method needs it, the frozen one that it begins as."""
    dtype = forward_dtype_of(job.settings, job.device)
    uniform = dtype == torch.float32 or is_packed(job.settings)  # what is packed cannot be merged
    model = load_trainable(job.model_dir, job.start_name, job.settings, dtype, job.trust_remote_code, uniform)
    if job.method.layers_only:
        train_only_rmus_layers(model)
    return _with_reference(job, model, tokenizer)


def untrained_models(job: BaselineJob, tokenizer: Any) -> Models:
    """As `_models` with all weights in float32, whatever the settings train, and in evaluation mode."""
    return _with_reference(job, load_model(job.model_dir, "float32", job.trust_remote_code), tokenizer)


def _with_reference(job: BaselineJob, model: Any, tokenizer: Any) -> Models:
    reference = None
    if job.method.reference:
        dtype = str(forward_dtype_of(job.settings, job.device)).removeprefix("torch.")
        # Loaded in its dtype: `to` would also round the frequencies of rotary positions, which the model in training keeps.
        reference = load_model(job.model_dir, dtype, job.trust_remote_code).to(job.device).requires_grad_(False)
    pad_id = pad_id_of(tokenizer, model.get_input_embeddings().weight.shape[0])
    return Models(model.to(job.device), reference, pad_id, job.device, job.seed)


def gradient_of(job: BaselineJob, models: Models, batch: Batch) -> torch.Tensor | None:
    """Leave the gradient of the method's loss in the model and return the loss; None where the step has no rows for it."""
    if job.method.smooth and batch.forget:
        with _at_worst(job, models, batch):
            forget = job.method.forget(models, batch, job.constant)
            forget.backward()
        if job.method.retain is None or not batch.retain:
            return forget.detach()
        retain = job.method.retain(models, batch, job.constant)
        retain.backward()
        return (forget + retain).detach()
    loss = loss_of(job.method, models, batch, job.constant)
    if loss is not None:
        loss.backward()
    return loss


@contextmanager
def _at_worst(job: BaselineJob, models: Models, batch: Batch) -> Iterator[None]:
    """Within, the weights are theta + rho g / |g|, g the gradient of the forget loss at theta; rho is the constant.

    Sharpness-aware minimisation (Foret et al., arXiv 2010.01412, equation 2) of the forget loss alone, as Fan et al. (arXiv
    2502.05374) unlearn with it: a forgetting that holds in a neighbourhood is not undone by a small step. Autocast keeps its
    copies of weights that it has rounded, and would read those at theta again.
    """
    weights = list(trained(models.model).values())
    loss = job.method.forget(models, batch, job.constant)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None and norm > 0:
                weight.add_(job.constant * gradient / norm)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
        torch.clear_autocast_cache()


def _stepped(
    model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor, settings: TrainSettings, lr: float
) -> bool:
    """Take one optimizer step with the gradient that is there; False, without a step, where loss or it is not finite."""
    if not torch.isfinite(loss):
        return False
    return math.isfinite(update(model, optimizer, lr, settings.max_grad_norm))
