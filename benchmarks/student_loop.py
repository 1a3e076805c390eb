"""What a whole training step costs beside loops that compute all logits, and whether the loop waits for its store.

Part of `student.py`, which prints; the sides of the comparison are in student_sides.py.

A whole step: a random student of 120M parameters (vocabulary 128,256, width 512, 16 layers, head tied to the embeddings,
which are 55% of it; of a larger model they are less, and so is the gain), all of it trained with AdamW in float32, as it
is or under bf16 autocast. 16 rows a step, questions of 16 to 64 tokens, k = 64 ids at 1 or 16 positions each, Huber loss.
All sides must have the same loss after every step, to TOLERANCE, or there are no figures.

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
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import seconds
from store import K, make_rows
from student_sides import BATCH, LR, ONE, OWN, SIDES, Meter, measured, run_side, step_settings

from duet.cache.location import Folder
from duet.cache.plan import Plan
from duet.cache.reader import Store
from duet.cache.record import Rows, counts_of, offsets_of
from duet.cache.watch import Watch
from duet.cache.writer import StoreWriter
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.settings.student import TrainSettings
from duet.stages.settings.teacher import StoreSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.passes import passes_of
from duet.stages.student.targets import mixed
from duet.stages.student.train import open_stores, train_student

ROOT = Path(__file__).parent.parent
LAB = ROOT / "lab" / "models"
STUDENTS = {"lab": LAB / "base", "tofu-lab": ROOT.parent / "shared" / "models" / "tofu-lab"}
TOLERANCE = 1e-3  # relative
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
    rows = make_rows(count * shape.positions, shape.positions, shape.vocab_size, max(K, shape.top_k))
    rng = np.random.default_rng(1)
    lengths = rng.integers(shape.question[0], shape.question[1] + 1, count) + shape.positions
    return replace(
        rows,
        token_offsets=offsets_of(lengths),
        tokens_S=np.exp(rng.uniform(0, np.log(shape.vocab_size), lengths.sum())).astype(np.int32),
        topk_ids_NK=np.ascontiguousarray(rows.topk_ids_NK[:, : shape.top_k]),
        topk_logits_NK=np.ascontiguousarray(rows.topk_logits_NK[:, : shape.top_k]),
    )


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
