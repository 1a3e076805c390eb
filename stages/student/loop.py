"""The training loop of stage two: from a batch of the store to an optimizer step, a line of metrics and a checkpoint.

The loop can be stopped after any step and goes on bit for bit on a CPU. Any number of processes take the same steps, to
within rounding: their number does not change a step's rows. The comparison's other methods (`duet.stages.compare.train`) have
a loop of their own, without a store, and share the optimizer step, its learning rate and its random numbers with this one.

Shapes: N supervised positions of a pass.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet.cache.codec import Block
from duet.cache.errors import Interrupted, UserError
from duet.cache.files import publishing, sync_file
from duet.cache.order import Cursor, Order
from duet.cache.record import SUBSETS
from duet.cache.watch import Watch
from duet.stages.settings.student import CHECKPOINTS_NAME, METRICS_NAME, TrainSettings
from duet.stages.student import checkpoint
from duet.stages.student.checkpoint import TrainingState
from duet.stages.student.early_stop import is_over, probed_after
from duet.stages.student.head import losses_at
from duet.stages.student.job import StudentJob
from duet.stages.student.model import Student, trained
from duet.stages.student.passes import Pass, passes_of
from duet.stages.student.prefetch import Prefetch
from duet.stages.student.probe import Probe
from duet.stages.student.ranks import whole, without_sync
from duet.stages.student.targets import Teachers


@dataclass(frozen=True)
class StepReport:
    """One line of metrics.jsonl.

    `loss` is the weighted mean over supervised positions; `loss_<subset>` are plain means over one subset's positions, over all
    teachers, None if the step had no such position. Rates count all processes; `stall_share` is the part of all steps' time
    that the first process has waited for the store; `memory_gb` its peak so far, in 10^9 bytes, of the GPU or else of the
    process.
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
    loss_broad: float | None = None

    def as_line(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl: of the broad rows only where the step had some."""
        line = asdict(self)
        loss = line.pop("loss_broad")
        return line if loss is None else line | {"loss_broad": loss}


def steps_of(order: Order, settings: TrainSettings) -> int:
    """The steps of a training that nothing ends early."""
    return settings.epochs * math.ceil(order.num_slots / settings.batch_size)


def run_loop(
    job: StudentJob, teachers: Teachers, order: Order, student: Student, probe: Probe, watch: Watch
) -> tuple[TrainingState, list[dict[str, Any]]]:
    """Take all steps from the newest checkpoint to the end, where the last checkpoint is made.

    Returns where the training stands then and the lines of metrics.jsonl. In the first process, `watch.on_progress` gets a
    StepReport after each step.
    """
    settings, processes = student.settings, student.processes
    checkpoint_dir, metrics_path = job.student_dir / CHECKPOINTS_NAME, job.student_dir / METRICS_NAME
    reset_peak_memory(processes.device)
    state = checkpoint.load_newest(checkpoint_dir, student.model, student.optimizer, processes) or TrainingState()
    total = steps_of(order, settings)
    with processes.first_first():
        lines = _metrics_until(metrics_path, state.step, write=processes.first)
    batches = Prefetch(
        teachers.batches(order, settings.batch_size, state.cursor, processes.rank),
        lambda batch: (batch[0], _passes(teachers, batch, student)),
    )
    idle = probe.passes[0].without_weight()
    with closing(batches), _appending(metrics_path, processes.first) as write:
        while state.step < total and not is_over(state, settings):
            started, waited = time.perf_counter(), batches.stall_s
            cursor, passes = next(batches)
            num_rows = cursor.slot - (state.cursor.slot if cursor.epoch == state.cursor.epoch else 0)
            lr = lr_at(state.step, total, settings)
            result = _step(job.name, student, passes, idle, lr, state.step)
            seconds = time.perf_counter() - started
            state = state.after(cursor, result.num_tokens, seconds, batches.stall_s - waited)
            state, probed = probed_after(probe, student, state, total, checkpoint_dir)
            report = StepReport(
                step=state.step,
                total_steps=total,
                epoch=state.step / total * settings.epochs,
                loss=result.loss,
                **{f"loss_{subset}": loss for subset, loss in result.losses.items()},
                lr=lr,
                grad_norm=result.grad_norm,
                rows_per_s=num_rows / seconds,
                tokens_per_s=result.num_tokens / seconds,
                stall_share=state.stall_s / state.train_s,
                memory_gb=peak_memory_gb(processes.device),
                probe=probed,
            )
            lines.append(report.as_line())
            if processes.first:
                write(json.dumps(lines[-1]) + "\n")
                watch.on_progress(report)
            stop = bool(processes.tell([watch.should_stop()]).any()) and state.step < total
            ended = state.step == total or is_over(state, settings)  # a failure after the end repeats no step
            if stop or ended or state.step % settings.checkpoint_steps == 0:
                _save(job, student, state)
            if stop:
                raise Interrupted(f"student {job.name}: step {state.step} of {total} is saved in {job.student_dir}")
    return state, lines


def _passes(teachers: Teachers, batch: tuple[Cursor, list[Block]], student: Student) -> list[Pass]:
    cursor, blocks = batch
    rows = teachers.targets(blocks)
    if student.wide is not None:
        rows = student.wide.around(rows, cursor)
    passes = passes_of(rows, student.settings, student.pad_id)
    return [one.pin_memory() for one in passes] if student.processes.device.type == "cuda" else passes


def _save(job: StudentJob, student: Student, state: TrainingState) -> None:
    if student.processes.first:  # a checkpoint is never newer than its lines
        sync_file(job.student_dir / METRICS_NAME)
    checkpoint_dir, keep_last = job.student_dir / CHECKPOINTS_NAME, student.settings.keep_last
    checkpoint.save(checkpoint_dir, student.model, student.optimizer, state, student.processes, keep_last)


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, over all processes; losses as in StepReport."""

    loss: float
    losses: dict[str, float | None]  # by subset
    grad_norm: float
    num_tokens: int


def _step(name: str, student: Student, passes: list[Pass], idle: Pass, lr: float, step: int) -> StepResult:
    """One optimizer step on the weighted mean of the loss over all positions of a batch.

    Every process makes as many passes as the one with the most, and divides by the weight of all, so that the step equals
    that of one process. `idle` is a pass without weight, for a process that has none left.
    """
    settings, processes = student.settings, student.processes
    seed_everything(settings.seed, step, processes.rank.number)
    shares = processes.tell([sum(one.weight_N.sum().item() for one in passes), len(passes)])
    total_weight, num_passes = shares[:, 0].sum().item(), int(shares[:, 1].max())
    sums = np.zeros(2 + 2 * len(SUBSETS))  # weighted loss; tokens; loss, then positions, of each subset
    for number in range(num_passes):
        one = (passes[number] if number < len(passes) else idle).to(processes.device)
        with nullcontext() if number == num_passes - 1 else without_sync(student.module):
            loss_N, _ = losses_at(one, student.module, student.loss, student.autocast())
            # Processes' gradients are averaged: times their number, that is the sum.
            loss = (loss_N * one.weight_N).sum() / total_weight
            (loss * processes.rank.world).backward()
        if number < len(passes):
            sums += _sums(loss_N.detach(), one, loss.item())
    total, num_tokens, *by_subset = processes.tell(sums.tolist()).sum(0).tolist()
    parts = zip(SUBSETS, by_subset[: len(SUBSETS)], by_subset[len(SUBSETS) :], strict=True)
    if not math.isfinite(total):
        raise _diverged(name, "loss", total, step, lr)
    grad_norm = update(student.model, student.optimizer, lr, settings.max_grad_norm)
    if not math.isfinite(grad_norm):
        raise _diverged(name, "gradient's norm", grad_norm, step, lr)
    return StepResult(
        loss=total,
        losses={subset: part / count if count else None for subset, part, count in parts},
        grad_norm=grad_norm,
        num_tokens=int(num_tokens),
    )


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> float:
    """Take one optimizer step with the clipped gradients, drop them and return their norm; no step if that is not finite."""
    norm = float(whole(torch.nn.utils.clip_grad_norm_(trained(model).values(), max_grad_norm)))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _diverged(name: str, what: str, value: float, step: int, lr: float) -> UserError:
    return UserError(
        f"student {name}: the {what} is {value} at step {step + 1}, learning rate {lr:.3g}",
        "lower train.lr, or set train.dtype: float32; the last checkpoint is untouched",
    )


def _sums(loss_N: torch.Tensor, one: Pass, weighted: float) -> np.ndarray:
    here = [one.subset_N == number for number in range(len(SUBSETS))]
    losses, counts = [loss_N[here_N].sum().item() for here_N in here], [here_N.sum().item() for here_N in here]
    return np.array([weighted, one.num_tokens, *losses, *counts])


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Make a step's random numbers (dropout's) a function of these three, so that no generator's state needs to be saved."""
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


def lr_at(step: int, total_steps: int, settings: TrainSettings) -> float:
    """The learning rate of step `step`, from 0."""
    return settings.lr * lr_factor(step, total_steps, settings.warmup, settings.decay)


def lr_factor(step: int, total_steps: int, warmup: float, decay: str) -> float:
    """Share of the peak learning rate for step `step` (from 0): linear warm-up over `warmup` of the steps, then `decay`."""
    warmup_steps = math.ceil(round(warmup * total_steps, 9))  # 0.07 * 100 is a little more than 7
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[decay]


@contextmanager
def _appending(path: Path, first: bool) -> Iterator[Callable[[str], Any]]:
    """A function that appends a line to the file at once, in the first process; elsewhere one that does nothing."""
    if not first:
        yield lambda line: None
        return
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        yield file.write


def _metrics_until(path: Path, step: int, write: bool) -> list[dict[str, Any]]:
    """Keep the lines of metrics.jsonl up to the checkpoint's step: later steps will be taken again."""
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # a torn line has no end
    kept = [line for line in map(json.loads, whole_lines) if line["step"] <= step]
    if write:
        with publishing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept
