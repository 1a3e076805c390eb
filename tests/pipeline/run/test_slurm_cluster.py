"""`duet submit` on a real Slurm: two nodes on this machine, whose daemons these tests start and end.

Runs where Debian's slurm-wlm and munge are installed and the tests are root's; skips elsewhere and says why.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import yaml
from command_line import duet
from support import LAB_BASE, LAB_SMALL, ROOT, nearly_same_rows, read_all

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.cache.location import Folder

PATIENCE_S = 600


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """SLURM_CONF of a cluster of our own."""
    if fault := slurm_cluster.missing():
        pytest.skip(f"no Slurm cluster can be started here: {fault}")
    directory = Path(tempfile.mkdtemp(prefix="duet-slurm-"))  # munged refuses folders that others cannot enter
    try:
        yield slurm_cluster.up(directory)
    finally:
        slurm_cluster.down(directory)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def _on_cluster(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster))


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def until(what: str, seen: Callable[[], Any]) -> Any:
    """Look until there is something to see; what it was."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := seen()):
        assert time.monotonic() < deadline, f"not seen: {what}\n{slurm('squeue', '--all')}"
        time.sleep(0.3)
    return found


def status(run_dir: Path) -> dict[str, Any]:
    done = duet("status", str(run_dir), "--json")
    assert done.code == EXIT_DONE, done.err
    return json.loads(done.out)


def submit(config: Path, *more: str) -> dict[str, str]:
    """Ids of the jobs that were submitted, by name."""
    done = duet("submit", "--config", str(config), *more)
    assert done.code == EXIT_DONE, done.err
    return dict(re.findall(r"^(\S+): job (\d+)", done.out, re.M))


def shown(job_id: str) -> dict[str, str]:
    """What Slurm knows of a job, or of a task `ID_NUMBER`."""
    return dict(re.findall(r"(\w+)=(\S+)", slurm("scontrol", "show", "job", job_id, "--oneliner")))


def states(job_id: str) -> dict[str, str]:
    """State by task."""
    lines = slurm("scontrol", "show", "job", job_id, "--oneliner").splitlines()
    tasks = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines]
    return {fields.get("ArrayTaskId", ""): fields["JobState"] for fields in tasks}


def starts(run_dir: Path, task: str) -> list[dict[str, Any]]:
    path = run_dir / "slurm" / "attempts" / f"{task}.json"
    return json.loads(path.read_text())["starts"] if path.is_file() else []


def logs(run_dir: Path, name: str) -> str:
    return "".join(path.read_text() for path in sorted((run_dir / "slurm" / "logs").glob(f"{name}*.log")))


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Path]:
    """A config of the lab whose stages take long enough to be disturbed; its settings by dotted keys."""

    def write(name: str, **changes: Any) -> Path:
        raw = yaml.safe_load((ROOT / "configs" / "lab.yaml").read_text(encoding="utf-8"))
        raw |= {"name": name, "runs_dir": str(tmp_path / "runs"), "device": "cpu"}
        raw["teacher"] |= {"model": str(LAB_BASE), "engine": "transformers", "batch_size": 1, "max_positions": 8}
        raw["store"] = {"shard_rows": 8}
        raw["data"]["forget"]["path"] = str(ROOT / "lab/data/forget.jsonl")
        raw["data"]["retain"] = {"path": str(ROOT / "lab/data/heldout.jsonl"), "id_field": "id", "sample": 225}
        raw["students"] = [{"name": "base"}, {"name": "small", "model": str(LAB_SMALL)}]
        raw["train"] |= {"epochs": 2, "checkpoint_steps": 20}
        raw["evaluate"] |= {"sets": {}, "control_model": None}
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = raw
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        return path

    return write


def test_preempted_killed_and_timed_out_it_ends_as_a_local_run_does(
    experiment: Callable[..., Path], tmp_path: Path
) -> None:
    # Long enough for Slurm to find, twice a minute, that a job comes near its time limit.
    students = [{"name": "base"}, {"name": "small", "model": str(LAB_SMALL), "train": {"epochs": 110}}]
    resources = {"signal_s": 150, "workers": 3}
    run_dir = tmp_path / "runs" / "disturbed"
    ids = submit(experiment("disturbed", students=students, slurm=resources))
    assert list(ids) == ["teacher-logits", "finalise", "distill-base", "distill-small", "evaluate"]
    workers = ids["teacher-logits"]

    def shards() -> dict[Path, int]:
        """When each shard was finished."""
        return {path: path.stat().st_mtime_ns for path in (run_dir / "teacher").glob("*/shard-*.json")}

    until("three workers at work", lambda: list(states(workers).values()).count("RUNNING") == 3)
    safe = until("the first shards", lambda: len(shards()) >= 3 and shards())
    slurm("scancel", "--signal=KILL", f"{workers}_2")
    node = shown(f"{workers}_0")["NodeList"]
    slurm("sbatch", "--partition=high", "--output=/dev/null", f"--nodelist={node}", "--ntasks=2", "--wrap=true")
    until("the killed worker's end", lambda: states(workers)["2"] not in ("RUNNING", "COMPLETING"))

    small = ids["distill-small"]
    until("a checkpoint", lambda: list((run_dir / "small" / "checkpoints").glob("step-*")))
    hours, minutes, _ = map(int, shown(small)["RunTime"].split(":"))
    slurm("scontrol", "update", f"JobId={small}", f"TimeLimit={60 * hours + minutes + 2}")
    until("its second start", lambda: shown(small)["Restarts"] == "1")
    slurm("scontrol", "update", f"JobId={small}", "TimeLimit=UNLIMITED")
    until("the end of all", lambda: not slurm("squeue", "--noheader").strip() or None)

    assert len(starts(run_dir, "teacher-logits-0")) >= 2, logs(run_dir, "teacher-logits")  # preempted, started again
    attempts = starts(run_dir, "distill-small")
    assert len(attempts) == 2, logs(run_dir, "distill-small")  # came near its time limit, was queued again
    assert attempts[1]["stands"] > 0  # and went on from where it was
    assert (run_dir / "results.json").is_file(), logs(run_dir, "evaluate")
    found = status(run_dir)
    assert [store["complete"] for store in found["stores"]] == [True]
    assert all(student["done"] for student in found["students"])

    # Nothing that was done was done again.
    assert safe.items() <= shards().items()
    assert submit(tmp_path / "disturbed.yaml") == {}  # all of it is done

    local = experiment("local", students=students)
    for stage in (["teacher-logits"], ["distill", "--only", "base"]):
        done = duet(*stage, "--config", str(local))
        assert done.code == EXIT_DONE, done.err
    [ours], [theirs] = (
        [path.parent for path in (tmp_path / "runs" / name / "teacher").glob("*/manifest.json")]
        for name in ("disturbed", "local")
    )
    assert ours.name == theirs.name
    assert nearly_same_rows(read_all(Folder(ours)), read_all(Folder(theirs)))
    base, alone, resumed = (
        json.loads((tmp_path / "runs" / of / "training.json").read_text())
        for of in ("disturbed/base", "local/base", "disturbed/small")
    )
    assert base["steps"] == alone["steps"]
    assert base["curve"][-1][1] == pytest.approx(alone["curve"][-1][1], rel=0.05)
    # Of the same rows, for 110 epochs instead of 2. test_train.py holds that a student goes on bit for bit.
    assert resumed["steps"] == 110 / 2 * base["steps"]


def test_one_student_over_two_machines(experiment: Callable[..., Path], tmp_path: Path) -> None:
    config = experiment("wide", students=[{"name": "base"}], slurm={"distill": {"nodes": 2}})
    assert duet("teacher-logits", "--config", str(config)).code == EXIT_DONE
    ids = submit(config, "--stage", "distill")
    assert list(ids) == ["distill-base"]
    until("its end", lambda: states(ids["distill-base"])[""] not in ("PENDING", "RUNNING", "COMPLETING"))
    run_dir = tmp_path / "runs" / "wide"
    assert states(ids["distill-base"]) == {"": "COMPLETED"}, logs(run_dir, "distill")
    assert "cpu x 2 processes" in logs(run_dir, "distill")
    assert status(run_dir)["students"][0]["done"]


def test_submitting_twice_is_submitting_once_and_cancel_takes_all_out(
    experiment: Callable[..., Path], tmp_path: Path
) -> None:
    config = experiment("twice", slurm={"flags": ["--hold"]})  # so that nothing runs while we look
    run_dir = tmp_path / "runs" / "twice"
    first = submit(config)
    assert len(first) == 5
    again = duet("submit", "--config", str(config))
    assert again.code == EXIT_DONE
    assert again.out.splitlines()[-1] == "nothing to submit"
    assert again.out.count("in the queue already") == 5
    found = {job["name"]: (job["job_id"], job["state"]) for job in status(run_dir)["jobs"]}
    assert found == {name: (job_id, "PENDING") for name, job_id in first.items()}
    shown = duet("status", str(run_dir)).out
    assert "not begun" in shown
    assert first["distill-small"] in shown
    assert duet("cancel", str(run_dir)).code == EXIT_DONE
    until("an empty queue", lambda: not slurm("squeue", "--noheader").strip() or None)
    assert "no job of" in duet("cancel", str(run_dir)).out
    assert len(submit(config, "--stage", "teacher-logits")) == 2
    assert duet("cancel", str(run_dir)).code == EXIT_DONE


def test_what_slurm_refuses_is_told_in_two_lines(experiment: Callable[..., Path]) -> None:
    done = duet("submit", "--config", str(experiment("refused", slurm={"partition": "nowhere"})))
    assert done.code == EXIT_USER
    what, hint = done.err.splitlines()
    assert "invalid partition specified: nowhere" in what
    assert hint.startswith("hint: ")


def test_an_array_that_is_larger_than_the_cluster_takes_is_refused_before_anything_is_submitted(
    experiment: Callable[..., Path], tmp_path: Path
) -> None:
    most = int(slurm("scontrol", "show", "config").split("MaxArraySize")[1].split()[1])
    many = experiment("many", store__shard_rows=1, slurm={"workers": 9999})  # 240 rows
    done = duet("submit", "--config", str(many))
    assert done.code == EXIT_USER
    error, hint = done.err.splitlines()
    assert f"an array of 240 jobs, this cluster takes {most} (MaxArraySize)" in error
    assert hint == f"hint: set slurm.workers to at most {most}"
    assert not (tmp_path / "runs" / "many" / "slurm").exists()


def test_a_path_of_odd_characters_is_where_the_logs_go(experiment: Callable[..., Path], tmp_path: Path) -> None:
    runs_dir = tmp_path / 'so "called" 100% %A it\'s'
    config = experiment("odd", runs_dir=str(runs_dir), slurm={"workers": 1})
    submit(config, "--stage", "teacher-logits", "--set", "data.forget.rows=[0, 4]", "--set", "data.retain.sample=4")
    run_dir = runs_dir / "odd"
    until("the end of its jobs", lambda: not slurm("squeue", "--noheader"))
    assert status(run_dir)["stores"][0]["complete"], list(runs_dir.rglob("*"))
    assert logs(run_dir, "teacher-logits")


def test_a_stage_whose_work_is_missing_is_not_submitted(experiment: Callable[..., Path]) -> None:
    done = duet("submit", "--config", str(experiment("early")), "--stage", "evaluate")
    assert done.code == EXIT_USER
    assert "no teacher logits yet" in done.err


def test_a_job_that_gets_nowhere_stops_and_status_says_why(experiment: Callable[..., Path], tmp_path: Path) -> None:
    # Each start is told to stop before it can do anything, as by a time limit that is too short.
    stop = "srun() { return 75; }"
    config = experiment("stuck", students=[{"name": "base"}], slurm={"setup": [stop]})
    assert duet("teacher-logits", "--config", str(config)).code == EXIT_DONE
    ids = submit(config, "--stage", "distill")
    until("its end", lambda: states(ids["distill-base"])[""] == "FAILED")
    run_dir = tmp_path / "runs" / "stuck"
    [job] = status(run_dir)["jobs"]
    assert job["reason"] == "two attempts ended where they began"
    assert "slurm.….time" in logs(run_dir, "distill")
    assert "two attempts ended" in duet("logs", str(run_dir), "distill-base").out


def test_submitting_again_brings_a_killed_run_to_its_end(experiment: Callable[..., Path], tmp_path: Path) -> None:
    config = experiment("again", students=[{"name": "base"}], train__epochs=20)
    run_dir = tmp_path / "runs" / "again"
    first = submit(config)
    until("a checkpoint", lambda: list((run_dir / "base" / "checkpoints").glob("step-*")))
    slurm("scancel", "--signal=KILL", first["distill-base"])
    until("an empty queue", lambda: not slurm("squeue", "--noheader").strip() or None)  # evaluate left it, too
    assert not (run_dir / "base" / "training.json").exists(), "it was done before it could be killed"
    second = submit(config)
    assert list(second) == ["distill-base", "evaluate"]
    until("the end", lambda: not slurm("squeue", "--noheader").strip() or None)
    assert starts(run_dir, "distill-base")[0]["stands"] > 0  # it went on
    assert (run_dir / "results.json").is_file(), logs(run_dir, "evaluate")


def test_a_run_has_a_status_where_the_queue_cannot_be_asked(
    experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment("alone", slurm={"flags": ["--hold"]})
    run_dir = tmp_path / "runs" / "alone"
    submit(config, "--stage", "teacher-logits")
    assert duet("cancel", str(run_dir)).code == EXIT_DONE
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # a machine without Slurm that sees the same files
    done = duet("status", str(run_dir), "--json")
    assert done.code == EXIT_DONE, done.err
    assert "no squeue here" in done.err
    assert {job["state"] for job in json.loads(done.out)["jobs"]} == {"UNKNOWN"}
