"""`duet run` on a chain of requests: each is a run, all earlier ones are asked again, killed anywhere it ends the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import refused
from support import ROOT, run_duet
from warm import PROGRAM

from duet.cache.errors import EXIT_DONE

FORGET = str(ROOT / "lab/data/forget.jsonl")


def lines(first: int, count: int = 2) -> dict:
    return {"path": FORGET, "id_field": "id", "rows": [first, first + count]}


@pytest.fixture
def config(lab_config, tmp_path):
    """Two requests of two questions each, asked as they are."""

    def made(name: str, **changes) -> str:
        settings = {
            "topic": "Dugira Duchok", "data__forget": lines(0), "data__retain__rows": [0, 6], "train__epochs": 3,
            "train__batch_size": 4, "train__checkpoint_steps": 2, "evaluate__attacks": [], "evaluate__likelihood": False,
            "evaluate__control_model": None, "runs_dir": str(tmp_path / name),
            "chain": [{"name": "zopira", "topic": "Bromyx Zopira", "forget": lines(5)}],
        }  # fmt: skip
        return str(lab_config(**(settings | changes)))

    return made


def numbers(runs: Path) -> dict[str, bytes]:
    """What must be the same however often it was killed: weights and scores of both runs, and the chain's own table."""
    found = {}
    for run in (runs / "lab", runs / "lab/chain/zopira"):
        found[f"{run.name} weights"] = (run / "base/model/model.safetensors").read_bytes()
        found[f"{run.name} scores"] = json.loads((run / "results.json").read_text())["models"]
    return found | {"chain": json.loads((runs / "lab/chain.json").read_text())}


def killed_when(there: Path, path: str) -> None:
    """Start the run, and kill it with all its children as soon as a file is there."""
    process = subprocess.Popen(
        [*PROGRAM, "run", "--config", path], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
    )  # fmt: skip
    while not there.exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, f"it ended before {there} was there"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_chain_killed_anywhere_ends_as_one_that_was_not(config, tmp_path):
    path = config("whole")
    done = run_duet("run", "--config", path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "chain: request zopira, on " in done.stdout
    path = config("killed")
    run = tmp_path / "killed/lab"
    for there in (
        run / "base/metrics.jsonl",
        run / "chain/zopira/config.yaml",
        run / "chain/zopira/base/training.json",
    ):
        killed_when(there, path)
    done = run_duet("run", "--config", path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "run lab is done, and nothing that it was made of has changed since" in done.stdout
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    results = json.loads((run / "chain/zopira/results.json").read_text())
    assert list(results["models"]) == ["base", "teacher", "student:base"]  # against the first base, no base of its own
    assert list(results["sets"]) == ["forget", "first.forget", "retain"]
    table = json.loads((run / "chain.json").read_text())
    assert [row["request"] for row in table["after"]] == ["first", "zopira"]
    assert list(table["after"][1]["requests"]) == ["first", "zopira"]
    again = run_duet("run", "--config", path)
    assert again.stdout.count("nothing that it was made of has changed since") == 2


def test_a_fault_of_a_later_request_is_found_before_the_first(config, capsys, tmp_path):
    faulty = [{"name": "kept", "topic": "X", "forget": {"path": str(ROOT / "lab/data/retain.jsonl"), "rows": [0, 2]}}]
    what, _ = refused(capsys, "run", "--config", config("faulty", chain=faulty))
    assert "questions of the set 'retain' are to be kept, and those of 'forget' are to be forgotten" in what
    assert not (tmp_path / "faulty").exists()
    what, hint = refused(capsys, "submit", "--config", config("faulty"))
    assert "a chain of 1 requests after it" in what
    assert "--set chain=[]" in hint
