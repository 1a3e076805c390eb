"""One of several processes that load students in parts: `spread_students.py MODEL SETTINGS…`, each a JSON object.

An entry `noise` of the settings is the start's share of noise. The first process prints a line for each: the most memory of its
own that any process held while it loaded, in bytes beyond what it had, and the names of weights that differ from a model that
was loaded whole.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from duet.cache.reader import Rank
from duet.stages.settings.student import TrainSettings
from duet.stages.student import ranks
from duet.stages.student.job import StudentJob
from duet.stages.student.model import Student, load_trainable, trained
from duet.stages.student.noise import damage
from duet.stages.student.ranks import Processes, joined, on_first


def own_bytes() -> int:
    """Memory of this process alone: neither what is mapped from a file nor what was freed and is kept for later."""
    ctypes.CDLL(None).malloc_trim(0)
    [found] = re.findall(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return 1024 * int(found)


def main(model_dir: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    held: list[int] = []
    spread_one = ranks.fully_shard

    def noting(module: torch.nn.Module, **more: Any) -> Any:
        held.append(own_bytes())  # while this layer is whole
        return spread_one(module, **more)

    ranks.fully_shard = noting
    rank = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    with joined(rank, torch.device("cpu")) as processes:
        for text in jobs:
            raw = json.loads(text)
            noise = raw.pop("noise", 0.0)
            settings = TrainSettings(parallel="fsdp", **raw)
            job = StudentJob("s", Path(model_dir), "start", Path("unused"), settings, start_noise=noise)
            held.clear()
            before = own_bytes()
            student = Student.of(job, "huber_raw", 0, processes)
            most = processes.tell([max(*held, own_bytes()) - before]).max().item()
            differing = unlike_whole(student, job, processes)
            if processes.first:
                print(json.dumps({"bytes": most, "parameters": student.num_parameters, "differing": differing}))


def unlike_whole(student: Student, job: StudentJob, processes: Processes) -> list[str]:
    """Names of weights that are not, bit for bit, those of the same model loaded whole in one process."""
    found = {name: on_first(parameter.detach(), processes) for name, parameter in student.model.named_parameters()}
    if not processes.first:
        return []
    whole = load_trainable(job.model_dir, job.start_name, job.settings, torch.float32, False, uniform=True)
    expected = dict(whole.named_parameters())
    if job.start_noise:
        damage(expected, job.start_noise, job.settings.seed)
    assert trained(student.model).keys() == trained(whole).keys()
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


if __name__ == "__main__":
    main(*sys.argv[1:])
