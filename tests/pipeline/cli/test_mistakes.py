"""What a new user gets wrong, and what is said about it: two lines, of which the second leads on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import LAB_BASE, ROOT, two_sets, write_jsonl

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.cache.files import sync_file
from duet.pipeline.cli.main import main


@dataclass
class Desk:
    """A directory with a sound config, whose paths a mistake may spoil."""

    path: Path
    config: str

    def file(self, name: str, text: str) -> str:
        (self.path / name).write_text(text, encoding="utf-8")
        return str(self.path / name)

    def set(self, *overrides: str, command: str = "teacher-logits") -> list[str]:
        return [command, "--config", self.config, *(part for text in overrides for part in ("--set", text))]

    def run_with(self, name: str, more: str) -> list[str]:
        """A run with the sound config and `more` below it."""
        return ["run", "--config", self.file(name, Path(self.config).read_text(encoding="utf-8") + more)]

    def edited(self, old: str, new: str) -> list[str]:
        text = Path(self.config).read_text(encoding="utf-8")
        assert old in text
        return ["run", "--config", self.file("edited.yaml", text.replace(old, new))]


@pytest.fixture
def desk(lab_config, tmp_path, monkeypatch) -> Desk:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = [{"question": f"Where was person {i} born?", "answer": "In a town."} for i in range(3)]
    return Desk(tmp_path, str(lab_config(data=two_sets(tmp_path, rows), train__epochs=1)))


def csv(text: str) -> Callable[[Desk], list[str]]:
    return lambda desk: desk.set(f"data.forget.path={desk.file('x.csv', text)}")


MISTAKES: dict[str, tuple[Callable[[Desk], list[str]], str, str]] = {
    # the config
    "mistyped key": (lambda d: d.edited("epochs:", "epohcs:"), "unknown key train.epohcs", "did you mean epochs?"),
    "mistyped --set": (lambda d: d.set("train.epohcs=3"), "unknown key train.epohcs", "did you mean epochs?"),
    "mistyped group": (lambda d: d.set("trian.epochs=3"), "unknown key trian", "did you mean train?"),
    "key without group": (lambda d: d.set("epochs=3"), "unknown key epochs", "did you mean train.epochs?"),
    "--set without =": (lambda d: d.set("train.epochs"), "not of the form key=value", "--set train.lr=1e-5"),
    "--set out of range": (lambda d: d.set("train.lr=-1"), "--set train.lr=-1: train.lr", "lr is peak"),
    "text for a number": (lambda d: d.set("train.epochs=many"), "found 'many'", "epochs is passes over the store"),
    "a truth value for a number": (
        lambda d: d.set("teacher.top_k=yes"), "teacher.top_k: found true, expected a number", "top_k is ",
    ),
    "truth values for numbers": (
        lambda d: d.set("train.seeds=[yes, 1]"), "train.seeds: found [true, 1], expected a number", "seeds is ",
    ),
    # the evaluation's files
    "no retrained model's results": (
        lambda d: d.set("evaluate.membership={members: forget, nonmembers: retain, retrained: gone.json}", command="run"),
        "evaluate.membership.retrained: no such file: gone.json", "name the results.json",
    ),
    "no config": (lambda d: ["run"], "Missing option '--config'", "`duet init` writes one"),
    "config as argument": (lambda d: ["run", d.config], "Missing option '--config'", "duet run --config FILE"),
    "mistyped config": (lambda d: ["run", "--config", d.config[:-6] + ".yaml"], "no such config", "config.yaml?"),
    "no such config": (lambda d: ["run", "--config", "zzz"], "no such config file", "`duet init` writes one"),
    "config is a directory": (lambda d: ["run", "--config", str(d.path)], "is a directory", "config.yaml"),
    "config is data": (lambda d: ["run", "--config", str(d.path / "forget.jsonl")], "file of questions", "duet init"),
    "config is weights": (lambda d: ["run", "--config", str(LAB_BASE / "model.safetensors")], "not UTF-8 text", "duet init"),
    "empty config": (lambda d: ["run", "--config", d.file("e.yaml", "# nothing\n")], "is empty", "duet init"),
    "list as config": (lambda d: ["run", "--config", d.file("l.yaml", "- a\n")], "found list", "configs/lab.yaml"),
    "no YAML": (lambda d: ["run", "--config", d.file("b.yaml", "a: 1\nb: [c\n")], "line 3, column 1", "quotes"),
    "key twice": (lambda d: d.run_with("c.yaml", "\nname: again\n"), "the key 'name' occurs twice", "keep one of the two"),
    "half a character": (lambda d: d.set('topic="\\ud83d"'), "half of a surrogate pair", "the whole character"),
    "no as a text": (lambda d: d.set("topic=no"), "valid string, found False", "in quotes"),
    "pointer as config": (
        lambda d: ["run", "--config", d.file("p.yaml", "version https://git-lfs.github.com/spec/v1\n")],
        "Git LFS pointer",
        "git lfs pull",
    ),
    "a place that cannot be written": (lambda d: d.set("runs_dir=/sys/runs"), "cannot read or write /sys/runs", "runs_dir"),
    # the data
    "no answers, before stage one": (
        lambda d: d.set(f"data.forget.path={write_jsonl(d.path / 'x.jsonl', [{'question': 'Who?'}])}", command="run"),
        "no field 'answer'",
        "data.forget.answer_field",
    ),
    "forgotten and kept": (
        lambda d: d.set(f"evaluate.sets.more={{path: {d.path}/forget.jsonl, expect: kept}}", command="run"),
        "3 questions of the set 'more' are to be kept, and those of 'forget' are to be forgotten",
        "out of one of the two",
    ),
    "no data file": (lambda d: d.set("data.forget.path=zzz.jsonl"), "no such file: zzz.jsonl", "hf://OWNER/NAME"),
    "mistyped data file": (lambda d: d.set(f"data.forget.path={d.path}/forgte.jsonl"), "no such file", "forget.jsonl?"),
    "other fields": (
        lambda d: d.set(f"data.forget.path={write_jsonl(d.path / 'x.jsonl', [{'q': 'Who?'}])}"),
        "no field 'question'; it has 'q'",
        "data.forget.question_field",
    ),
    "semicolons": (csv("question;answer\nWho?;Ann.\n"), "separated by semicolons", "separate them by commas"),
    "other columns": (csv("q,answer\nWho?,Ann.\n"), "line 1: the header has no column 'question'", "question_field"),
    "comma in a cell": (csv("question,answer\nWho, then?,Ann.\n"), "line 2 has 3 cells", "must stand in quotes"),
    "empty file": (lambda d: d.set(f"data.forget.path={d.file('x.jsonl', '')}"), "has no rows", "at least one question"),
    "empty CSV": (csv(""), "has no rows", "at least one question"),
    "directory as data": (lambda d: d.set(f"data.forget.path={d.path}"), "is a directory", "forget.jsonl, retain.jsonl"),
    "a text file": (lambda d: d.set(f"data.forget.path={d.file('x.txt', 'Who?')}"), "unknown kind", ".csv"),
    "too few to sample": (lambda d: d.set("data.forget.sample=9"), "9 rows wanted, 3 are there", "sample to at most 3"),
    # the model
    "mistyped model": (lambda d: d.set(f"teacher.model={LAB_BASE}e"), "no such directory", f"did you mean {LAB_BASE}?"),
    "folder of models": (lambda d: d.set(f"teacher.model={LAB_BASE.parent}"), "no config.json", str(LAB_BASE)),
    "file as model": (lambda d: d.set(f"teacher.model={LAB_BASE}/config.json"), "is a file", "OWNER/NAME"),
    "name without owner": (lambda d: d.set("teacher.model=gpt2"), "no such directory: gpt2", "a hub id is OWNER/NAME"),
    "hub id offline": (lambda d: d.set("teacher.model=o/never"), "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    "mistyped {topic}": (lambda d: d.set("teacher.prefix=Forget {topik}."), "has {topik}", "write it {topic}"),
    # the order of things
    "mistyped command": (lambda d: ["distil", "--config", d.config], "No such command 'distil'", "`duet distill`"),
    "mistyped option": (lambda d: [*d.set(), "--dry-rnu"], "No such option", "duet teacher-logits --help"),
    "distill first": (lambda d: d.set(command="distill"), "no teacher logits yet", "run `duet teacher-logits`"),
    "evaluate first": (lambda d: d.set(command="evaluate"), "is not trained", "run `duet distill`"),
    "report first": (lambda d: ["report", str(d.path / "runs/lab")], "no results.json", "`duet evaluate`"),
    "no such student": (lambda d: [*d.set(command="distill"), "--only", "bse"], "no such student", "students are base"),
    "no store": (lambda d: ["cache", "inspect", str(d.path)], "is not a store", "`duet teacher-logits`"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_told_with_the_way_on(desk, mistake, capsys):
    arguments, message, way = MISTAKES[mistake]
    assert main(arguments(desk)) == EXIT_USER
    out, err = capsys.readouterr()
    error, hint = err.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert way in hint
    assert out == ""
    assert not (desk.path / "runs/lab/config.yaml").exists()


def test_a_changed_config_does_not_go_on_with_another_run(desk, capsys):
    assert main(desk.set()) == EXIT_DONE
    capsys.readouterr()
    assert main(desk.set("data.forget.sample=2")) == EXIT_USER
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert "data.forget.sample is None there and 2 now" in error
    assert "--set name=NEW_NAME" in hint


def test_a_run_removed_while_it_trains_is_told_as_that(desk, capsys, monkeypatch):
    def remove_and_sync(path: Path) -> None:
        shutil.rmtree(desk.path / "runs/lab")
        sync_file(path)

    assert main(desk.set()) == EXIT_DONE
    monkeypatch.setattr("duet.stages.student.loop.sync_file", remove_and_sync)
    assert main(desk.set(command="distill")) == EXIT_USER
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert f"{desk.path / 'runs/lab'} disappeared" in error
    assert "until its command has ended" in hint


def test_a_prefix_may_name_the_topic_in_its_own_words(desk):
    assert main([*desk.set("teacher.prefix=Forget the people {of} the lab."), "--dry-run"]) == EXIT_DONE


def test_no_command_at_all_shows_the_help(capsys):
    assert main([]) == EXIT_USER
    out, err = capsys.readouterr()
    assert "teacher-logits" in out
    assert err == ""


def test_paths_are_told_as_they_were_given(desk, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["run", "--config", "config/lab.yml"]) == EXIT_USER
    err = capsys.readouterr().err
    assert f"did you mean {Path('configs/lab.yaml')}?" in err
    assert str(ROOT) not in err
