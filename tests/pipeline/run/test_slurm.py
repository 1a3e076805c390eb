"""Jobs for Slurm as text and on disk. The real thing is test_slurm_cluster.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from command_line import duet
from pydantic import ValidationError
from support import ROOT

from duet.cache.errors import EXIT_DONE, EXIT_USER, UserError
from duet.pipeline.commands.submit import _reason_to_stop, attempt, jobs_of
from duet.pipeline.config.load import load_config
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.slurm import Resources, SlurmSettings
from duet.pipeline.run.slurm import SlurmJob, Submission, check_place, comment_of, largest_array, script

GOLDEN = Path(__file__).parent / "golden"
LAB = str(ROOT / "configs" / "lab.yaml")

CLUSTER = SlurmSettings(
    partition="gpu",
    account="forgetting",
    time="4:00:00",
    flags=("--exclude=node17",),
    setup=("module load cuda/12.6", 'export HF_HOME="$SCRATCH/hf"'),
    workers_at_once=2,
    teacher_logits=Resources(gpus=1, memory="64G"),
    distill=Resources(gpus=4, nodes=2, cpus=8, time="1-12:00:00", flags=("--exclusive",)),
    students={"small": Resources(gpus=1, nodes=1)},
)


def submission(settings: SlurmSettings = CLUSTER) -> Submission:
    program = ("/opt/duet/bin/python", "-m", "duet")
    return Submission(
        RunDir(Path("runs/lab")), settings, Path("runs/lab/slurm/config-1.yaml"), program, "duet-0123456789abcdef"
    )


def check_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("DUET_ACCEPT"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"if the change is meant: DUET_ACCEPT=1 pytest {Path(__file__).name}"
    )


def test_an_array_of_workers_is_as_in_the_golden_file() -> None:
    job = SlurmJob("teacher-logits", ("teacher-logits", "--worker"), CLUSTER.of("teacher_logits"), array=7)
    check_golden("slurm_workers.sh", script(job, submission()))


def test_a_student_on_two_machines_is_as_in_the_golden_file() -> None:
    job = SlurmJob("distill-base", ("distill", "--only", "base"), CLUSTER.of("distill", "base"), ranks=True)
    check_golden("slurm_ranks.sh", script(job, submission()))


def test_a_script_is_valid_shell() -> None:
    for job in (
        SlurmJob("teacher-logits", ("teacher-logits", "--worker"), CLUSTER.of("teacher_logits"), array=7),
        SlurmJob("distill-base", ("distill", "--set", 'topic=it\'s "quoted" $HOME'), CLUSTER.of("distill"), ranks=True),
    ):
        subprocess.run(["bash", "-n"], input=script(job, submission()), text=True, check=True)


def options_of(text: str) -> list[str]:
    """The options of a script as sbatch reads them: it takes quotes away as a shell does."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]


@pytest.mark.parametrize("place", ["two words", "it's", 'so "called"', "100% %A", "a#b", "$HOME `x`", "Zoë"])
def test_odd_characters_of_a_path_reach_sbatch_as_they_are(place: str) -> None:
    of = replace(submission(), run=RunDir(Path(place) / "lab"), config_path=Path(place) / "config.yaml")
    job = SlurmJob("evaluate", ("evaluate", "--config", str(of.config_path)), CLUSTER.of("evaluate"))
    text = script(job, of)
    outputs = [option for option in options_of(text) if option.startswith("--output=")]
    assert outputs == [f"--output={place.replace('%', '%%')}/lab/slurm/logs/evaluate-%j.log"]
    calls = [shlex.split(line) for line in text.splitlines() if "-m duet" in line]
    assert all(str(of.config_path) in words for words in calls)


def test_values_with_spaces_and_signs_are_one_option_each() -> None:
    settings = SlurmSettings(constraint="a100|h100&[big*2]", flags=("--reservation=two words",))
    job = SlurmJob("evaluate", ("evaluate",), settings.of("evaluate"))
    found = options_of(script(job, submission(settings)))
    assert "--constraint=a100|h100&[big*2]" in found
    assert "--reservation=two words" in found
    assert all(option.startswith("--") for option in found)


@pytest.mark.parametrize("place", ["a\nb", "a\\b", "a\rb"])
def test_a_path_that_sbatch_cannot_be_told_is_refused(place: str) -> None:
    with pytest.raises(UserError, match="which Slurm misreads"):
        check_place(Path(place) / "lab")


def test_a_current_directory_that_slurm_would_replace_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "100%A").mkdir()
    monkeypatch.chdir(tmp_path / "100%A")
    with pytest.raises(UserError, match="has a % or a backslash"):
        check_place(Path("runs/lab"))
    check_place(tmp_path / "100%A" / "runs" / "lab")  # absolute, which the script can quote


def test_the_largest_array_is_read_from_what_the_cluster_says() -> None:
    said = "MailProg                = /bin/mail\nMaxArraySize            = 1001\nMaxBatchRequeue         = 5\n"
    assert largest_array(said) == 1001
    assert largest_array("MailProg = /bin/mail\n") is None


def test_the_narrower_settings_win_and_flags_add_up() -> None:
    of_base, of_small = CLUSTER.of("distill", "base"), CLUSTER.of("distill", "small")
    assert (of_base.time, of_base.gpus, of_base.nodes, of_base.partition) == ("1-12:00:00", 4, 2, "gpu")
    assert (of_small.gpus, of_small.nodes, of_small.cpus) == (1, 1, 8)
    assert of_base.flags == ("--exclude=node17", "--exclusive")
    assert CLUSTER.of("finalise") == CLUSTER.of("teacher_logits")
    assert CLUSTER.of("evaluate").time == "4:00:00"


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"partition": "a b"}, "is not one word"),
        ({"time": "soon"}, "is not a time limit"),
        ({"time": 14400}, "valid string"),  # what YAML 1.1 makes of 4:00:00 without quotes
        ({"memory": "much"}, "is not an amount of memory"),
        ({"flags": ["exclusive"]}, "is not an option of sbatch"),
        ({"flags": ["--x\n#SBATCH --y"]}, "is not an option of sbatch"),
        ({"setup": ["a\nb"]}, "has no line break"),
        ({"flags": ["--mail-type=END --mail-user=me"]}, "one option per entry"),
        ({"flags": ["--exclude node17"]}, "one option per entry"),
        ({"flags": ["--comment=mine"]}, "is set by Duet itself"),
        ({"flags": ['--reservation="two words"']}, "quotes or a backslash"),
        ({"setup": ["a\rb"]}, "has no line break"),
        ({"setup": ["#SBATCH --exclusive"]}, "write it in flags"),
        ({"signal_s": 100_000}, "less than or equal to 65535"),
        ({"nodes": 2}, "only students are trained over several machines"),
        ({"teacher_logits": {"nodes": 2}}, "teacher_logits.nodes is 2"),
        ({"workers": 0}, "greater than or equal to 1"),
    ],
)
def test_what_sbatch_would_misread_is_refused(group: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SlurmSettings.model_validate(group)


def test_a_time_needs_quotes_only_where_it_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(Path(LAB).read_text() + "\nslurm:\n  time: 4:00:00\n")
    assert load_config(str(tmp_path / "c.yaml")).slurm.time == "4:00:00"
    with pytest.raises(UserError, match="in quotes"):
        load_config(LAB, ("slurm.time=90",))


def test_a_site_file_fills_in_what_the_config_leaves_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("slurm: {partition: gpu, distill: {gpus: 4}}\nstore: {dir: /shared/stores}\n")
    monkeypatch.setenv("DUET_SITE", str(site))
    config = load_config(LAB, ("slurm.partition=cpu",))
    assert (config.slurm.partition, config.slurm.distill.gpus, config.store.dir) == ("cpu", 4, "/shared/stores")
    monkeypatch.setenv("DUET_SITE", "")
    assert load_config(LAB).slurm == SlurmSettings()


def test_the_site_file_lies_where_other_programs_have_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUET_SITE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load_config(LAB).slurm.qos is None
    (tmp_path / "duet").mkdir()
    (tmp_path / "duet" / "site.yaml").write_text("slurm: {qos: night}")
    assert load_config(LAB).slurm.qos == "night"


@pytest.mark.parametrize(
    "text", ["train: {lr: 1}", "topic: x", "store: {format: zarr}", "store: {dir: /s, values: float16}"]
)
def test_a_site_file_cannot_change_an_experiment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site.yaml").write_text(text)
    monkeypatch.setenv("DUET_SITE", str(tmp_path / "site.yaml"))
    with pytest.raises(UserError, match="is not a default of a site"):
        load_config(LAB)


def test_a_site_file_that_is_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_SITE", "/no/such/file")
    with pytest.raises(UserError, match="names no file"):
        load_config(LAB)


def test_jobs_wait_for_each_other(tmp_path: Path) -> None:
    config = load_config(LAB, (f"runs_dir={tmp_path}", "store.shard_rows=16", "slurm.workers=9"))
    jobs = {job.name: job for job in jobs_of(config, submission(), ("teacher-logits", "distill", "evaluate"))}
    assert list(jobs) == ["teacher-logits", "finalise", "distill-base", "distill-small", "evaluate"]
    assert jobs["teacher-logits"].array == 4  # 60 rows make 4 shards
    assert jobs["finalise"].after == ("teacher-logits",)
    assert not jobs["finalise"].after_ok  # it does what killed workers left
    assert jobs["distill-small"].after == ("finalise",)
    assert jobs["evaluate"].after == ("distill-base", "distill-small")


def test_what_is_done_is_not_submitted(tmp_path: Path) -> None:
    config = load_config(LAB, (f"runs_dir={tmp_path}",))
    (tmp_path / "lab" / "base").mkdir(parents=True)
    (tmp_path / "lab" / "base" / "training.json").write_text("{}")
    names = [job.name for job in jobs_of(config, submission(), ("distill", "evaluate"))]
    assert names == ["distill-small", "evaluate"]


def test_print_shows_the_scripts_and_changes_nothing(tmp_path: Path) -> None:
    done = duet("submit", "--config", LAB, "--set", f"runs_dir={tmp_path}", "--print")
    assert done.code == EXIT_DONE
    assert done.out.count("#!/bin/bash") == 5
    assert "# evaluate, after distill-base and distill-small" in done.out
    assert not list(tmp_path.iterdir())


def test_submitting_without_slurm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    done = duet("submit", "--config", LAB, "--set", f"runs_dir={tmp_path}")
    assert done.code == EXIT_USER
    assert done.err.splitlines() == [
        "error: no squeue here: this machine is not part of a Slurm cluster",
        "hint: log in to one, or run the stages here: duet run",
    ]


def test_a_worker_is_one_teacher(tmp_path: Path) -> None:
    sets = ("--set", f"runs_dir={tmp_path}", "--set", "teacher.data_parallel=2")
    for command in (("submit", "--print"), ("teacher-logits", "--worker")):
        done = duet(*command, "--config", LAB, *sets)
        assert done.code == EXIT_USER
        assert "teacher.data_parallel is 2, which does nothing in a worker" in done.err


def starts(*stands: int) -> list[dict[str, int]]:
    return [{"stands": number} for number in stands]


def test_a_job_that_gets_nowhere_twice_stops() -> None:
    assert _reason_to_stop([], 0, 20) is None
    assert _reason_to_stop(starts(0), 0, 20) is None  # one attempt without progress
    assert _reason_to_stop(starts(0, 0), 0, 20) is not None  # two
    assert _reason_to_stop(starts(0, 0), 1, 20) is None
    assert _reason_to_stop(starts(0, 5, 5), 9, 20) is None
    assert _reason_to_stop(starts(0, 1, 2), 3, 3) is not None  # started often enough


def test_attempts_are_counted_per_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "lab"
    (run_dir / "slurm").mkdir(parents=True)
    settings = load_config(LAB, (f"runs_dir={tmp_path}",)).model_dump(mode="json")
    config = run_dir / "slurm" / "config-1.yaml"
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    attempt(config, "distill-base")
    attempt(config, "distill-base")
    with pytest.raises(UserError, match="two attempts ended where they began"):
        attempt(config, "distill-base")
    kept = json.loads((run_dir / "slurm" / "attempts" / "distill-base.json").read_text())
    assert kept["stopped"] == "two attempts ended where they began"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    attempt(config, "distill-base")
    (run_dir / "base" / "checkpoints" / "step-000000040").mkdir(parents=True)
    attempt(config, "distill-base")
    attempt(config, "distill-base")  # the first that began at step 40 came no further, the second may


def test_the_comment_tells_runs_apart_and_no_path(tmp_path: Path) -> None:
    assert comment_of(tmp_path / "a") != comment_of(tmp_path / "b")
    assert tmp_path.name not in comment_of(tmp_path)
