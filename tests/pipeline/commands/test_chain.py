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
from duet.pipeline.config.chain import steps_of
from duet.pipeline.config.load import load_config

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


def killed_when(folder: Path, path: str, command: str, pattern: str) -> None:
    """Start the command, and kill it with all its children as soon as such a file is there."""
    process = subprocess.Popen(
        [*PROGRAM, command, "--config", path, "--jobs", "1"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip
    while not any(folder.glob(pattern)) and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, f"it ended before {pattern} was there"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_without_a_chain_there_may_be_several_students_and_no_step():
    config = load_config(str(ROOT / "configs/lab.yaml"))
    assert len(config.students) == 2
    assert steps_of(config) == []


def test_a_chain_killed_anywhere_ends_as_one_that_was_not(config, tmp_path):
    path = config("whole")
    done = run_duet("run", "--config", path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "chain: request zopira, on " in done.stdout
    path = config("killed")
    run = tmp_path / "killed/lab"
    for there in ("base/metrics.jsonl", "chain/zopira/config.yaml", "chain/zopira/base/training.json"):
        killed_when(run, path, "run", there)
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
    assert "the same query is to be kept and to be forgotten" in what
    assert not (tmp_path / "faulty").exists()
    what, hint = refused(capsys, "submit", "--config", config("faulty"))
    assert "a chain of 1 requests after it" in what
    assert "--set chain=[]" in hint


COMPARED = {
    "methods": ["refusal"], "lr_factors": [0.3], "grid": {"refusal": {"lr": [1e-4, 3e-4]}}, "seeds": 2, "validation_share": 0.5,
}  # fmt: skip


def compared(runs: Path) -> dict:
    """What must be the same however often it was killed: what was chosen, and all scores."""
    found = json.loads((runs / "lab/compare.json").read_text())
    for of in (*found["methods"].values(), *(of for step in found["chain"] for of in step["methods"].values())):
        for trial in of["grid"]:
            trial.pop("train_s", None)
    return {key: found[key] for key in ("methods", "models", "comparisons", "outcomes", "chain", "split")}


def test_a_compared_chain_goes_on_from_each_methods_own_models_and_killed_anywhere_ends_the_same(config, tmp_path):
    command = ("compare", "--jobs", "1", "--config")
    done = run_duet(*command, config("whole", compare=COMPARED))
    assert done.returncode == EXIT_DONE, done.stderr
    path = config("killed", compare=COMPARED)
    folder = tmp_path / "killed/lab/compare"
    for there in (
        "duet/*/chain/zopira/config.yaml",
        "chain/zopira/compare/duet/*/candidate.json",
        "refusal/*/candidate.json",
    ):
        killed_when(folder, path, "compare", there)
    done = run_duet(*command, path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "duet, lr" not in done.stdout, "what was chosen before is not chosen again"
    assert compared(tmp_path / "killed") == compared(tmp_path / "whole")
    results = compared(tmp_path / "whole")
    assert [step["request"] for step in results["chain"]] == ["first", "zopira"]
    for step, asked in zip(results["chain"], (["first"], ["first", "zopira"]), strict=True):
        assert list(step["models"]["refusal"]["requests"]) == asked
        assert len(step["models"]["duet"]["requests"]["first"]["rougeL_recall"]["seeds"]) == 2
    assert set(results["chain"][0]["models"]) == {"duet", "refusal"}
    last = results["chain"][1]["models"]["base"]["requests"]["first"]["rougeL_recall"]
    assert last == results["models"]["base"]["first.forget.rougeL_recall"]
    for store in folder.glob("duet/*/chain/zopira/config.yaml"):  # each seed's teacher is that seed's model
        assert load_config(str(store)).teacher.model == str(store.parents[2] / "model")
        assert (store.parents[2] / "model").is_dir()
    assert len(list(folder.glob("duet/*/chain/zopira/teacher/store.json"))) == 2
    cards = [card.read_text() for card in folder.glob("chain/zopira/compare/refusal/*/model/README.md")]
    assert len(cards) == 2
    assert all("refusal, lr" in card for card in cards)


BROAD = {"path": str(ROOT / "lab/data/broad.jsonl"), "id_field": "id", "rows": [0, 6]}
KINDS = {
    "adapters": {"train__lora": {"rank": 4, "save_adapter": True}},
    "wide": {"harden": "wide", "data__broad": {"people": BROAD}, "teacher__max_positions": 4},
    "deep": {"harden": "deep", "data__broad": {"people": BROAD}, "teacher__max_positions": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_adapters_and_of_hardened_students(config, tmp_path, kind):
    """Each student is whole and starts from the last one, whatever it was trained with."""
    done = run_duet("run", "--config", config("chain", **KINDS[kind]))
    assert done.returncode == EXIT_DONE, done.stderr
    first, second = tmp_path / "chain/lab", tmp_path / "chain/lab/chain/zopira"
    resolved = load_config(str(second / "config.yaml"))
    assert resolved.teacher.model == str(first / "base/model")
    assert (resolved.harden, resolved.train.lora is not None) == (KINDS[kind].get("harden", "none"), kind == "adapters")
    summaries = [json.loads((run / "base/training.json").read_text()) for run in (first, second)]
    assert [one["steps"] > 0 for one in summaries] == [True, True]
    assert bool(summaries[1].get("start_noise")) == (kind == "deep")
    assert (second / "base/adapter").is_dir() == (kind == "adapters")
    weights = {(run / "base/model/model.safetensors").read_bytes() for run in (first, second)}
    assert len(weights) == 2
    table = json.loads((first / "chain.json").read_text())
    assert list(table["after"][1]["requests"]) == ["first", "zopira"]
    stores = json.loads((second / "results.json").read_text())["teacher_stores"]
    prefixes = [stores["teacher"][key] for key in ("prefix", "prefix of first")]
    assert [name in prefix for name, prefix in zip(("Bromyx Zopira", "Dugira Duchok"), prefixes, strict=True)] == [
        True
    ] * 2
