"""Stage two: one student learns to give the teacher's logits without ever seeing the prefix.

Reads a store and a model to start from; neither vLLM nor the teacher's weights are ever loaded. The loop can be stopped
at any step and goes on bit for bit on a CPU.

Shapes: B batch, T time, N supervised positions of a batch, K kept ids, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.codec import Block
from cache.errors import Interrupted, UserError
from cache.files import publish_json, publishing, read_json, sync_dir
from cache.order import Cursor
from cache.places import Place, local_folder
from cache.prefetch import Prefetch
from cache.reader import Store
from cache.record import prompt_and_response
from stages import checkpoint
from stages.alignment import AlignedBatch, align
from stages.losses import LOSSES
from stages.models import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    tokenizer_sha256,
    vocab_width,
    weights_sha256,
)
from stages.prompts import check_length
from stages.settings import TrainSettings
from stages.tokenizers import check_same_tokenizer

IDENTITY_NAME = "student.json"
TRAINING_NAME = "training.json"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class StudentJob:
    """One student to be trained."""

    name: str
    model_dir: Path  # what it starts from
    student_dir: Path  # gets model/, metrics.jsonl, checkpoints/
    settings: TrainSettings
    device: str
    trust_remote_code: bool = False


@dataclass(frozen=True)
class StepReport:
    """One line of metrics.jsonl. `loss` is the mean over supervised positions of the sum over the k ids."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    rows_per_s: float
    stall_s: float  # how long this process has waited for the store in all


def open_store(place: Place, verify: bool) -> tuple[Store, Any]:
    """A complete store and the teacher's tokenizer, which lies in it."""
    store = Store(place, verify)
    tokenizer = load_tokenizer(local_folder(place, "tokenizer", store.manifest.attachments))
    if tokenizer_sha256(tokenizer) != store.manifest.provenance["tokenizer_sha256"]:
        raise UserError(
            f"{place.name_of('tokenizer')} is not the tokenizer that the store was made with", "make the store anew"
        )
    return store, tokenizer


def train_student(
    job: StudentJob,
    store: Store,
    store_tokenizer: Any,
    on_step: Callable[[StepReport], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train, or go on training, one student and export it; returns what training.json holds.

    Raises UserError where the student's folder belongs to other settings, Interrupted (after a checkpoint) when
    `should_stop()` is true after a step.
    """
    claim(job, store)
    if (job.student_dir / TRAINING_NAME).is_file():
        return read_json(job.student_dir / TRAINING_NAME)
    config = load_config(job.model_dir, job.trust_remote_code)
    tokenizer = load_tokenizer(job.model_dir, job.trust_remote_code)
    check_same_tokenizer(store_tokenizer, tokenizer, vocab_width(config), job.name)
    check_context(store, context_length(config))
    torch.manual_seed(job.settings.seed)
    model = load_model(job.model_dir, "float32", job.trust_remote_code).to(job.device)
    progress, curve = _loop(job, store, model, tokenizer.pad_token_id or 0, on_step, should_stop)
    return _finish(job, store, model, tokenizer, progress, curve)


def check_context(store: Store, context: int) -> None:
    """Refuse a store with a row that a student of this context, in tokens, could not read whole."""
    if store.manifest.longest <= context:
        return
    for rows in store.rows():
        for row, row_id in enumerate(rows.row_ids):
            prompt, response = prompt_and_response(rows, row)
            check_length(prompt.tolist(), len(response), context, row_id, "student")


def claim(job: StudentJob, store: Store) -> None:
    """Write down whose folder this is, or refuse a folder that holds another student."""
    identity = {
        "store_fingerprint": store.manifest.fingerprint,
        "start_weights_sha256": weights_sha256(job.model_dir),
        "train": job.settings.model_dump(exclude={"checkpoint_steps"}),
    }
    path = job.student_dir / IDENTITY_NAME
    if path.is_file():
        found = read_json(path)
        differing = [key for key in identity if found.get(key) != identity[key]]
        if differing:
            raise UserError(
                f"{job.student_dir} holds another run: {_differences(found, identity, differing)}",
                "give the run or the student another name, or remove the folder if nobody needs it",
            )
        return
    if job.student_dir.exists() and any(job.student_dir.iterdir()):
        raise UserError(f"{job.student_dir} is not empty and holds no student of ours", "give the student another name")
    job.student_dir.mkdir(parents=True, exist_ok=True)
    publish_json(path, identity)


def _differences(found: dict[str, Any], expected: dict[str, Any], keys: list[str]) -> str:
    parts = []
    for key in keys:
        if key == "train":
            pairs = {k: (found["train"].get(k), v) for k, v in expected["train"].items() if found["train"].get(k) != v}
            parts += [f"train.{k} is {old!r} there and {new!r} now" for k, (old, new) in pairs.items()]
        else:
            parts.append(f"{key} is {str(found.get(key))[:16]} there and {str(expected[key])[:16]} now")
    return "; ".join(parts)


def _loop(
    job: StudentJob,
    store: Store,
    model: torch.nn.Module,
    pad_id: int,
    on_step: Callable[[StepReport], None],
    should_stop: Callable[[], bool],
) -> tuple[checkpoint.Progress, list[dict[str, Any]]]:
    """All optimizer steps from the newest checkpoint to the end; returns the progress and the lines of metrics.jsonl."""
    settings = job.settings
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    progress = checkpoint.load_newest(job.student_dir / "checkpoints", model, optimizer) or checkpoint.Progress(
        0, Cursor(), 0.0
    )
    order = store.order(settings.seed, settings.forget_share)
    num_batches = settings.epochs * math.ceil(order.num_slots / settings.batch_size)
    total = math.ceil(num_batches / settings.accumulation)
    batches = Prefetch(
        store.batches(order, settings.batch_size, progress.cursor),
        lambda batch: (batch[0], Group.of(batch[1], pad_id, pinned=job.device == "cuda")),
    )
    lines = _metrics_until(job.student_dir / METRICS_NAME, progress.step)
    with closing(batches), open(job.student_dir / METRICS_NAME, "a", encoding="utf-8") as metrics:
        while progress.step < total:
            started = time.monotonic()
            wanted = min(settings.accumulation, num_batches - progress.step * settings.accumulation)
            cursor, groups = _take(batches, wanted)
            lr = settings.lr * lr_factor(progress.step, total, settings.warmup, settings.decay)
            loss, grad_norm = _step(model, optimizer, groups, lr, job)
            seconds = time.monotonic() - started
            progress = checkpoint.Progress(progress.step + 1, cursor, progress.train_s + seconds)
            report = StepReport(
                step=progress.step,
                total_steps=total,
                epoch=progress.step / total * settings.epochs,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                rows_per_s=sum(group.num_rows for group in groups) / seconds,
                stall_s=batches.stall_s,
            )
            lines.append(report.__dict__)
            metrics.write(json.dumps(report.__dict__) + "\n")
            metrics.flush()
            on_step(report)
            stop = should_stop() and progress.step < total
            if stop or progress.step % settings.checkpoint_steps == 0:
                checkpoint.save(job.student_dir / "checkpoints", model, optimizer, progress)
            if stop:
                raise Interrupted(f"student {job.name}: step {progress.step} of {total} is saved in {job.student_dir}")
    return progress, lines


@dataclass(frozen=True)
class Group:
    """One forward pass: the student's aligned rows and the teacher's top-k at the same N positions."""

    num_rows: int
    batch: AlignedBatch
    teacher_ids_NK: torch.Tensor  # int64
    teacher_NK: torch.Tensor  # float32

    @staticmethod
    def of(rows: Block, pad_id: int, pinned: bool = False) -> Group:
        """Decode, align and pad; `pinned` puts the tensors where a GPU fetches them while the CPU goes on."""
        both = [prompt_and_response(rows, row) for row in range(len(rows))]
        batch = align([prompt for prompt, _ in both], [response for _, response in both], pad_id)
        ids_NK, logits_NK = torch.from_numpy(rows.topk_ids()).long(), torch.from_numpy(rows.topk_logits())
        if pinned:
            batch, ids_NK, logits_NK = batch.pin_memory(), ids_NK.pin_memory(), logits_NK.pin_memory()
        return Group(len(rows), batch, ids_NK, logits_NK)

    @property
    def num_positions(self) -> int:
        return len(self.teacher_NK)


def _take(batches: Iterator[tuple[Cursor, Group]], count: int) -> tuple[Cursor, list[Group]]:
    taken = [next(batches) for _ in range(count)]
    return taken[-1][0], [group for _, group in taken]


def _step(
    model: Any, optimizer: torch.optim.Optimizer, groups: list[Group], lr: float, job: StudentJob
) -> tuple[float, float]:
    """One optimizer step over the groups of an accumulation; (mean loss per supervised position, gradient norm)."""
    num_positions = sum(group.num_positions for group in groups)
    loss_fn, device = LOSSES[job.settings.loss], torch.device(job.device)
    total = 0.0
    for group in groups:
        with _autocast(job):
            logits_NV = supervised_logits(model, group.batch.to(device))
        student_NK = logits_NV.float().gather(1, group.teacher_ids_NK.to(device, non_blocking=True))
        teacher_NK = group.teacher_NK.to(device, non_blocking=True)
        loss = loss_fn(student_NK, teacher_NK, job.settings.huber_delta).sum() / num_positions
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise UserError(
            f"student {job.name}: the loss is {total} at learning rate {lr:.3g}",
            "lower train.lr, or set train.dtype: float32; the last checkpoint is untouched",
        )
    for parameter_group in optimizer.param_groups:
        parameter_group["lr"] = lr
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, float(grad_norm)


def _autocast(job: StudentJob) -> Any:
    """bfloat16 forward passes where asked for, or on "auto" where a GPU has them."""
    on_gpu = job.device == "cuda" and torch.cuda.is_bf16_supported()
    if job.settings.dtype == "bfloat16" or (job.settings.dtype == "auto" and on_gpu):
        return torch.autocast(job.device, torch.bfloat16)
    return nullcontext()


def supervised_logits(model: Any, batch: AlignedBatch) -> torch.Tensor:
    """The student's raw logits [N, V] at the supervised positions.

    The model's own forward pass runs, but its output head is handed only the N supervised hidden states, so that head
    bias, scale and soft-cap are the model's and no other position costs a row of logits.
    """
    with _only_rows(model.get_output_embeddings(), batch.batch_index_N, batch.position_N):
        out = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    return out.logits[0]


@contextmanager
def _only_rows(head: torch.nn.Module, batch_index_N: torch.Tensor, position_N: torch.Tensor) -> Iterator[None]:
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][batch_index_N, position_N][None], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def lr_factor(step: int, total_steps: int, warmup: float, decay: str) -> float:
    """Share of the peak learning rate for step `step` (from 0): linear warm-up over `warmup` of the steps, then `decay`."""
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[decay]


def _metrics_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines of metrics.jsonl up to the checkpoint's step: what came later will be done again."""
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []  # a torn last line has no end
    lines = [json.loads(line) for line in whole]
    kept = [line for line in lines if line["step"] <= step]
    with publishing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept


def _finish(
    job: StudentJob,
    store: Store,
    model: Any,
    tokenizer: Any,
    progress: checkpoint.Progress,
    lines: list[dict[str, Any]],
) -> dict[str, Any]:
    """Export the model, write training.json (the sign that the student is done) and drop the checkpoints."""
    export(job, model, tokenizer)
    rows = job.settings.epochs * store.order(job.settings.seed, job.settings.forget_share).num_slots
    summary = {
        "name": job.name,
        "loss": job.settings.loss,
        "steps": progress.step,
        "rows": len(store),
        "train_s": progress.train_s,
        "rows_per_s": rows / progress.train_s,
        "stall_s": lines[-1]["stall_s"],
        "parameters": model.num_parameters(),
        "curve": [[line["step"], line["loss"]] for line in lines],
    }
    publish_json(job.student_dir / TRAINING_NAME, summary)
    shutil.rmtree(job.student_dir / "checkpoints", ignore_errors=True)
    return summary


def export(job: StudentJob, model: Any, tokenizer: Any) -> None:
    """Write `model/` in one rename: safetensors weights, config and tokenizer, as transformers and vLLM load them."""
    start_config = load_config(job.model_dir, job.trust_remote_code)
    dtype = job.settings.export_dtype
    target = (getattr(start_config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    temporary, final = job.student_dir / ".model.tmp", job.student_dir / "model"
    for stale in (temporary, final):
        shutil.rmtree(stale, ignore_errors=True)
    model.to(target).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, final)
    sync_dir(job.student_dir)
