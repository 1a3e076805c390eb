"""The sides of a whole training step: Duet's, the Trainer's, DistillKit's, each measured in a process of its own.

Run by itself this is one side; student_loop.py compares them.

* `Duet's`: `train_student` on a store.
* `Trainer`: that of transformers as it comes (with its fused AdamW), with a `compute_loss` that takes the model's logits
  [B, T, V] and from these the ids of the supervised positions.
* `DistillKit's`: a plain loop with what its loss does, a gather of [B, T, K] ids from all logits and a mask, and with the
  fused AdamW that it gets from the Trainer. Its own loss is a divergence, its loop the Trainer's: both cost more.
Both others have their rows in memory, in the order in which Duet reads them, padded to the longest of a batch.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import on_one_core, reset_peak, status_mb

from duet.cache.location import Folder
from duet.cache.reader import Rank, Store
from duet.cache.record import prompt_and_response
from duet.cache.watch import Watch
from duet.stages.models.alignment import align
from duet.stages.models.loading import load_model
from duet.stages.settings.student import TrainSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.losses import TopK, huber_raw
from duet.stages.student.ranks import Processes
from duet.stages.student.train import open_stores, train_student

ONE = Processes(Rank(), torch.device("cpu"))
OWN = "Duet's"  # beside the other sides
BATCH = 16
LR = 1e-4
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Done(Exception):
    """Enough steps were measured."""


class Meter:
    """Seconds from the end of each step to that of the next, losses, and memory after the first step."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.start_s = self.resident_mb = 0.0  # until the end of the first step, and then
        self._last = time.perf_counter()

    def step(self, loss: float) -> None:
        """A step has ended; raises Done after the last."""
        spent = time.perf_counter() - self._last
        self.losses.append(loss)
        if len(self.losses) == 1:
            self.start_s = spent
            reset_peak()
            self.resident_mb = status_mb("VmRSS")
        else:
            self.seconds.append(spent)
        if len(self.losses) == self.num_steps:
            raise Done
        self._last = time.perf_counter()

    def report(self) -> dict[str, Any]:
        peak_mb = status_mb("VmHWM")
        memory = {"peak MB": peak_mb, "working MB": peak_mb - self.resident_mb}
        return {"losses": self.losses, "seconds": self.seconds, **memory}


def step_settings(dtype: str) -> TrainSettings:
    return TrainSettings(
        loss="huber_raw", epochs=1, batch_size=BATCH, lr=LR, warmup=0, decay="constant", dtype=DTYPES[dtype]
    )  # fmt: skip


def measured(
    opened: tuple[dict[str, Store], Any], model_dir: Path, settings: TrainSettings, folder: Path, meter: Meter
) -> Meter:
    """A training by Duet, broken off after the meter's steps."""
    job = StudentJob("s", model_dir, "start", Path(tempfile.mkdtemp(dir=folder)), settings)
    with suppress(Done):
        train_student(job, *opened, ONE, Watch(on_progress=lambda report: meter.step(report.loss)))
    return meter


def duet(folder: Path, dtype: str, meter: Meter) -> None:
    measured(
        open_stores({"teacher": Folder(folder / "store")}, verify=True),
        folder / "model",
        step_settings(dtype),
        folder,
        meter,
    )


def trainer(folder: Path, dtype: str, meter: Meter) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    losses: list[torch.Tensor] = []

    class FullLogits(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:  # pyright: ignore
            batch_N1, at_N1 = inputs["batch_index_N"][:, None], inputs["position_N"][:, None]
            logits_NK = model_logits(model, inputs)[batch_N1, at_N1, inputs["ids_NK"]].float()
            loss = huber_raw(TopK(logits_NK), TopK(inputs["logits_NK"]), 1.0).mean()
            losses.append(loss.detach())
            return loss

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step(losses.pop().item())

    arguments = TrainingArguments(
        tempfile.mkdtemp(dir=folder), max_steps=meter.num_steps, per_device_train_batch_size=BATCH, learning_rate=LR,
        lr_scheduler_type="constant", bf16=dtype == "bf16", use_cpu=True, train_sampling_strategy="sequential",
        remove_unused_columns=False, dataloader_pin_memory=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model, rows = load_model(folder / "model", "float32").train(), list(rows_in_order(folder, meter.num_steps))
    with suppress(Done):
        FullLogits(model, arguments, collate, rows, callbacks=[Ends()]).train()  # pyright: ignore


def plain(folder: Path, dtype: str, meter: Meter) -> None:
    model, rows = load_model(folder / "model", "float32").train(), rows_in_order(folder, meter.num_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    with suppress(Done):
        while batch := collate(list(itertools.islice(rows, BATCH))):
            places = batch["batch_index_N"], batch["position_N"]
            mask_BT = torch.zeros(batch["input_ids_BT"].shape)
            ids_BTK, teacher_BTK = (
                values.new_zeros(*mask_BT.shape, values.shape[-1]) for values in (batch["ids_NK"], batch["logits_NK"])
            )
            mask_BT[places], ids_BTK[places], teacher_BTK[places] = 1.0, batch["ids_NK"], batch["logits_NK"]
            with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext():
                logits_BTK = model_logits(model, batch).gather(-1, ids_BTK).float()
            loss = (huber_raw(TopK(logits_BTK), TopK(teacher_BTK), 1.0) * mask_BT).sum() / mask_BT.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss = loss.item()  # the graph is let go of
            meter.step(loss)


def model_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids_BT"], attention_mask=batch["attention_mask_BT"], use_cache=False).logits


def rows_in_order(folder: Path, num_steps: int) -> Iterator[tuple[np.ndarray, ...]]:
    """(prompt, response, ids, logits) of each row as Duet reads them."""
    store = Store(Folder(folder / "store"))
    for _, block in itertools.islice(store.batches(store.order(0), BATCH), num_steps):
        rows = block.decoded()
        for row, (first, end) in enumerate(itertools.pairwise(rows.position_offsets)):
            yield *prompt_and_response(rows, row), rows.topk_ids_NK[first:end], rows.topk_logits_NK[first:end]


def collate(rows: list[tuple[np.ndarray, ...]]) -> dict[str, torch.Tensor]:
    """Padded to the longest row."""
    prompts, responses, ids, logits = zip(*rows, strict=True)
    ids_NK, logits_NK = np.concatenate(ids).astype(np.int64), np.concatenate(logits).astype(np.float32)
    teacher = {"ids_NK": torch.from_numpy(ids_NK), "logits_NK": torch.from_numpy(logits_NK)}
    return vars(align(prompts, responses, 0)) | teacher


SIDES: dict[str, Callable[[Path, str, Meter], None]] = {OWN: duet, "Trainer": trainer, "DistillKit's": plain}


def run_side(side: str, folder: Path, dtype: str, num_steps: int) -> dict[str, Any]:
    """What a side's meter reports, from a process of its own."""
    command = [sys.executable, __file__, side, str(folder), dtype, str(num_steps)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(side: str, folder: str, dtype: str, num_steps: str) -> None:
    on_one_core()
    torch.set_num_threads(1)
    meter = Meter(int(num_steps))
    SIDES[side](Path(folder), dtype, meter)
    print(json.dumps(meter.report()))


if __name__ == "__main__":
    main(*sys.argv[1:])
