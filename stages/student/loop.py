"""The training loop of stage two: from a batch of the store to an optimizer step, a line of metrics and a checkpoint.

The loop can be stopped after any step and goes on bit for bit on a CPU. Any number of processes take the same steps, to
within rounding: a step's rows do not depend on it.

Shapes: N supervised positions of a pass.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet.cache.codec import Block
from duet.cache.errors import Interrupted, UserError
from duet.cache.files import publishing, sync_file
from duet.cache.order import Order
from duet.stages.settings.student import CHECKPOINTS_NAME, METRICS_NAME, TrainSettings
from duet.stages.student import checkpoint
from duet.stages.student.checkpoint import TrainingState
from duet.stages.student.model import Student, trained
from duet.stages.student.passes import Pass, passes_of
from duet.stages.student.prefetch import Prefetch
from duet.stages.student.probe import Probe, ask
from duet.stages.student.ranks import whole, without_sync
from duet.stages.student.targets import Teachers


@dataclass(frozen=True)
class StepReport:
    """One line of metrics.jsonl.

    `loss` is the weighted mean over supervised positions, `loss_forget` and `loss_retain` are the plain means over those of
    a subset, those against several teachers alike, None where the step had none. Rates count all processes; `stall_share` is
    the part of all steps' time that the first process has waited for the store; `memory_gb` its peak so far, in 10^9 bytes,
    of the GPU or else of the process.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    loss_forget: float | None
    loss_retain: float | None
    lr: float
    grad_norm: float
    rows_per_s: float
    tokens_per_s: float
    stall_share: float
    memory_gb: float
    probe: dict[str, Any] | None


def run_loop(
    name: str,
    student_dir: Path,
    teachers: Teachers,
    order: Order,
    student: Student,
    probe: Probe,
    pad_id: int,
    on_step: Callable[[StepReport], None],
    should_stop: Callable[[], bool],
) -> tuple[TrainingState, list[dict[str, Any]]]:
    """All steps from the newest checkpoint to the end, where the last one is made; returns the progress and the lines of
    metrics.jsonl."""
    settings, processes, checkpoints = student.settings, student.processes, student_dir / CHECKPOINTS_NAME
    reset_peak_memory(processes.device)
    progress = checkpoint.load_newest(checkpoints, student.model, student.optimizer) or TrainingState()
    total = settings.epochs * math.ceil(order.num_slots / settings.batch_size)
    with processes.first_first():
        lines = _metrics_until(student_dir / METRICS_NAME, progress.step, write=processes.first)
    pinned = processes.device.type == "cuda"
    batches = Prefetch(
        teachers.batches(order, settings.batch_size, progress.cursor, processes.rank),
        lambda batch: (batch[0], _passes(teachers, batch[1], settings, pad_id, pinned)),
    )
    idle = probe.passes[0].without_weight()
    with closing(batches), _appending(student_dir / METRICS_NAME, processes.first) as write:
        while progress.step < total and not _out_of_patience(progress, settings):
            started, waited = time.perf_counter(), batches.stall_s
            cursor, passes = next(batches)
            num_rows = cursor.slot - (progress.cursor.slot if cursor.epoch == progress.cursor.epoch else 0)
            lr = settings.lr * lr_factor(progress.step, total, settings.warmup, settings.decay)
            result = _step(name, student, passes, idle, lr, progress.step)
            seconds, done = time.perf_counter() - started, progress.step + 1
            progress = replace(
                progress,
                step=done,
                cursor=cursor,
                train_s=progress.train_s + seconds,
                stall_s=progress.stall_s + batches.stall_s - waited,
                tokens=progress.tokens + result.num_tokens,
            )
            asked = None
            if settings.probe and (done % settings.probe.steps == 0 or done == total):
                asked = ask(probe, student.answer, processes.device)
                if settings.probe.patience:
                    progress = _judged(progress, asked["loss"], checkpoints, student)
            report = StepReport(
                step=done,
                total_steps=total,
                epoch=done / total * settings.epochs,
                loss=result.loss,
                loss_forget=result.loss_forget,
                loss_retain=result.loss_retain,
                lr=lr,
                grad_norm=result.grad_norm,
                rows_per_s=num_rows / seconds,
                tokens_per_s=result.num_tokens / seconds,
                stall_share=progress.stall_s / progress.train_s,
                memory_gb=peak_memory_gb(processes.device),
                probe=asked,
            )
            lines.append(asdict(report))
            if processes.first:
                write(json.dumps(lines[-1]) + "\n")
                on_step(report)
            stop = bool(processes.tell([should_stop()]).any()) and done < total
            ended = done == total or _out_of_patience(progress, settings)  # what follows may fail, and is done again
            if stop or ended or done % settings.checkpoint_steps == 0:
                if processes.first:  # a checkpoint is never newer than its lines
                    sync_file(student_dir / METRICS_NAME)
                checkpoint.save(checkpoints, student.model, student.optimizer, progress, processes, settings.keep_last)
            if stop:
                raise Interrupted(f"student {name}: step {done} of {total} is saved in {student_dir}")
    return progress, lines


def _passes(teachers: Teachers, blocks: list[Block], settings: TrainSettings, pad_id: int, pinned: bool) -> list[Pass]:
    passes = passes_of(teachers.targets(blocks), settings, pad_id)
    return [one.pin_memory() for one in passes] if pinned else passes


def _out_of_patience(progress: TrainingState, settings: TrainSettings) -> bool:
    patience = settings.probe.patience if settings.probe else None
    return patience is not None and progress.probes_since >= patience


def _judged(progress: TrainingState, loss: float, checkpoints: Path, student: Student) -> TrainingState:
    """Keep the weights where the loss on held-out rows is the lowest so far, and count the probes since."""
    if progress.best_loss is not None and loss >= progress.best_loss:
        return replace(progress, probes_since=progress.probes_since + 1)
    checkpoint.save_best(checkpoints, student.model, student.processes)
    return replace(progress, best_loss=loss, probes_since=0)


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all processes; losses as in StepReport."""

    loss: float
    loss_forget: float | None
    loss_retain: float | None
    grad_norm: float
    num_tokens: int


def _step(name: str, student: Student, passes: list[Pass], idle: Pass, lr: float, step: int) -> StepResult:
    """One optimizer step on the weighted mean of the loss over all positions of a batch.

    Every process makes as many passes as the one with the most, and divides by the weight of all, so that the step is that
    of one process. `idle` is a pass without weight, for a process that has none left.
    """
    settings, processes = student.settings, student.processes
    seed_everything(settings.seed, step, processes.rank.number)
    told = processes.tell([sum(one.weight_N.sum().item() for one in passes), len(passes)])
    total_weight, num_passes = told[:, 0].sum().item(), int(told[:, 1].max())
    sums = np.zeros(6)  # weighted loss; loss and positions of forget, of retain; tokens
    for number in range(num_passes):
        one = (passes[number] if number < len(passes) else idle).to(processes.device)
        with nullcontext() if number == num_passes - 1 else without_sync(student.module):
            loss_N = student.losses(one)
            # Processes' gradients are averaged: times their number, that is the sum.
            loss = (loss_N * one.weight_N).sum() / total_weight
            (loss * processes.rank.world).backward()
        if number < len(passes):
            sums += _sums(loss_N.detach(), one, loss.item())
    sums = processes.tell(sums.tolist()).sum(0).tolist()
    total, forget, num_forget, retain, num_retain, num_tokens = sums
    if not math.isfinite(total):
        raise _diverged(name, "loss", total, step, lr)
    for group in student.optimizer.param_groups:
        group["lr"] = lr
    clipped = torch.nn.utils.clip_grad_norm_(trained(student.model).values(), settings.max_grad_norm)
    grad_norm = float(whole(clipped))
    if not math.isfinite(grad_norm):
        raise _diverged(name, "gradient's norm", grad_norm, step, lr)
    student.optimizer.step()
    student.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=total,
        loss_forget=forget / num_forget if num_forget else None,
        loss_retain=retain / num_retain if num_retain else None,
        grad_norm=grad_norm,
        num_tokens=int(num_tokens),
    )


def _diverged(name: str, what: str, value: float, step: int, lr: float) -> UserError:
    return UserError(
        f"student {name}: the {what} is {value} at step {step + 1}, learning rate {lr:.3g}",
        "lower train.lr, or set train.dtype: float32; the last checkpoint is untouched",
    )


def _sums(loss_N: torch.Tensor, one: Pass, weighted: float) -> np.ndarray:
    parts = [weighted]
    for subset_N in (one.is_forget_N, ~one.is_forget_N):
        parts += [loss_N[subset_N].sum().item(), subset_N.sum().item()]
    return np.array([*parts, one.num_tokens])


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout's) are a function of these three, so that nothing of them needs to be saved."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def reset_peak_memory(device: torch.device) -> None:
    """Count `peak_memory_gb` from here on, where the system can: a process may train several students."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb(device: torch.device) -> float:
    """Most memory that this process has held so far, in 10^9 bytes: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS counts bytes


def lr_factor(step: int, total_steps: int, warmup: float, decay: str) -> float:
    """Share of the peak learning rate for step `step` (from 0): linear warm-up over `warmup` of the steps, then `decay`."""
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[decay]


@contextmanager
def _appending(path: Path, first: bool) -> Iterator[Callable[[str], Any]]:
    """What the first process writes its lines with, each at once."""
    if not first:
        yield lambda line: None
        return
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        yield file.write


def _metrics_until(path: Path, step: int, write: bool) -> list[dict[str, Any]]:
    """Keep the lines of metrics.jsonl up to the checkpoint's step: what came later will be done again."""
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # a torn line has no end
    kept = [line for line in map(json.loads, whole_lines) if line["step"] <= step]
    if write:
        with publishing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept
