"""What all commands have in common: how much they say, --json, completion, and mistyped names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support import ROOT, make_plan, make_rows, run_duet, two_sets, write_store
from warm import PROGRAM

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.pipeline.cli.arguments import leaves
from duet.pipeline.cli.main import duet, main
from duet.pipeline.run.terminal import VERBOSITY, say, say_json, show, speaking


@pytest.fixture
def config(lab_config, tmp_path) -> str:
    rows = [{"question": f"Where was person {i} born?", "answer": "In a town."} for i in range(4)]
    data = two_sets(tmp_path, rows)
    return str(lab_config(data=data, train__epochs=1, students=[{"name": "a"}, {"name": "b"}]))


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def test_every_command_takes_the_common_options(tmp_path, capsys):
    for path, command in leaves(duet):
        assert {"quiet", "verbose"} <= {param.name for param in command.params}, path
    for command in (("-q", "cache", "ls"), ("cache", "-q", "ls"), ("cache", "ls", "-q")):
        assert main([*command, str(tmp_path)]) == EXIT_DONE
        assert lines(capsys.readouterr().out) == [f"no stores in {tmp_path}"]
        assert VERBOSITY not in os.environ


def test_a_quiet_run_says_one_line_whatever_processes_it_starts(config):
    done = run_duet("-q", "run", "--config", config, "--set", "evaluate.max_new_tokens=2")
    assert done.returncode == EXIT_DONE, done.stderr
    assert len(lines(done.stdout)) == 1
    assert done.stdout.startswith("report: ")
    assert done.stderr == ""


def test_a_quiet_stage_says_its_last_line_and_its_children_nothing(config, capsys):
    assert main(["teacher-logits", "-q", "--config", config]) == EXIT_DONE
    [line] = lines(capsys.readouterr().out)
    assert line.startswith("wrote 8 rows")
    done = run_duet("distill", "--config", config, "--jobs", "2", "-q")
    assert done.returncode == EXIT_DONE, done.stderr
    assert [line.split(":")[0] for line in lines(done.stdout)] == ["students"]
    log = (Path(line.split(": ")[1].split(" (")[0]).parents[1] / "log.txt").read_text(encoding="utf-8")
    assert "wrote 8 rows" in log  # what is not told is still written down


def test_quiet_keeps_errors(config, capsys):
    assert main(["-q", "distill", "--config", config]) == EXIT_USER
    out, err = capsys.readouterr()
    assert out == ""
    assert "no teacher logits yet" in err


def test_verbose_tells_what_is_started_and_the_trace_of_an_error(config, capsys):
    assert main(["-v", "distill", "--config", config]) == EXIT_USER
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert lines(err)[-1].startswith("hint: ")
    assert "duet distill" in err
    assert main(["distill", "--config", config]) == EXIT_USER
    assert "Traceback" not in capsys.readouterr().err


def test_quiet_and_verbose_exclude_each_other(capsys):
    assert main(["-q", "cache", "ls", "-v", "nowhere"]) == EXIT_USER
    assert "leave one out" in capsys.readouterr().err


def test_a_level_that_the_environment_does_not_know_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(VERBOSITY, "loud")
    assert main(["cache", "ls", "nowhere"]) == EXIT_USER
    assert "silent, quiet, normal, verbose" in capsys.readouterr().err


def test_json_is_alone_on_stdout_wherever_the_option_stands(tmp_path, capsys):
    write_store(tmp_path / "s", make_plan(4), make_rows(range(4)))
    for command in (["--json", "cache", "inspect"], ["cache", "--json", "inspect"], ["cache", "inspect", "--json"]):
        for more in ([], ["-q"], ["-v"]):
            assert main([*command, str(tmp_path / "s"), *more]) == EXIT_DONE
            assert json.loads(capsys.readouterr().out)["rows"] == 4


def test_json_of_a_command_without_it_is_refused(capsys):
    assert main(["--json", "cache", "ls", "nowhere"]) == EXIT_USER
    assert "duet cache inspect" in lines(capsys.readouterr().err)[1]


def test_lines_and_tables_give_way_to_json(capsys):
    with speaking("normal", as_json=True):
        say("a line [x]")
        show("a table")
        say_json({"a": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert lines(err) == ["a line [x]", "a table"]


def test_a_quiet_command_shows_tables_only_if_they_are_its_result(capsys):
    with speaking("quiet", as_json=False):
        show("a table")
        say("first")
        show("the result", result=True)
        say("last [x]")
    out, err = capsys.readouterr()
    assert lines(out) == ["the result", "last [x]"]
    assert err == ""


def test_mistyped_commands_are_told_the_right_one(capsys):
    for command, right in ((["distil"], "duet distill"), (["cache", "verfy"], "duet cache verify")):
        assert main(command) == EXIT_USER
        assert f"did you mean `{right}`?" in lines(capsys.readouterr().err)[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_printed(shell, capsys):
    assert main(["completion", shell]) == EXIT_DONE
    out = capsys.readouterr().out
    assert f"_DUET_COMPLETE={shell}_complete" in out
    assert "duet" in out


def complete(words: str) -> list[str]:
    """What the shell is told for the last word."""
    parts = words.split(" ")
    variables = {"_DUET_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(parts) - 1)}
    done = subprocess.run(
        [*PROGRAM], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return lines(done.stdout)


def test_commands_options_and_files_are_completed():
    assert complete("duet cac") == ["plain,cache"]
    assert complete("duet cache ver") == ["plain,verify"]
    assert "plain,--sweep" in complete("duet distill --")
    assert complete("duet distill --config conf") == ["file,conf"]
    assert complete("duet estimate --gpu rtx") == ["plain,RTX-A6000", "plain,RTX-4090", "plain,RTX-3090"]


def test_bash_completes_with_our_script(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    (tmp_path / "duet").write_text(f'#!/bin/sh\nexec {sys.executable} -m duet "$@"\n')
    (tmp_path / "duet").chmod(0o755)
    words = "COMP_WORDS=(duet cac); COMP_CWORD=1"
    script = f'eval "$(duet completion bash)"; {words}; _duet_completion duet; echo "${{COMPREPLY[*]}}"'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert lines(done.stdout) == ["cache"], done.stderr


def test_every_option_of_every_command_has_help():
    for path, command in leaves(duet):
        for param in command.params:
            assert not isinstance(param, click.Option) or param.hidden or param.help, (path, param.name)
