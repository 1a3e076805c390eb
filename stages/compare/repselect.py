"""RepSelect: one change of the MLPs' matrices, along what is special to the forget set (Sondej and Yang, arXiv 2606.17168).

Relearning restores what forget and retain rows share, so only the rest is changed. Three passes over the forget rows: adapters
are trained on them, as an attacker would; with these in place, the gradient of the forget loss is summed over the rows; of each
matrix's sum the leading components are shrunk (`selected`). Then the model goes along the result, step by step, until the
retain rows have changed as much as is allowed. No optimizer, schedule or clipping, and always all weights of the MLPs.

Two choices of Duet's: the result is made as long as the matrices are, since a gradient is as small as a model is sure of its
answers, and the retain rows take the place of the paper's WikiText.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from duet.cache.errors import Interrupted, UserError
from duet.cache.watch import Watch
from duet.stages.compare.methods import Models, QuestionAnswer
from duet.stages.compare.train import BaselineJob, untrained_models
from duet.stages.models.sizes import meta_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.student.card import compared_card
from duet.stages.student.export import export
from duet.stages.student.loop import seed_everything
from duet.stages.student.model import export_dtype_of

REPSELECT = "repselect"
MATRICES = ("gate_proj", "up_proj", "down_proj")
COMPONENT_SHARE = 1 / 8  # of a matrix's smaller side: the paper's 512 components of 4096
ADVERSARY_LR = 0.05  # of plain gradient descent; the paper tries .005 to .5
KL_ROWS = 64  # retain rows that the KL is measured on, evenly drawn


def selected(gradient: torch.Tensor, count: int) -> torch.Tensor:
    """The gradient with its `count` leading singular values s_i as s_count^2 / s_i: the larger, the smaller now.

    Dividing a component by s_i / s_count on the left side and again on the right one, as the paper does.
    """
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    changed = s.clone()
    changed[:count] = s[count - 1] ** 2 / s[:count].clamp(min=torch.finfo(s.dtype).tiny)
    return (u * changed) @ vh


def check_matrices(model_dir: Any, trust_remote_code: bool) -> None:
    """Refuse, before any weights are read, a model whose MLPs have other matrices than RepSelect's."""
    model = meta_model(model_dir, trust_remote_code)
    if not list(_matrices(model)):
        raise UserError(
            f"repselect changes the matrices {', '.join(MATRICES)} of MLPs, and {type(model).__name__} has none",
            "leave repselect out of compare.methods",
        )


def _matrices(model: nn.Module) -> Iterator[nn.Linear]:
    for name, module in model.named_modules():
        if name.rsplit(".", maxsplit=1)[-1] in MATRICES and isinstance(module, nn.Linear):
            yield module


def train_repselect(job: BaselineJob, watch: Watch) -> dict[str, Any]:
    """As `train_baseline`, but that a training that was stopped begins again; its curve is the KL after each step.

    The steps are at most as many as the other methods', and end before the mean KL at the retain rows' answer tokens passes the
    job's constant, nats. The learning rate is the length of a step as a share of the matrices'.
    """
    tokenizer = load_tokenizer(job.model_dir, job.trust_remote_code)
    started = time.perf_counter()
    seed_everything(job.settings.seed, 0, 0)
    directions = _directions(job, tokenizer, watch)
    models = untrained_models(job, tokenizer)
    retain = job.rows.retain[:: max(1, len(job.rows.retain) // KL_ROWS)]
    curve, step = [], 0
    weights = [module.weight for module in _matrices(models.model)]
    with torch.no_grad():
        while step < job.steps.total:
            _move(weights, directions, -job.settings.lr)
            kl = _kl(models, retain)
            if not kl <= job.constant:  # not a number: not within
                _move(weights, directions, job.settings.lr)
                break
            step += 1
            curve.append([step, kl])
            watch.on_progress(job.name, step, job.steps.total, f"KL {kl:.3g}")
            _stop(job, watch)
    card = compared_card(job.name, job.method.title, job.method.paper, job.start_name, step, job.settings)
    export(
        models.model, tokenizer, job.folder, export_dtype_of(job.settings, models.model.config), None, lambda _: card
    )
    return {"steps": step, "train_s": time.perf_counter() - started, "diverged_at": None, "curve": curve}


def _stop(job: BaselineJob, watch: Watch) -> None:
    if watch.should_stop():
        raise Interrupted(f"{job.name}: begins again at the next call")


def _directions(job: BaselineJob, tokenizer: Any, watch: Watch) -> list[torch.Tensor]:
    """What is taken from each matrix in a step of rate 1, in the matrices' order: as long as these are, all together."""
    from peft import LoraConfig, get_peft_model

    models = untrained_models(job, tokenizer)
    plain, matrices = models.model, list(_matrices(models.model))
    models.model = get_peft_model(plain, LoraConfig(target_modules=list(MATRICES)))
    adapters = [weight for weight in models.model.parameters() if weight.requires_grad]
    batches = [rows for rows in _batches(job) if rows]
    for rows in batches:
        _stop(job, watch)
        loss = -models(rows).logprob_N.mean()
        gradients = torch.autograd.grad(loss, adapters)
        with torch.no_grad():
            _move(adapters, gradients, -ADVERSARY_LR)
    length = torch.stack([module.weight.norm() for module in matrices]).norm()
    sums = [torch.zeros_like(module.weight) for module in matrices]
    for module in matrices:
        module.weight.requires_grad_(True)
    for rows in batches:
        _stop(job, watch)
        loss = models(rows).logprob_N.mean()
        _move(sums, torch.autograd.grad(loss, [module.weight for module in matrices]), 1)
    found = [selected(total, max(1, int(min(total.shape) * COMPONENT_SHARE))) for total in sums]
    whole = torch.stack([direction.norm() for direction in found]).norm()
    return [direction * (length / whole).detach() for direction in found]


def _move(weights: Sequence[torch.Tensor], directions: Sequence[torch.Tensor], length: float) -> None:
    """Each weight in place, by its direction times `length`."""
    for weight, direction in zip(weights, directions, strict=True):
        weight.add_(direction, alpha=length)


def _batches(job: BaselineJob) -> Iterator[list[QuestionAnswer]]:
    """All forget rows once, in their order."""
    for first in range(0, len(job.rows.forget), job.settings.batch_size):
        yield job.rows.forget[first : first + job.settings.batch_size]


def _kl(models: Models, rows: list[QuestionAnswer]) -> float:
    """Mean over the answers' tokens of KL(frozen || now), nats."""
    before, after = models.reference(rows), models(rows)
    log_before_NV = before.logits_NV.log_softmax(-1)
    difference_NV = log_before_NV - after.logits_NV.log_softmax(-1)
    return float((log_before_NV.exp() * difference_NV).sum(-1).mean())
