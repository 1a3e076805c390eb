"""One of several processes that train a student together: `ranks.py STORE MODEL STUDENT_DIR SETTINGS [STOP_AFTER]`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from cache.errors import Interrupted
from cache.places import Folder
from cache.reader import Rank
from stages.processes import joined
from stages.settings import TrainSettings
from stages.student import StudentJob, open_stores, train_student


def main(store_dir: str, model_dir: str, student_dir: str, settings: str, stop_after: str = "0") -> None:
    torch.set_num_threads(1)
    job = StudentJob("s", Path(model_dir), "start", Path(student_dir), TrainSettings(**json.loads(settings)))
    steps = 0

    def count(report: object) -> None:
        nonlocal steps
        steps += 1

    rank = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    with joined(rank, torch.device("cpu")) as processes:
        stores, tokenizer = open_stores({"teacher": Folder(Path(store_dir))}, verify=True)
        try:  # only the first process counts steps, and so only it wants to stop; all must
            train_student(job, stores, tokenizer, processes, count, lambda: 0 < int(stop_after) <= steps)
        except Interrupted:
            print("interrupted")


if __name__ == "__main__":
    main(*sys.argv[1:])
