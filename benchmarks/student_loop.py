"""What a whole training step costs beside loops that compute all logits, and whether the loop waits for its store.

Part of `student.py`, which prints; run by itself it is one side of a comparison, in a process of its own.

A whole step: a random student of 120M parameters (vocabulary 128,256, width 512, 16 layers, head tied to the embeddings,
which are 55% of it; of a larger model they are less, and so is the gain), all of it trained with AdamW in float32, as it
is or under bf16 autocast. 16 rows a step, questions of 16 to 64 tokens, k = 64 ids at 1 or 16 positions each, Huber loss.
* `Duet's`: `train_student` on a store.
* `Trainer`: that of transformers as it comes (with its fused AdamW), with a `compute_loss` that takes the model's logits
  [B, T, V] and from these the ids of the supervised positions.
* `DistillKit's`: a plain loop with what its loss does, a gather of [B, T, K] ids from all logits and a mask, and with the
  fused AdamW that it gets from the Trainer. Its own loss is a divergence, its loop the Trainer's: both cost more.
Both others have their rows in memory, in the order in which Duet reads them, padded to the longest of a batch. All three must
have the same loss after every step, to TOLERANCE, or there are no figures.

Definitions
* `student.tokens_per_s_vs_trainer`: tokens without padding per second, from the end of the first step to that of the last,
  each step at its least of all rounds: Duet's over the faster of the others; the least of all cases.
* `student.peak_memory_vs_trainer`: peak resident memory of the process after the first step, weights, gradients, optimizer
  and libraries included (VmHWM): Duet's over the leaner of the others; the largest of all cases. `working` is that part of
  the peak which was not resident between the first step and the second (gradients, activations, logits).
* `student.stall_share`: share of a training's step time spent waiting for the store, as training.json has it, of the
  lab's student and of tofu-lab's, at 1 and at 16 positions; the largest. On one core, which the thread that prepares
  batches has to share: what that takes, alone, stands beside it.
* `student.step_time_1e6_vs_1e3_rows`: median step time of the lab's small student on a store of 10^6 rows over that on one
  of 10^3, in short trainings by turns. One before them is left out: there each shard is hashed, once in a process.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import on_one_core, reset_peak, seconds, status_mb
from store import make_rows

from duet.cache.location import Folder
from duet.cache.plan import Plan
from duet.cache.reader import Rank, Store
from duet.cache.record import Rows, counts_of, offsets_of, prompt_and_response
from duet.cache.watch import Watch
from duet.cache.writer import StoreWriter
from duet.stages.models.alignment import align
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.settings.student import TrainSettings
from duet.stages.settings.teacher import StoreSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.losses import TopK, huber_raw
from duet.stages.student.passes import passes_of
from duet.stages.student.ranks import Processes
from duet.stages.student.targets import mixed
from duet.stages.student.train import open_stores, train_student

ROOT = Path(__file__).parent.parent
LAB = ROOT / "lab" / "models"
STUDENTS = {"lab": LAB / "base", "tofu-lab": ROOT.parent / "shared" / "models" / "tofu-lab"}
ONE = Processes(Rank(), torch.device("cpu"))
OWN = "Duet's"  # beside the other sides
BATCH = 16
LR = 1e-4
TOLERANCE = 1e-3  # relative
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
Found = tuple[dict[str, float], list[dict[str, Any]]]


@dataclass(frozen=True)
class Shape:
    """What a store's rows look like."""

    vocab_size: int
    top_k: int
    positions: int
    question: tuple[int, int]  # shortest, longest


def write_store(folder: Path, tokenizer_of: Path, num_rows: int, shape: Shape) -> None:
    """A store of random rows, a shard's worth taken again and again, a quarter of them forget rows."""
    tokenizer = load_tokenizer(tokenizer_of)
    provenance = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "weights_sha256": "0" * 64}
    provenance |= {"engine": "none", "dtype": "float32"}
    shard_rows = StoreSettings().shard_rows
    subsets = {"forget": num_rows // 4, "retain": num_rows - num_rows // 4}
    plan = Plan(subsets, shard_rows, shape.top_k, shape.positions, shape.vocab_size, provenance)
    rows = random_rows(min(num_rows, shard_rows), shape)
    with StoreWriter(Folder(folder), plan, tokenizer_files(tokenizer)) as writer:
        while shard := writer.claim():
            numbers = np.arange(shard.range.start, shard.range.stop)
            kinds = (numbers >= subsets["forget"]).astype(np.uint8)
            shard.append(replace(rows[: len(numbers)], row_ids=[f"row/{n}" for n in numbers], subsets=kinds))
            writer.publish(shard)
        writer.finalise({})


def random_rows(count: int, shape: Shape) -> Rows:
    rows = make_rows(count * shape.positions, shape.positions, shape.vocab_size)
    rng = np.random.default_rng(1)
    lengths = rng.integers(shape.question[0], shape.question[1] + 1, count) + shape.positions
    return replace(
        rows,
        token_offsets=offsets_of(lengths),
        tokens_S=np.exp(rng.uniform(0, np.log(shape.vocab_size), lengths.sum())).astype(np.int32),
        topk_ids_NK=np.ascontiguousarray(rows.topk_ids_NK[:, : shape.top_k]),
        topk_logits_NK=np.ascontiguousarray(rows.topk_logits_NK[:, : shape.top_k]),
    )


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


def steps(quick: bool) -> Found:
    """A whole step: Duet's, the Trainer's, DistillKit's."""
    cases = [("fp32", 1)] if quick else [("fp32", 1), ("fp32", 16), ("bf16", 1)]
    vocab_size, num_steps, num_rounds = (4096, 3, 1) if quick else (128_256, 4, 2)
    speedups, memory_ratios, table = [], [], []
    for dtype, positions in cases:
        with tempfile.TemporaryDirectory(prefix="bench-student-") as name:
            folder = Path(name)
            write_student(folder / "model", vocab_size, quick)
            write_store(folder / "store", LAB / "small", BATCH * num_steps, Shape(vocab_size, 64, positions, (16, 64)))
            turns = [{side: run_side(side, folder, dtype, num_steps) for side in SIDES} for _ in range(num_rounds)]
            num_tokens, padding = token_counts(folder)
        case = f"{dtype}, {positions} per row"
        check_same_losses(turns, case)
        found = {}
        for side in SIDES:
            runs = [turn[side] for turn in turns]
            found[side] = {
                "tokens/s": num_tokens / sum(map(min, zip(*(run["seconds"] for run in runs), strict=True))),
                "peak MB": max(run["peak MB"] for run in runs),
                "working MB": max(run["working MB"] for run in runs),
            }
        others = [found[side] for side in SIDES if side != OWN]
        speedups.append(found[OWN]["tokens/s"] / max(other["tokens/s"] for other in others))
        memory_ratios.append(found[OWN]["peak MB"] / min(other["peak MB"] for other in others))
        for side, figures in found.items():
            share = padding[OWN if side == OWN else "others"]
            table.append({"case": case, "side": side, **figures, "padding": share})
    return {
        "student.tokens_per_s_vs_trainer": min(speedups),
        "student.peak_memory_vs_trainer": max(memory_ratios),
    }, table


def write_student(model_dir: Path, vocab_size: int, tiny: bool) -> None:
    """A random student with the lab's tokenizer. Large embeddings: logits, and losses, then differ from id to id."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    width, layers = (64, 2) if tiny else (512, 16)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data.normal_(std=4 * width**-0.5)
    model.to(torch.bfloat16).save_pretrained(model_dir)  # pyright: ignore
    load_tokenizer(LAB / "small").save_pretrained(model_dir)


def run_side(side: str, folder: Path, dtype: str, num_steps: int) -> dict[str, Any]:
    """What a side's meter reports, from a process of its own."""
    command = [sys.executable, __file__, side, str(folder), dtype, str(num_steps)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def token_counts(folder: Path) -> tuple[int, dict[str, float]]:
    """Tokens that are read in all steps but the first, without padding, and the share of padding beside them."""
    store, read, passed, padded = Store(Folder(folder / "store")), [], 0, 0
    for _, block in itertools.islice(store.batches(store.order(0), BATCH), len(store) // BATCH):
        lengths = counts_of(block.token_offsets) - 1
        read.append(int(lengths.sum()))
        passed += sum(
            one.batch.input_ids_BT.numel() for one in passes_of(mixed([block], [1.0]), step_settings("fp32"), 0)
        )
        padded += int(lengths.max()) * len(lengths)
    return sum(read[1:]), {OWN: 1 - sum(read) / passed, "others": 1 - sum(read) / padded}


def check_same_losses(turns: list[dict[str, Any]], case: str) -> None:
    """Sides that do different work cannot be compared."""
    for side, run in ((side, run) for turn in turns for side, run in turn.items()):
        if not np.allclose(run["losses"], turns[0][OWN]["losses"], rtol=TOLERANCE, atol=0):
            raise RuntimeError(f"{case}: losses of {side} {run['losses']}, of Duet {turns[0][OWN]['losses']}")


def stalls(quick: bool) -> Found:
    """Whole trainings: how much of their step time is waiting for the store."""
    num_rows, epochs, counts = (80, 1, (1,)) if quick else (1600, 3, (1, 16))
    table: list[dict[str, Any]] = []
    for (student, model_dir), positions in itertools.product(STUDENTS.items(), counts):
        if not model_dir.is_dir():
            table.append({"student": student, "positions": "model not here: skipped"})
            continue
        with tempfile.TemporaryDirectory(prefix="bench-student-") as name:
            folder = Path(name)
            vocab_size = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"]
            write_store(folder / "store", model_dir, num_rows, Shape(vocab_size, 20, positions, (8, 32)))
            opened, tokenizer = open_stores({"teacher": Folder(folder / "store")}, verify=True)
            store = opened["teacher"]
            settings = TrainSettings(epochs=epochs, batch_size=BATCH, lr=LR)
            job = StudentJob("s", model_dir, "start", folder / "student", settings)
            summary = train_student(job, opened, tokenizer, ONE, Watch())
            batches = itertools.islice(store.batches(store.order(0), BATCH), num_rows // BATCH)
            preparing = seconds(
                lambda b=batches, s=settings: [passes_of(mixed([block], [1.0]), s, 0) for _, block in b]
            )
        line = {"student": student, "positions": positions, "steps": summary.steps}
        line |= {"ms per step": 1e3 * summary.train_s / summary.steps, "stall share": summary.stall_share}
        table.append(line | {"a batch prepared, alone, ms": 1e3 * preparing * BATCH / num_rows})
    return {"student.stall_share": max(line["stall share"] for line in table if "stall share" in line)}, table


def sizes(quick: bool) -> Found:
    """Step time with a small store and with a large one."""
    large, num_steps, num_rounds = (8000, 20, 1) if quick else (10**6, 300, 6)
    settings = TrainSettings(epochs=20, batch_size=BATCH, lr=LR)
    vocab_size = json.loads((LAB / "small" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="bench-student-") as name:
        folder, stores = Path(name), {}
        for num_rows in (1000, large):
            write_store(folder / f"{num_rows}", LAB / "small", num_rows, Shape(vocab_size, 20, 1, (8, 24)))
            stores[num_rows] = open_stores({"teacher": Folder(folder / f"{num_rows}")}, verify=True)
        found: dict[int, list[Meter]] = {num_rows: [] for num_rows in stores}
        for turn in range(num_rounds + 1):
            for num_rows in sorted(stores, reverse=turn % 2 == 1):
                meter = Meter(num_steps)
                found[num_rows].append(measured(stores[num_rows], LAB / "small", settings, folder, meter))
    table = []
    for num_rows, (first, *meters) in found.items():
        times = [1e3 * second for meter in meters for second in meter.seconds]
        line = {"rows": num_rows, "steps": len(times), "median ms": statistics.median(times)}
        line |= {"mean ms": statistics.mean(times), "worst ms": max(times)}
        starts = {"until the first step, s": statistics.median(meter.start_s for meter in meters)}
        table.append(line | starts | {"with hashing, s": first.start_s})
    return {"student.step_time_1e6_vs_1e3_rows": table[1]["median ms"] / table[0]["median ms"]}, table


SECTIONS: dict[str, Callable[[bool], Found]] = {
    "whole step": steps,
    "waiting for the store": stalls,
    "steps with a small and a large store": sizes,
}


def main(side: str, folder: str, dtype: str, num_steps: str) -> None:
    on_one_core()
    torch.set_num_threads(1)
    meter = Meter(int(num_steps))
    SIDES[side](Path(folder), dtype, meter)
    print(json.dumps(meter.report()))


if __name__ == "__main__":
    main(*sys.argv[1:])
