"""Train a student on exported teacher logits in a loop of your own: transformers, torch and `import duet`.

    duet cache export runs/lab/teacher/*/ lab-parquet --format parquet
    python examples/plain_loop.py lab-parquet lab/models/base student

It takes the losses, the alignment and the output head of Duet; order, schedule and checkpoints are its own. On the rows of
the same steps, tests hold its losses to those of `duet distill`.

Shapes: N supervised positions of a batch, K kept ids.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duet


def read_rows(export: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of a Parquet export by their ids."""
    return {row["row_id"]: row for row in pq.read_table(Path(export, "data")).to_pylist()}


def shuffled(rows: dict[str, Any], batch_size: int, epochs: int, seed: int = 0) -> Iterable[list[str]]:
    """Ids of the rows of every step."""
    draw = random.Random(seed)
    for _ in range(epochs):
        names = draw.sample(list(rows), len(rows))
        yield from (names[first : first + batch_size] for first in range(0, len(names), batch_size))


def collate(rows: Sequence[dict[str, Any]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Padded sequences, the places of their supervised positions, and the teacher's ids and logits there."""
    if "draws" in rows[0]:
        raise duet.UserError(
            "the ids of this store were drawn (teacher.ids: sampled)", "export a store of the likeliest ids"
        )
    batch = duet.align([row["prompt"] for row in rows], [row["response"] for row in rows], pad_id)
    ids_NK = torch.from_numpy(np.concatenate([np.array(row["ids"]) for row in rows])).long()
    values_NK = torch.from_numpy(np.concatenate([np.array(row["logits"], np.float32) for row in rows]))
    return vars(batch) | {"ids_NK": ids_NK, "values_NK": values_NK}


def loss_of_batch(
    model: Any, head: duet.Head, inputs: dict[str, torch.Tensor], num_positions: int | None = None
) -> torch.Tensor:
    """The paper's loss summed over the positions, divided by their number, or by that of all parts of a larger batch."""
    places = duet.AlignedBatch(**{name: inputs[name] for name in duet.AlignedBatch.__dataclass_fields__})
    seen = duet.student_at(model, head, places, inputs["ids_NK"])
    loss_N = duet.loss_of("huber_raw")(duet.TopK(seen.logits_NK), duet.TopK(inputs["values_NK"]))
    return loss_N.sum() / (num_positions or len(loss_N))


def train(model: Any, rows: dict[str, dict[str, Any]], steps: Iterable[Sequence[str]], lr: float) -> list[float]:
    """Train on these rows in this order; the loss of every step."""
    model.train()
    head = duet.Head.of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    losses = []
    for names in steps:
        loss = loss_of_batch(model, head, collate([rows[name] for name in names]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(export: str, start: str, target: str) -> None:
    rows = read_rows(export)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    losses = train(model, rows, shuffled(rows, batch_size=16, epochs=30), lr=3e-4)
    print(f"loss of the first step {losses[0]:.4g}, of the last {losses[-1]:.4g}")
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(Path(export, "duet", "tokenizer")).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
