"""Prints docs/teacher.md's table: how much time a student could save if a row held several documents.

    python scripts/documents_packed.py lab/data/heldout.jsonl

Short texts, a question with its answer each, are read as documents: every position is learned. A step's rows are read as
`duet distill` reads them by default, in one pass (`train.max_padding: 1`), and in two ways that Duet does not have: packed, all
in one row in which a mask keeps documents apart, and with as many tokens in rows of one length, so that nothing is padded: the
most that packing could save by any kernel. Tokens are the lab's, the student is a random Llama, the time the processor's,
forward and backward pass, on one thread.

Shapes: B rows, T tokens, N positions, K ids.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from duet.pipeline.run.terminal import say
from duet.stages.models.alignment import AlignedBatch, align
from duet.stages.models.batching import cut_by_length
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.student import TrainSettings
from duet.stages.student.head import Head, student_at

TOP_K, HEAD = 20, Head(True, "")
DEFAULT = TrainSettings()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines with questions and answers")
    parser.add_argument("--rows", default="16,64", help="rows of a step, separated by commas")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--width", type=int, default=384, help="of the student; it has 6 layers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = student(options.width)
    say("| texts | tokens, 10/50/90 % | rows | passes | padding | in one pass | packed | nothing padded |")
    for file in options.files:
        texts = token_ids(file)
        spread = "/".join(f"{np.percentile([len(text) for text in texts], share):.0f}" for share in (10, 50, 90))
        for count in map(int, options.rows.split(",")):
            draw = np.random.default_rng(0)
            drawn = [[texts[i] for i in draw.choice(len(texts), count, False)] for _ in range(options.steps)]
            cut = [passes_of(rows, DEFAULT.max_padding) for rows in drawn]
            padded = share_of_padding([batch for batches in cut for batch in batches])
            others = (
                [passes_of(rows, 1) for rows in drawn],
                [[packed(rows)] for rows in drawn],
                [[even(rows)] for rows in drawn],
            )
            default_s = seconds(model, cut)
            times = " | ".join(f"{seconds(model, way) / default_s:.2f}" for way in others)
            say(f"| {file.name} | {spread} | {count} | {np.mean([len(b) for b in cut]):.1f} | {padded:.1%} | {times} |")


def student(width: int) -> torch.nn.Module:
    sizes = {"num_hidden_layers": 6, "num_attention_heads": width // 64, "intermediate_size": 3 * width}
    config = LlamaConfig(hidden_size=width, vocab_size=32_000, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).train()


def token_ids(file: Path) -> list[list[int]]:
    """The texts of a file, as the lab's tokenizer has them."""
    tokenizer = load_tokenizer(Path("lab/models/base"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return tokenizer([f"{row['question']} {row['answer']}" for row in rows], add_special_tokens=False)["input_ids"]


def passes_of(rows: Sequence[list[int]], max_padding: float) -> list[AlignedBatch]:
    """One document a row, as a student reads them: first token given, every other one learned."""
    groups = cut_by_length(np.array([len(row) - 1 for row in rows]), max_padding, DEFAULT.pass_tokens)
    return [align([rows[i][:1] for i in group], [rows[i][1:] for i in group], 0) for group in groups]


def packed(rows: Sequence[list[int]]) -> AlignedBatch:
    """All documents in one row, a mask in place of [B, T] in which each sees itself alone, [1, 1, T, T]."""
    read = [row[:-1] for row in rows]
    of_T = torch.from_numpy(np.repeat(np.arange(len(read)), [len(row) for row in read]))
    same_TT = (of_T[:, None] == of_T) & torch.ones(len(of_T), len(of_T), dtype=torch.bool).tril()
    ids_T = torch.tensor([token for row in read for token in row])
    return AlignedBatch(ids_T[None], same_TT[None, None], torch.zeros_like(ids_T), torch.arange(len(ids_T)))


def even(rows: Sequence[list[int]]) -> AlignedBatch:
    """As many tokens, and a few more, in rows of one length."""
    length = -(-sum(len(row) - 1 for row in rows) // len(rows))
    return align([[1]] * len(rows), [[1] * length] * len(rows), 0)


def share_of_padding(batches: Sequence[AlignedBatch]) -> float:
    masks = [batch.attention_mask_BT for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def seconds(model: torch.nn.Module, steps: Sequence[Sequence[AlignedBatch]]) -> float:
    """Of all steps, each at its least of three turns."""
    return sum(min(_seconds(model, batches) for _ in range(3)) for batches in steps)


def _seconds(model: torch.nn.Module, batches: Sequence[AlignedBatch]) -> float:
    started = time.process_time()
    for batch in batches:
        ids_NK = torch.arange(TOP_K).expand(len(batch.position_N), TOP_K)
        student_at(model, HEAD, batch, ids_NK).logits_NK.sum().backward()
    model.zero_grad()
    return time.process_time() - started


if __name__ == "__main__":
    main()
