"""Trainings of gpu_steps.py: a random model and a random store, trained by `train_student`, beside `duet estimate`."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from student_loop import LAB, Shape, write_store

from duet.cache.location import Folder
from duet.cache.reader import Rank, Store
from duet.cache.record import counts_of
from duet.cache.watch import Watch
from duet.stages.cost.gpus import device_here
from duet.stages.cost.memory import StudentOnMeta, student_need
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.student import TrainSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.passes import Pass, passes_of
from duet.stages.student.ranks import Processes
from duet.stages.student.targets import mixed
from duet.stages.student.train import open_stores, train_student

# As the config of Llama-3.2-3B has them.
LLAMA_3B = {
    "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500_000.0, "max_position_embeddings": 4096,
}  # fmt: skip
TINY = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def model_of(setting: Any) -> Path:
    """A random model with the lab's tokenizer, in the folder that the steps share; written by the first that needs it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = setting.work / "model"
    if not (folder / "written").is_file():
        config = LlamaConfig(**setting.size(LLAMA_3B, TINY), tie_word_embeddings=True)
        torch.manual_seed(0)
        with setting.device:
            model = LlamaForCausalLM(config).to(torch.bfloat16)  # pyright: ignore
        model.save_pretrained(folder)
        load_tokenizer(LAB / "small").save_pretrained(folder)
        (folder / "written").touch()
    return folder


def store_of(setting: Any) -> Store:
    folder = setting.work / "store"
    if not (folder / "manifest.json").is_file():
        vocab_size = setting.size(LLAMA_3B, TINY)["vocab_size"]
        shape = Shape(vocab_size, setting.size(100, 20), 1, setting.size((48, 96), (8, 16)))
        write_store(folder, LAB / "small", setting.size(200, 16), shape)
    return Store(Folder(folder))


def passes(store: Store, batch_size: int) -> list[Pass]:
    """The passes of the store's first batch."""
    [(_, block)] = itertools.islice(store.batches(store.order(0), batch_size), 1)
    return passes_of(mixed([block], [1.0]), TrainSettings(), 0)


def training(setting: Any, name: str, **train: Any) -> dict[str, Any]:
    """Time, memory and waiting of a whole training, from its training.json, and the estimate of both."""
    started = time.perf_counter()
    store, model_dir = store_of(setting), model_of(setting)
    settings = TrainSettings(epochs=setting.size(10, 2), batch_size=16, lr=1e-5, **train)
    prepared_s = time.perf_counter() - started
    opened, tokenizer = open_stores({"teacher": store.location}, verify=True)
    job = StudentJob("s", model_dir, "random", setting.work / f"student-{name}", settings)
    summary = train_student(job, opened, tokenizer, Processes(Rank(), setting.device), Watch())
    lengths = counts_of(store.block_of(torch.arange(len(store)).numpy()).token_offsets) - 1
    on = device_here(setting.device.type)
    need = student_need(StudentOnMeta.of(model_dir, settings, on, 1, False), lengths, on)
    steps = [json.loads(line) for line in (job.student_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "optimizer": settings.optimizer, "top_k": store.manifest.top_k, "queries": len(store), "steps": summary.steps,
        "parameters": summary.parameters, "trained_parameters": summary.trained_parameters, "head": summary.head,
        "losses_first_last": [steps[0]["loss"], steps[-1]["loss"]], "prepared_s": prepared_s,
        "train_s": summary.train_s, "whole_s": time.perf_counter() - started, "stall_share": summary.stall_share,
        "tokens_per_s": summary.tokens_per_s, "peak_gib": summary.peak_memory_gb * 1e9 / 2**30,
        "estimated_s": need.seconds, "estimated_gib": need.total / 2**30, "estimate_by": on.source,
    }  # fmt: skip
