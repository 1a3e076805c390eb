"""Prints docs/teacher.md's table: which ids a store keeps, and how much of full distillation its student loses.

    python scripts/which_ids.py --folder which --top-k 5 --seeds 0,1

Students of the lab's smaller model learn from the lab's teacher on stores that differ in their ids alone; the first store keeps
the whole vocabulary. Measured is KL(teacher, student) over the whole vocabulary, in nats, at the first token of the answers: to
the questions that the students learn from, and to others, the lab's rephrased and held-out ones.

Shapes: K ids, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet.cache.location import Folder
from duet.cache.reader import Rank, Store
from duet.cache.record import prompt_and_response
from duet.cache.watch import Watch
from duet.pipeline.config.load import load_config
from duet.pipeline.run.stores import teacher_stores
from duet.pipeline.run.terminal import say
from duet.stages.models.loading import load_model
from duet.stages.settings.student import TrainSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.ranks import Processes
from duet.stages.student.train import open_store, train_student
from duet.stages.teacher.capture import write_stores

CONFIG, START = "configs/lab.yaml", Path("lab/models/small")
UNSEEN = ("data.forget.path=lab/data/forget_rephrased.jsonl", "data.retain.path=lab/data/heldout.jsonl")
ALL = "the whole vocabulary"
LOSSES = {  # ids: the losses that students learn them by
    "top_k": ("forward_kl_topk", "forward_kl_tail"),
    "sampled": ("forward_kl_sampled",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, for stores and students")
    parser.add_argument("--top-k", type=int, default=5, help="ids at a position, in both stores")
    parser.add_argument("--seeds", default="0", help="seeds of the trainings, separated by commas")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the store")
    options = parser.parse_args()
    folder, seeds = options.folder, [int(seed) for seed in options.seeds.split(",")]
    plain = written(folder, "teacher.top_k=1")[0]
    every = f"teacher.top_k={plain.manifest.vocab_size}"
    asked = {"learned": written(folder, every)[0], "unseen": written(folder, every, *UNSEEN)[0]}
    rows = ", ".join(f"{len(store)} {name}" for name, store in asked.items())
    say(f"KL in nats on {rows}; mean over seeds {options.seeds} [least, most]\n| ids | loss | learned | unseen |")
    stores = {(ALL, ("forward_kl_tail",)): every} | {
        (f"{options.top_k}, {ids}", losses): f"teacher.top_k={options.top_k} teacher.ids={ids}"
        for ids, losses in LOSSES.items()
    }
    for (name, losses), overrides in stores.items():
        store = written(folder, *overrides.split())
        for loss in losses:
            found = {name: [] for name in asked}
            for seed in seeds:
                student_dir = folder / f"{store[0].manifest.fingerprint[:8]}-{loss}-{seed}"
                settings = TrainSettings(loss=loss, epochs=options.epochs, lr=3e-4, seed=seed)  # pyright: ignore
                job = StudentJob("student", START, "small", student_dir, settings)
                alone = Processes(Rank(), torch.device("cpu"))
                train_student(job, {"teacher": store[0]}, store[1], alone, Watch())
                for where, of in asked.items():
                    found[where].append(np.mean(list(divergences(of, student_dir / "model"))))
            cells = [f"{np.mean(v):.4f} [{min(v):.4f}, {max(v):.4f}]" for v in found.values()]
            say(f"| {name} | `{loss}` | {' | '.join(cells)} |")


def written(folder: Path, *overrides: str) -> tuple[Store, Any]:
    """The store of the lab's teacher with these settings, written or found again, and its tokenizer."""
    config = load_config(CONFIG, ("teacher.engine=transformers", f"store.dir={folder / 'stores'}", *overrides))
    [teacher] = teacher_stores(config)
    [result] = write_stores([teacher], "transformers", Watch())
    assert isinstance(result.location, Folder)
    return open_store(result.location, verify=True)


def divergences(store: Store, model_dir: Path) -> Iterator[float]:
    """KL(teacher, student) over the vocabulary at the first position of each row; the store keeps every id."""
    model = load_model(model_dir, "float32")
    for rows in store.rows():
        for row in range(len(rows)):
            prompt, at = prompt_and_response(rows, row)[0], rows.position_offsets[row]
            with torch.no_grad():
                logits_V = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1].double()
            ids_V = torch.from_numpy(rows.topk_ids_NK[at].astype(np.int64))
            logp_V = torch.from_numpy(rows.topk_logits_NK[at]).double().log_softmax(-1)
            yield float((logp_V.exp() * (logp_V - logits_V[ids_V].log_softmax(-1))).sum())


if __name__ == "__main__":
    main()
