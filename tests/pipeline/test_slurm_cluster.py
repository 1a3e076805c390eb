"""`duet submit` on a real Slurm: two nodes on this machine, whose daemons these tests start and end.

Runs where Debian's slurm-wlm and munge are installed and the tests are root's; skips elsewhere and says why.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import yaml
from conftest import LAB_BASE, LAB_SMALL, ROOT, nearly_same_rows, read_all, run_duet

from cache.places import Folder

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
    done = run_duet("status", str(run_dir), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def submit(config: Path, *more: str) -> dict[str, str]:
    """Ids of the jobs that were submitted, by name."""
    done = run_duet("submit", "--config", str(config), *more)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\S+): job (\d+)", done.stdout, re.M))


def states(job_id: str) -> dict[str, str]:
    """State by task; empty once Slurm has forgotten the job."""
    shown = slurm("scontrol", "show", "job", job_id, "--oneliner").splitlines()
    found = {}
    for line in shown:
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        found[fields.get("ArrayTaskId", "")] = fields["JobState"]
    return found


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
    # The student "small" trains for longer than its job may run: a minute is the least that Slurm can be asked for.
    students = [{"name": "base"}, {"name": "small", "model": str(LAB_SMALL), "train": {"epochs": 110}}]
    resources = {"signal_s": 40, "workers": 3, "students": {"small": {"time": "1"}}}
    run_dir = tmp_path / "runs" / "disturbed"
    ids = submit(experiment("disturbed", students=students, slurm=resources))
    assert list(ids) == ["teacher-logits", "finalise", "distill-base", "distill-small", "evaluate"]
    workers = ids["teacher-logits"]

    def shards_done() -> int:
        return len(list((run_dir / "teacher").glob("*/shard-*.json")))

    until("three workers at work", lambda: list(states(workers).values()).count("RUNNING") == 3)
    until("first shards", lambda: shards_done() >= 3)
    slurm("scancel", "--signal=KILL", f"{workers}_2")
    victim = re.search(r"NodeList=(n\d)", slurm("scontrol", "show", "job", f"{workers}_0", "--oneliner"))
    assert victim is not None, "the first worker had ended before it could be preempted"
    slurm("sbatch", "--partition=high", "--output=/dev/null", f"--nodelist={victim[1]}", "--ntasks=2", "--wrap=true")
    until("the killed worker's end", lambda: states(workers)["2"] not in ("RUNNING", "COMPLETING"))
    until("the end of all", lambda: not slurm("squeue", "--noheader").strip() or None)

    assert len(starts(run_dir, "teacher-logits-0")) >= 2, logs(run_dir, "teacher-logits")  # preempted, started again
    attempts = starts(run_dir, "distill-small")
    assert len(attempts) >= 2, logs(run_dir, "distill-small")  # ran into its time limit, was queued again
    assert attempts[1]["stands"] > 0  # and went on from where it was
    assert (run_dir / "results.json").is_file(), logs(run_dir, "evaluate")
    found = status(run_dir)
    assert [store["complete"] for store in found["stores"]] == [True]
    assert all(student["done"] for student in found["students"])

    # Nothing was computed twice but what was in flight: of each disturbed worker a shard or two.
    written = [
        int(rows)
        for rows in re.findall(r"wrote (\d+) rows", logs(run_dir, "teacher-logits") + logs(run_dir, "finalise"))
    ]
    assert sum(written) <= 240
    assert submit(tmp_path / "disturbed.yaml") == {}  # all of it is done

    local = experiment("local", students=students)
    for stage in ("teacher-logits", "distill"):
        done = run_duet(stage, "--config", str(local))
        assert done.returncode == 0, done.stderr
    [ours], [theirs] = (
        [path.parent for path in (tmp_path / "runs" / name / "teacher").glob("*/manifest.json")]
        for name in ("disturbed", "local")
    )
    assert ours.name == theirs.name
    assert nearly_same_rows(read_all(Folder(ours)), read_all(Folder(theirs)))
    for name in ("base", "small"):
        trained = [
            json.loads((tmp_path / "runs" / run / name / "training.json").read_text()) for run in ("disturbed", "local")
        ]
        assert trained[0]["steps"] == trained[1]["steps"]
        assert trained[0]["curve"][-1][1] == pytest.approx(trained[1]["curve"][-1][1], rel=0.05)
