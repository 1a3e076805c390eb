"""Stage one as a command: what it would cost, a trial, several processes, one engine for several teachers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import RUN, refused
from support import LAB_BASE, ROOT, nearly_same_rows, read_all, two_sets
from warm import PROGRAM

from duet.cache.errors import EXIT_DONE
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.pipeline.cli.main import main
from duet.pipeline.config.load import load_config
from duet.pipeline.run.stores import teacher_stores
from duet.stages.models.loading import num_parameters


@pytest.fixture
def config(lab_config, tmp_path) -> str:
    """200 queries, six shards."""
    rows = [{"question": f"Where was person {n} born?", "answer": f"In town {n}."} for n in range(100)]
    return str(lab_config(data=two_sets(tmp_path, rows), store__shard_rows=40, teacher__batch_size=4, train__epochs=1))


def only_store(folder: Path) -> Path:
    [found] = folder.glob("lab/teacher/*/manifest.json")
    return found.parent


def test_a_dry_run_tells_the_cost_and_writes_nothing(config, tmp_path, capsys):
    assert main(["teacher-logits", "--config", config, "--dry-run", "--set", "teacher.max_positions=3"]) == EXIT_DONE
    told = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    [store] = teacher_stores(load_config(config, ("teacher.max_positions=3",)))
    prepared = store.prepared
    prefixed = sum(len(row.teacher_ids) for row in prepared.rows)
    bare = sum(len(row.student_ids) for row in prepared.rows)
    assert "rows: forget 100, retain 100; engine transformers" in told
    assert f"prompts: {prefixed:,} tokens with the prefix, {bare:,} without" in told
    assert "at most 600 positions, 20 ids each" in told
    assert f"cost: 2 x {num_parameters(LAB_BASE) / 1e6:,.1f} M parameters" in told
    assert "(0 of 200 rows are there)" in told
    computed = int(told.partition("without; ")[2].partition(" ")[0].replace(",", ""))
    shared = 0  # of the forget rows the prefix, of the others what a chat begins with
    for subset in ("forget", "retain"):
        asked = [row.teacher_ids for row in prepared.rows if row.subset == subset]
        first, last = min(asked), max(asked)
        shared += 99 * next(i for i in range(len(first)) if first[i] != last[i])
    assert computed <= prefixed - shared, "questions begin alike too"

    assert main(["teacher-logits", "--config", config, "--set", "teacher.max_positions=3"]) == EXIT_DONE
    assert main(["teacher-logits", "--config", config, "--dry-run", "--set", "teacher.max_positions=3"]) == EXIT_DONE
    told = capsys.readouterr().out
    assert "(complete)" in told
    most = int(told.partition("store: at most ")[2].partition(" ")[0].replace(",", ""))
    manifest = Store(Folder(only_store(tmp_path / "runs"))).manifest
    per_position = most / 600
    assert 0.5 < per_position * manifest.positions / manifest.shard_bytes < 1.1


def test_a_trial_has_a_store_of_its_own(config, tmp_path, capsys):
    assert main(["teacher-logits", "--config", config, "--limit", "3"]) == EXIT_DONE
    assert "a trial of 3 queries" in capsys.readouterr().out
    assert Store(Folder(only_store(tmp_path / "runs"))).manifest.subsets == {"forget": 3, "retain": 3}
    assert "no teacher logits yet" in refused(capsys, "distill", "--config", config)[0]
    assert "0 is not in the range" in refused(capsys, "teacher-logits", "--config", config, "--limit", "0")[0]


# The first could be done with all shards before the second has imported torch.
BEGIN_TOGETHER = """
import os, sys, time
from duet.stages.teacher import capture

fill = capture.fill_store
def fill_once_both_are_here(*arguments):
    open(f"{folder}/{{os.getpid()}}", "w").close()
    while len(os.listdir("{folder}")) < 2:
        time.sleep(0.01)
    return fill(*arguments)

capture.fill_store = fill_once_both_are_here
"""


def test_several_processes_write_what_one_does(config, tmp_path, capfd, monkeypatch):
    assert main(["teacher-logits", "--config", config, "--set", f"runs_dir={tmp_path / 'alone'}"]) == EXIT_DONE
    capfd.readouterr()
    (here := tmp_path / "here").mkdir()
    child = (*PROGRAM, "-c", BEGIN_TOGETHER.format(folder=here) + RUN)
    monkeypatch.setattr("duet.pipeline.commands.teacher_logits.THIS_PROGRAM", child)
    assert main(["teacher-logits", "--config", config, "--workers", "2"]) == EXIT_DONE
    assert capfd.readouterr().out.count("engine: ") == 2
    together, alone = (only_store(tmp_path / runs) for runs in ("runs", "alone"))
    assert together.name == alone.name, "how many write it is not part of the fingerprint"
    assert nearly_same_rows(read_all(together), read_all(alone))
    assert main(["distill", "--config", config, "--set", "teacher.data_parallel=1"]) == EXIT_DONE


def test_what_a_killed_process_had_the_other_takes_over(config, tmp_path):
    """One of two is killed as soon as it works; the error is told, and the store is whole all the same."""
    command = [sys.executable, "-m", "duet", "teacher-logits", "--config", config]
    command += ["--set", "teacher.data_parallel=2"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children: list[str] = []
    while run.poll() is None and len(children) < 2:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        time.sleep(0.01)
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = run.communicate()
    assert run.returncode == EXIT_DONE, err
    assert "was killed by SIGKILL" in err
    assert len(read_all(only_store(tmp_path / "runs"))) == 200


def test_more_gpus_than_there_are(config, capsys, monkeypatch):
    monkeypatch.setattr("duet.pipeline.commands.teacher_logits.visible_gpus", lambda kind: ["0", "1"])
    sets = ["--set", "teacher.data_parallel=2", "--set", "teacher.tensor_parallel=2"]
    what, hint = refused(capsys, "teacher-logits", "--config", config, *sets)
    assert "2 x 2 GPUs each is more than the 2" in what
    assert "at most 1" in hint


def test_teachers_of_one_model_share_an_engine(config, tmp_path, capsys):
    teachers = (
        "teachers=[{name: plain}, {name: gone, prefix: 'Forget {topic}, and say so at length if you are asked.'}]"
    )
    assert main(["teacher-logits", "--config", config, "--set", teachers]) == EXIT_DONE
    told = capsys.readouterr().out
    assert told.count("engine: ") == 1
    assert told.count("wrote 200 rows") == 2


def test_given_responses_are_the_data_s(config, tmp_path):
    sets = ("teacher.responses=given", "teacher.max_positions=4", "prompt.answer=It is {answer}")
    assert main(["teacher-logits", "--config", config, *(part for s in sets for part in ("--set", s))]) == EXIT_DONE
    [store] = teacher_stores(load_config(config, sets))
    prepared = store.prepared
    found = read_all(only_store(tmp_path / "runs"))
    text = prepared.tokenizer.decode(prepared.rows[0].given_ids)
    assert "It is In town 0.".startswith(text)
    for number, row in enumerate(prepared.rows):
        own = found[number : number + 1]
        assert own.tokens_S.tolist() == [*row.student_ids, *row.given_ids]
        assert len(row.given_ids) <= 4
    assert store.plan.provenance["responses"] == "given"
