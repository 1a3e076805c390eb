"""What tests share: rows and stores, tiny random models on the lab's tokenizer, and the command line in a process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import warm

from duet.cache.leases import Clock
from duet.cache.location import Folder, Location
from duet.cache.manifest import Manifest
from duet.cache.plan import Plan
from duet.cache.reader import Store
from duet.cache.record import Rows, concat_rows
from duet.cache.writer import StoreWriter

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
LAB_BASE = ROOT / "lab" / "models" / "base"
LAB_SMALL = ROOT / "lab" / "models" / "small"
LAB_ORACLE = ROOT / "lab" / "models" / "oracle"
LAB_VOCAB_SIZE = json.loads((LAB_BASE / "config.json").read_text(encoding="utf-8"))["vocab_size"]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch is imported: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
os.environ["DUET_SITE"] = ""  # no defaults of whoever's machine this is
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does
hypothesis.settings.register_profile("duet", deadline=None)  # no timed assertions
hypothesis.settings.load_profile("duet")


def make_rows(
    numbers: Iterable[int],
    positions: int | None = 2,
    top_k: int = 4,
    vocab_size: int = 100,
    logsumexp: bool = True,
    forget: int = 0,
) -> Rows:
    """Valid rows whose content depends on their numbers alone; those below `forget` are of the forget set.

    `positions` None means one to three, by number. Logits are exact in float16.
    """
    parts = []
    for number in numbers:
        rng = np.random.default_rng([number, vocab_size])
        count = positions or 1 + number % 3
        logits = -np.sort(-rng.normal(size=(count, top_k)).astype(np.float16).astype(np.float32), axis=1)
        num_tokens = 3 + number % 4 + count
        parts.append(
            Rows(
                row_ids=[f"{'forget' if number < forget else 'retain'}/{number}"],
                subsets=np.array([number >= forget], np.uint8),
                token_offsets=np.array([0, num_tokens]),
                tokens_S=rng.integers(vocab_size, size=num_tokens).astype(np.int32),
                position_offsets=np.array([0, count]),
                topk_ids_NK=np.stack([rng.permutation(vocab_size)[:top_k] for _ in range(count)]).astype(np.int32),
                topk_logits_NK=logits,
                logsumexp_N=logits.max(axis=1) + 1 if logsumexp else None,
            )
        )
    return concat_rows(parts)


def with_broad(plan: Plan, rows: Rows, count: int) -> tuple[Plan, Rows]:
    """The same, but for the last `count` rows, of the retain set so far, which are broad."""
    subsets = {**plan.subsets, "retain": plan.subsets["retain"] - count, "broad": count}
    kept = len(rows) - count
    row_ids = [*rows.row_ids[:kept], *(f"broad/{number}" for number in range(count))]
    kinds = np.where(np.arange(len(rows)) < kept, rows.subsets, 2).astype(np.uint8)
    return replace(plan, subsets=subsets), replace(rows, row_ids=row_ids, subsets=kinds)


def same_rows(a: Rows, b: Rows) -> bool:
    names = [name for name in Rows.__dataclass_fields__ if name != "row_ids"]
    return list(a.row_ids) == list(b.row_ids) and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def nearly_same_rows(a: Rows, b: Rows) -> bool:
    """The same but for rounding: in other company than before, an engine rounds a row's logits otherwise."""
    near = [np.abs(getattr(a, name) - getattr(b, name)).max() < 1e-3 for name in ("topk_logits_NK", "logsumexp_N")]
    return all(near) and same_rows(replace(a, topk_logits_NK=b.topk_logits_NK, logsumexp_N=b.logsumexp_N), b)


def make_plan(rows: int = 10, forget: int = 0, **more: Any) -> Plan:
    """A plan for rows as `make_rows` makes them."""
    settings = {"shard_rows": 4, "top_k": 4, "max_positions": 3, "vocab_size": 100, "provenance": {"k": 4}}
    return Plan(subsets={"forget": forget, "retain": rows - forget}, **(settings | more))


def write_store(
    location: Location | Path, plan: Plan, rows: Rows, attachments: dict[str, bytes] | None = None
) -> Manifest:
    """Write a whole store, alone."""
    location = Folder(location) if isinstance(location, Path) else location
    with StoreWriter(location, plan, attachments) as writer:
        while shard := writer.claim():
            shard.append(rows[shard.range.start : shard.range.stop])
            writer.publish(shard)
            writer.wait()
        return writer.finalise({"python": "3"})


class FakeClock(Clock):
    """A file server's clock that we set; it begins at the real time, where new directories are."""

    def __init__(self) -> None:
        self.time = time.time()

    def now(self) -> float:
        return self.time

    def stamp(self, path: Path) -> None:
        os.utime(path, (self.time, self.time))


def read_all(location: Location | Path) -> Rows:
    """All rows in plan order."""
    return concat_rows(list(Store(Folder(location) if isinstance(location, Path) else location).rows()))


def flip_byte(path: Path, at: int | None = None, mask: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= mask
    path.write_bytes(raw)


@contextmanager
def small_disk(folder: Path, size_kb: int) -> Iterator[Path]:
    """A file system of that size, which only root can mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run_duet(*arguments: str, cwd: Path = ROOT, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run([*warm.PROGRAM, *arguments], cwd=cwd, capture_output=True, text=True, check=False, **more)


@dataclass(frozen=True)
class Demo:
    """A copy of the source tree in which `make demo` has run."""

    tree: Path
    output: str
    seconds: float

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command line of the documents in the copy, with this test's virtual environment.

        Its `duet` needs no start of an interpreter; that of the Makefile's targets does.
        """
        quick = self.tree.parent / "bin" / "duet"
        quick.parent.mkdir(exist_ok=True)
        quick.write_text(f'#!/bin/sh\nexec {shlex.join(warm.PROGRAM)} "$@"\n', encoding="utf-8")
        quick.chmod(0o755)
        path = os.pathsep.join([str(quick.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS", "CONFIG")  # of the `make test` that runs this, not ours
        environment = {key: value for key, value in os.environ.items() if key not in outer}
        environment |= {"PATH": path, "VENV": sys.prefix}
        return subprocess.run(
            command, shell=True, cwd=self.tree, env=environment, capture_output=True, text=True, check=False
        )

    @property
    def run_dir(self) -> Path:
        return self.tree / "runs" / "lab"

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "results.json").read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def two_sets(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The group `data` of a config: these questions are to be forgotten, the same about another person to be kept."""
    kept = [row | {"question": row["question"].replace("person", "another person")} for row in rows]
    paths = {"forget": write_jsonl(folder / "forget.jsonl", rows), "retain": write_jsonl(folder / "retain.jsonl", kept)}
    return {name: {"path": str(path)} for name, path in paths.items()}
