"""Train a student whose process is killed with signal 9 again and again.

Each life is a fork of this process, which has imported everything and computed nothing. Prints at how many lines of metrics
each kill hit; a kill counts only if it hit a living process.

Call: `kills.py STORE MODEL STUDENT_DIR SETTINGS KILLS SEED`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 what each life would import again

from duet.cache.location import Folder
from duet.cache.reader import Rank
from duet.cache.watch import Watch
from duet.stages.settings.student import TrainSettings
from duet.stages.student.job import StudentJob
from duet.stages.student.ranks import Processes
from duet.stages.student.summary import is_trained
from duet.stages.student.train import open_stores, train_student


def live(store_dir: str, job: StudentJob) -> None:
    torch.set_num_threads(1)
    stores, tokenizer = open_stores({"teacher": Folder(Path(store_dir))}, verify=True)
    train_student(job, stores, tokenizer, Processes(Rank(), torch.device("cpu")), Watch())


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def main(store_dir: str, model_dir: str, student_dir: str, settings: str, kills: str, seed: str) -> None:
    job = StudentJob("s", Path(model_dir), "start", Path(student_dir), TrainSettings(**json.loads(settings)))
    rng, left = random.Random(int(seed)), int(kills)
    while not is_trained(job.student_dir):
        child = os.fork()
        if child == 0:
            try:
                live(store_dir, job)
            finally:
                os._exit(0)
        if left:  # at some moment of the life: while it loads, at a step, while it saves
            metrics = job.student_dir / "metrics.jsonl"
            wanted = num_lines(metrics) + rng.randrange(12)
            while num_lines(metrics) < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            time.sleep(rng.random() * 0.03)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            left -= 1
            print(num_lines(job.student_dir / "metrics.jsonl"), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
