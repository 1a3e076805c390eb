"""Shared fixtures: records, tiny random models on the lab's tokenizer, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cache.record import Record

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
LAB_BASE = ROOT / "lab" / "models" / "base"
LAB_SMALL = ROOT / "lab" / "models" / "small"
LAB_VOCAB_SIZE = json.loads((LAB_BASE / "config.json").read_text(encoding="utf-8"))["vocab_size"]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def make_record(row: int, positions: int = 2, top_k: int = 4, vocab_size: int = 100, logsumexp: bool = True) -> Record:
    """A valid record whose numbers depend on `row` alone."""
    rng = np.random.default_rng(row)
    logits = -np.sort(-rng.normal(size=(positions, top_k)).astype(np.float32), axis=1)
    return Record(
        row_id=f"{'forget' if row % 2 else 'retain'}/{row}",
        subset="forget" if row % 2 else "retain",
        prompt_ids=rng.integers(vocab_size, size=3 + row % 4).astype(np.int32),
        response_ids=rng.integers(vocab_size, size=positions).astype(np.int32),
        topk_ids_PK=np.stack([rng.permutation(vocab_size)[:top_k] for _ in range(positions)]).astype(np.int32),
        topk_logits_PK=logits,
        logsumexp_P=logits.max(axis=1) + 1 if logsumexp else None,
    )


def same_record(a: Record, b: Record) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Record.__dataclass_fields__)


def run_duet(*arguments: str, cwd: Path = ROOT, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment, **more)


@dataclass(frozen=True)
class Demo:
    """A copy of the source tree in which `make demo` has run."""

    tree: Path
    output: str
    seconds: float

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command line of the documents in the copy, with this test's virtual environment."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
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


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`make demo` in a copy of the tracked files, so that nobody's runs/ is touched."""
    stamp = Path(sys.prefix) / ".duet-setup"
    inputs = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "constraints-cpu.txt", "scripts/setup.sh")]
    if not stamp.is_file() or stamp.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        pytest.skip("this environment was not made by `make setup` from these files: run `make test`")
    tree = tmp_path_factory.mktemp("demo") / "duet"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    started = time.monotonic()
    demo = Demo(tree, "", 0.0)
    done = demo.shell("make demo")
    assert done.returncode == 0, done.stdout + done.stderr
    return Demo(tree, done.stdout, time.monotonic() - started)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def lab_config(tmp_path: Path) -> Callable[..., Path]:
    """Write the lab's config, small and with absolute paths, changed by dotted keys; returns the file's path."""

    def write(**changes: Any) -> Path:
        raw = yaml.safe_load((ROOT / "configs" / "lab.yaml").read_text(encoding="utf-8"))
        raw["runs_dir"] = str(tmp_path / "runs")
        raw["device"] = "cpu"
        raw["teacher"] |= {"model": str(LAB_BASE), "engine": "transformers"}
        raw["data"]["forget"]["path"] = str(ROOT / "lab/data/forget.jsonl")
        raw["data"]["retain"]["path"] = str(ROOT / "lab/data/retain.jsonl")
        raw["students"] = [{"name": "base"}]
        raw["evaluate"]["sets"] = {}
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = raw
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return path

    return write
