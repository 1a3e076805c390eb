"""SIGTERM in each stage: exit code 75, a resumable state, and the unbroken run's result after the next call."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from command_line import interrupted
from safetensors.torch import load_file
from support import LAB_SMALL, ROOT, nearly_same_rows, read_all, two_sets
from warm import PROGRAM

from duet.cache.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, Interrupted
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.pipeline.cli.main import main
from duet.pipeline.commands import run
from duet.pipeline.config.selection import Selection
from duet.pipeline.run.directory import StopSignal

# Sends itself a signal when the stage has come so far: no sleep, no race, and the handler is the real one.
STAGE_ONE = """
import os, signal, sys, time
from duet.cache import writer
sync_file = writer.sync_file
writer.sync_file = lambda path: time.sleep(1) or sync_file(path)  # a slow disk: the last shard is still on its way
from duet.stages.engines.transformers_engine import TransformersEngine
stream, rows = TransformersEngine.stream, []
def counted(self, requests, ask):
    for result in stream(self, requests, ask):
        rows.append(result)
        if len(rows) == 10 + {after}:  # the self-test scores ten
            os.kill(os.getpid(), signal.{signal})
        yield result
TransformersEngine.stream = counted
"""
STAGE_TWO = """
import os, signal, sys
from duet.stages.student import loop
step, calls = loop._step, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == {after}:
        os.kill(os.getpid(), signal.{signal})
    return step(*arguments)
loop._step = counted
"""


@pytest.fixture
def config(lab_config, tmp_path) -> Path:
    rows = [{"question": f"Where was person {i} born?", "answer": "In a town."} for i in range(10)]
    data = two_sets(tmp_path, rows)
    students = [{"name": "s", "model": str(LAB_SMALL)}]
    return lab_config(
        data=data, students=students, store__shard_rows=4, teacher__batch_size=1, train__epochs=4, train__batch_size=4
    )


def only_store(runs: Path) -> Store:
    return Store(Folder(next(runs.glob("lab/teacher/*/manifest.json")).parent))


def test_both_stages_stop_resumably_and_go_on_to_the_same_result(config, tmp_path, capsys):
    stages = ("teacher-logits", "distill")
    unbroken = ("--set", f"runs_dir={tmp_path / 'unbroken'}")
    for stage in stages:
        assert main([stage, "--config", str(config), *unbroken]) == EXIT_DONE

    done = interrupted(STAGE_ONE, "teacher-logits", "--config", str(config), after=16)
    assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert done.stderr.splitlines()[-2].startswith("interrupted: 16 of 20 rows")
    assert main(["distill", "--config", str(config)]) == EXIT_USER
    capsys.readouterr()
    assert main(["teacher-logits", "--config", str(config)]) == EXIT_DONE
    assert "wrote 4 rows" in capsys.readouterr().out
    expected, found = only_store(tmp_path / "unbroken"), only_store(tmp_path / "runs")
    assert found.manifest.fingerprint == expected.manifest.fingerprint
    assert nearly_same_rows(read_all(found.location), read_all(expected.location))  # some were scored in other company

    for name, after in (("SIGTERM", 3), ("SIGUSR1", 5)):
        done = interrupted(STAGE_TWO, "distill", "--config", str(config), after=after, name=name)
        assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert "step 8 of 20 is saved" in done.stderr
    assert main(["distill", "--config", str(config)]) == EXIT_DONE
    a, b = (load_file(tmp_path / runs / "lab/s/model/model.safetensors") for runs in ("unbroken", "runs"))
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)  # as near as the two stores are
    assert a.keys() == b.keys()


def test_run_hands_a_signal_to_its_stage(config):
    """`duet run` is told to stop while stage one works: the stage ends with 75 and so does the run."""
    command = [*PROGRAM, "run", "--config", str(config)]
    whole = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert whole.stdout is not None
    assert whole.stdout.readline().startswith("engine: ")  # the stage runs, its handlers are set
    whole.send_signal(signal.SIGTERM)
    _, err = whole.communicate()
    assert whole.returncode == EXIT_INTERRUPTED, err
    assert "interrupted: " in err


def test_a_stage_that_was_killed_is_told(monkeypatch):
    """By the system where memory is short, for example; the stage itself can say nothing."""
    monkeypatch.setattr(run, "THIS_PROGRAM", ("sh", "-c", "kill -9 $$"))
    with pytest.raises(Interrupted, match="the process of distill was killed by SIGKILL"):
        run.run_stage("distill", Selection("x.yaml"), StopSignal())
