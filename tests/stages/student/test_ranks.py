"""Several processes (gloo, on a CPU) take the steps that one takes, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from student_jobs import ONE, job, train_student
from support import ROOT

from duet.cache.watch import Watch

SETTINGS = {"epochs": 3, "batch_size": 8, "lr": 1e-3, "checkpoint_steps": 3, "export_dtype": "float32"}


def together(world: int, store, student_dir: Path, stop_after: int = 0, **train) -> list[dict]:
    """Train the student of `student_jobs.job` in `world` processes; the lines of metrics.jsonl."""
    done = launched(world, store, str(student_dir), stop_after, **train)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("interrupted" in done.stdout) == bool(stop_after)
    return [json.loads(line) for line in (student_dir / "metrics.jsonl").read_text().splitlines()]


def launched(world: int, store, student_dir: str, stop_after: int = 0, **train) -> subprocess.CompletedProcess[str]:
    a_job = job(Path(student_dir))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["tests/helpers/ranks.py", str(store[0].location), str(a_job.model_dir), student_dir]
    command += [json.dumps(SETTINGS | train), str(stop_after)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store) -> Path:
    student_dir = tmp_path_factory.mktemp("alone") / "s"
    train_student(job(student_dir, **SETTINGS), {"teacher": store[0]}, store[1], ONE, Watch())
    return student_dir


def assert_same(alone: Path, lines: list[dict], student_dir: Path) -> None:
    """The same curve and the same model, within what summing float32 in another order does."""
    expected = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "loss_forget", "loss_retain", "grad_norm", "lr"):
        assert np.allclose([line[key] for line in lines], [line[key] for line in expected], rtol=1e-4), key
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (student_dir, alone))
    assert ours.keys() == theirs.keys()
    # Adam divides by the root of a square: where a gradient is nearly 0 rounding may turn its sign, and move a weight by lr.
    differences = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert differences.mean() < 1e-5
    assert differences.max() < 2 * len(lines) * SETTINGS["lr"]


@pytest.mark.parametrize(("world", "parallel"), [(2, "ddp"), (3, "ddp"), (2, "fsdp")])
def test_several_processes_take_the_steps_of_one(tmp_path, store, alone, world, parallel):
    lines = together(world, store, tmp_path / "s", parallel=parallel)
    assert_same(alone, lines, tmp_path / "s")
    assert json.loads((tmp_path / "s/training.json").read_text())["processes"] == world


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_interrupted_and_three_go_on(tmp_path, store, parallel):
    """Right after a probe, which leaves FSDP2's weights whole if nothing is done about it."""
    probe = {"probe": {"steps": 2}}
    alone = job(tmp_path / "alone", **SETTINGS, **probe)
    train_student(alone, {"teacher": store[0]}, store[1], ONE, Watch())
    first = together(2, store, tmp_path / "s", stop_after=4, parallel=parallel, **probe)
    whole = len(load_file(tmp_path / "s/checkpoints/step-000000004/model.safetensors"))
    assert len(load_file(tmp_path / "s/checkpoints/step-000000004/optimizer.safetensors")) == 3 * whole
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    lines = together(3, store, tmp_path / "s", parallel=parallel, **probe)
    assert lines[:4] == first
    assert_same(tmp_path / "alone", lines, tmp_path / "s")


def test_adapters_are_trained_by_two_processes_as_by_one(tmp_path, store):
    lora = {"rank": 4, "targets": ["q_proj", "down_proj"]}
    one = job(tmp_path / "one", **SETTINGS, lora=lora)
    train_student(one, {"teacher": store[0]}, store[1], ONE, Watch())
    assert_same(tmp_path / "one", together(2, store, tmp_path / "two", lora=lora), tmp_path / "two")


def test_processes_that_do_not_see_the_same_checkpoint_do_not_go_on(store, tmp_path):
    """A run's directory on each machine's own disk, or a file system that shows late what another machine wrote."""
    folders = str(tmp_path / "{rank}")
    assert launched(2, store, folders, stop_after=4).returncode == 0
    done = launched(2, store, folders)
    assert done.returncode != 0
    assert "step-000000004 is not there on every machine" in done.stderr
    assert not list(tmp_path.glob("*/training.json"))
