"""Several processes: who each is, what is refused, and that only the first one speaks; and several students at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import LAB_SMALL, ROOT, run_duet, two_sets

from duet.cache.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER, UserError
from duet.pipeline.cli.main import main
from duet.pipeline.run.children import environments_of_children, gpus, last_line, run_jobs
from duet.pipeline.run.directory import StopSignal
from duet.pipeline.run.launch import check_alone, check_launcher, launched

SECOND_OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.fixture
def config(lab_config, tmp_path) -> Path:
    """Two small students and eight queries."""
    rows = [{"question": f"Where was person {i} born?"} for i in range(4)]
    students = [
        {"name": "one", "model": str(LAB_SMALL)},
        {"name": "two", "model": str(LAB_SMALL), "train": {"lr": 1e-3}},
    ]
    return lab_config(data=two_sets(tmp_path, rows), students=students, train__epochs=2, train__batch_size=4)


@pytest.fixture
def stored(config) -> Path:
    assert main(["teacher-logits", "--config", str(config)]) == EXIT_DONE
    return config


def test_who_this_process_is():
    alone = launched({})
    assert (alone.rank.number, alone.rank.world, alone.first, alone.device("cuda")) == (0, 1, True, "cuda:0")
    second = launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (second.rank.number, second.rank.world, second.first) == (3, 4, False)
    assert (second.device("cuda"), second.device("cpu")) == ("cuda:1", "cpu")
    assert launched({"RANK": "3"}).first, "something else's variable"
    with pytest.raises(UserError, match="LOCAL_RANK is ''"):
        launched({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("ACCELERATE_USE_FSDP", "true", "train.parallel"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "train.parallel"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
        ("ACCELERATE_USE_CPU", "True", "device: cpu"),
    ],
)
def test_what_accelerate_was_told_and_duet_would_ignore_is_refused(name, value, setting):
    with pytest.raises(UserError) as caught:
        check_launcher({name: value}, "cuda")
    assert f"{name}={value}" in caught.value.what
    assert setting in caught.value.hint


def test_accelerates_defaults_are_no_reason_to_refuse():
    check_launcher({}, "cuda")
    check_launcher(
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "cuda"
    )
    check_launcher({"ACCELERATE_USE_CPU": "True"}, "cpu")


def test_commands_for_one_process_are_refused_in_several():
    for command in ("teacher-logits", "evaluate", "run"):
        check_alone(command, {})
        with pytest.raises(UserError, match=f"`duet {command}` was started as 2 processes"):
            check_alone(command, SECOND_OF_TWO)


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    # --multi_gpu is how its launcher is told to start several processes at all; on a CPU they are no worse for it
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 29517",
}


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "duet", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_and_only_the_first_speaks(stored, tmp_path, launcher):
    done = launch(launcher, "distill", "--config", str(stored))
    assert done.returncode == EXIT_DONE, done.stderr
    assert "device: cpu x 2 processes" in done.stdout
    for name in ("one", "two"):
        assert done.stdout.count(f"student {name}: trained") == 1
        assert json.loads((tmp_path / f"runs/lab/{name}/training.json").read_text())["processes"] == 2
    assert done.stdout.count("students: ") == 1
    assert "rank 1" not in done.stderr


def test_a_process_that_is_not_the_first_says_who_it_is(config):
    for command in ("teacher-logits", "distill"):
        os.environ |= SECOND_OF_TWO
        try:
            done = run_duet(command, "--config", str(config))
        finally:
            for name in SECOND_OF_TWO:
                del os.environ[name]
        assert done.returncode == EXIT_USER
        assert done.stdout == ""
        lines = done.stderr.strip().splitlines()
        assert [line.split(": ")[:2] for line in lines] == [["rank 1", "error"], ["rank 1", "hint"]]


def test_jobs_train_students_at_a_time_and_compare_them(stored, tmp_path):
    sweep = ("--sweep", "train.top_k=2,4", "--only", "one")
    done = run_duet("distill", "--config", str(stored), *sweep, "--jobs", "2")
    assert done.returncode == EXIT_DONE, done.stderr
    assert "2 students at a time" in done.stdout
    assert done.stdout.count("store: ") == 1
    names = ["one-top_k2", "one-top_k4"]
    for name in names:
        assert done.stdout.count(f"student {name}: trained 4 steps") == 1
        assert re.search(f"^{name} ", done.stdout, re.M), "a row of the table"
    found = json.loads((tmp_path / "runs/lab/students.json").read_text())["students"]
    assert [student["name"] for student in found] == names
    again = run_duet("distill", "--config", str(stored), *sweep, "--jobs", "2")
    assert again.stdout.count("was done already") == 2, again.stderr
    # another command, without the sweep, adds to the run
    assert main(["distill", "--config", str(stored), "--only", "two"]) == EXIT_DONE
    found = json.loads((tmp_path / "runs/lab/students.json").read_text())["students"]
    assert [student["name"] for student in found] == ["two", *names]


def test_jobs_are_refused_in_several_processes(config, capsys, monkeypatch):
    for name, value in {**SECOND_OF_TWO, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["distill", "--config", str(config), "--jobs", "2"]) == EXIT_USER
    assert "--jobs 2 does nothing in 2 processes" in capsys.readouterr().err


def test_each_job_gets_a_gpu_or_its_share_of_the_cores(monkeypatch):
    assert gpus(2, {}) == ["0", "1"]
    assert gpus(2, {"CUDA_VISIBLE_DEVICES": "4,GPU-ab"}) == ["4", "GPU-ab"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments_of_children(3, ["4", "7"], {})] == ["4", "7", "4"]
    teachers = environments_of_children(3, ["4", "7", "8", "9"], {}, each=2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in teachers] == ["4,7", "8,9", "4,7"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 18)))
    assert [place["OMP_NUM_THREADS"] for place in environments_of_children(3, [], {})] == ["2"] * 3
    bound = [place["VLLM_CPU_OMP_THREADS_BIND"] for place in environments_of_children(2, [], {}, each=2)]
    assert bound == ["10,12|11,13", "14,16|15,17"]
    assert environments_of_children(16, [], {})[15] == {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "17"}
    assert environments_of_children(2, [], {"OMP_NUM_THREADS": "7"})[0]["OMP_NUM_THREADS"] == "7"


@pytest.fixture
def stop() -> StopSignal:
    return StopSignal()


def script(text: str) -> Sequence[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{text}"]


def run(commands, num_jobs, stop) -> int:
    return run_jobs(commands, [{"PLACE": str(number)} for number in range(num_jobs)], stop, lambda _: None)


def test_the_first_bad_exit_code_is_returned_and_the_others_still_run(stop, capfd):
    commands = {
        "good": script("print('good at', os.environ['PLACE'])"),
        "bad": script("print('no', file=sys.stderr); sys.exit(3)"),
        "late": script("print('late'); sys.exit(4)"),
    }
    assert run(commands, 1, stop) == 3
    captured = capfd.readouterr()
    assert captured.out == "good at 0\nlate\n"
    assert captured.err == "no\n"


def test_a_killed_child_is_told_and_can_be_gone_on_with(stop, capfd):
    assert run({"a": script("os.kill(os.getpid(), signal.SIGKILL)")}, 1, stop) == EXIT_INTERRUPTED
    assert capfd.readouterr().err == "error: the process of a was killed by SIGKILL\n"


def test_lines_of_children_are_not_mixed(stop, capfd):
    halves = "for _ in range(200): sys.stdout.write('{0}' * 40); sys.stdout.flush(); print('{0}' * 40, flush=True)"
    assert run({name: script(halves.format(name)) for name in "ab"}, 2, stop) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == ["a" * 80] * 200 + ["b" * 80] * 200


def test_bytes_that_are_not_utf8_are_passed_on_and_do_not_stop_a_child(stop, capfd):
    """As a library prints a path in another encoding; the alarm ends a child that waits for someone to read its lines."""
    text = "signal.alarm(60); os.write(2, b'\\xff\\n'); [os.write(2, b'x' * 80 + b'\\n') for _ in range(3000)]"
    assert run({"a": script(text)}, 1, stop) == 0
    assert len(capfd.readouterr().err.splitlines()) == 3001


def test_a_signal_reaches_every_child_and_no_further_one_is_started(stop, tmp_path, capfd):
    """The first child sends the parent the signal once the second is there too."""
    waits = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open('{folder}/{name}', 'w').close()\n"
    until_both = "while not all(map(os.path.exists, ('{folder}/a', '{folder}/b'))): time.sleep(0.01)\n"
    tells = waits + until_both + "os.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()"
    commands = {
        "a": script(tells.format(folder=tmp_path, name="a")),
        "b": script((waits + "while True: signal.pause()").format(folder=tmp_path, name="b")),
        "c": script("print('started')"),
    }
    assert run(commands, 2, stop) == EXIT_INTERRUPTED
    assert capfd.readouterr().out == ""


def test_the_last_whole_line_of_the_metrics_is_what_the_bar_shows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) is None
    path.write_text("")
    assert last_line(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_line(path) == {"step": 2}
