"""Fixtures of all tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import LAB_BASE, ROOT, Demo
from warm import use_in_commands

LONGEST = ("test_end_to_end.py", "test_slurm_cluster.py")  # files: begun first, so that no process is left with one

use_in_commands()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


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


@pytest.fixture
def judge_server() -> Iterator[Any]:
    from judge_server import Server

    found = Server()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()
