"""Writers of one store as real processes, killed at random moments. A program of its own: it forks, so it has one thread.

    python storm.py FOLDER FORMAT KILLS SEED

Rounds of about four writers at once, each killed after a random time, go on until so many kills have hit a writer at
work; a store that gets complete is followed by another, FOLDER/0, FOLDER/1 and so on. Prints {"kills", "stores", "rounds"}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from support import make_plan, make_rows

from duet.cache.location import Folder
from duet.cache.manifest import MANIFEST_NAME
from duet.cache.plan import Plan
from duet.cache.writer import StoreWriter

SHARDS, SHARD_ROWS = 80, 3
ROWS = make_rows(range(SHARDS * SHARD_ROWS), positions=None, forget=100)
FILES = {"tokenizer/t.json": b"{}", "tokenizer/u.json": b"[]"}
LONGEST_LIFE_S = 0.25


def plan_of(fmt: str) -> Plan:
    return make_plan(len(ROWS), 100, shard_rows=SHARD_ROWS, format=fmt)


def write(folder: Path, fmt: str) -> None:
    """One writer's whole life, beside others."""
    with StoreWriter(Folder(folder), plan_of(fmt), FILES) as writer:
        while writer.missing():
            shard = writer.claim()
            if shard is None:
                time.sleep(0.01)
                continue
            shard.append(ROWS[shard.range.start : shard.range.stop])
            writer.publish(shard)
        writer.finalise({"python": "3"}, wait_s=0.01)


def fork_writer(folder: Path, fmt: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        write(folder, fmt)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def round_of(folder: Path, fmt: str, lives: list[float]) -> int:
    """Start a writer per life, kill each at its end; the number of those that were still at work."""
    start = time.monotonic()
    writers = [(start + life, fork_writer(folder, fmt)) for life in lives]
    killed = 0
    for end, pid in sorted(writers):
        time.sleep(max(0.0, end - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
        elif status:
            raise SystemExit("a writer failed")
    return killed


def storm(root: Path, fmt: str, kills: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    done, rounds, stores, writers = 0, 0, 1, 4
    while done < kills:
        if (root / str(stores - 1) / MANIFEST_NAME).exists():
            stores += 1
        lives = [rng.uniform(0, LONGEST_LIFE_S) for _ in range(min(writers, kills - done))]
        done += round_of(root / str(stores - 1), fmt, lives)
        rounds, writers = rounds + 1, rng.randint(1, 7)
    for number in range(stores):
        if os.waitpid(fork_writer(root / str(number), fmt), 0)[1]:
            raise SystemExit("the last writer failed")
    return {"kills": done, "stores": stores, "rounds": rounds}


if __name__ == "__main__":
    print(json.dumps(storm(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
