"""One of several processes that train a student together: `ranks.py STORE MODEL STUDENT_DIR SETTINGS [STOP_AFTER]`.

`{rank}` in STUDENT_DIR becomes the number of the process: a folder on a disk of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from duet.cache.errors import Interrupted
from duet.cache.location import Folder
from duet.cache.reader import Rank
from duet.cache.watch import Watch
from duet.stages.settings.student import TrainSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.ranks import joined
from duet.stages.student.train import open_stores, train_student


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def main(store_dir: str, model_dir: str, student_dir: str, settings: str, stop_after: str = "0") -> None:
    torch.set_num_threads(1)
    folder = Path(student_dir.format(rank=os.environ["RANK"]))
    job = StudentJob("s", Path(model_dir), "start", folder, TrainSettings(**json.loads(settings)))
    steps = 0

    def count(report: object) -> None:
        nonlocal steps
        steps += 1

    rank = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    with joined(rank, torch.device("cpu")) as processes:
        stores, tokenizer = open_stores({"teacher": Folder(Path(store_dir))}, verify=True)
        try:  # only the first process counts steps, and so only it wants to stop; all must
            watch = Watch(on_progress=count, should_stop=lambda: 0 < int(stop_after) <= steps)
            train_student(job, stores, tokenizer, processes, watch)
        except Interrupted:
            print("interrupted")
        threads = num_threads()
    # The threads through which the processes talked have ended: one left would need an interpreter that is ending.
    assert num_threads() < threads


if __name__ == "__main__":
    main(*sys.argv[1:])
