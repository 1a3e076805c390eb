"""The run directory: what makes two calls the same run, and that it keeps every student."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from duet.cache.errors import UserError
from duet.cache.files import TEMPORARY
from duet.pipeline.commands.status import config_of, status_of
from duet.pipeline.config.load import load_config
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.config.schema import Config
from duet.pipeline.run.directory import claim_run_dir, set_aside
from duet.pipeline.run.terminal import log
from duet.stages.settings.student import FREE_TRAIN

OTHER_VALUES = {
    "pass_tokens": 99, "max_padding": 0.5, "gradient_checkpointing": True, "compile": True, "parallel": "fsdp",
    "checkpoint_steps": 7, "keep_last": 3, "trackers": ["tensorboard"],
}  # fmt: skip


@pytest.fixture
def claim(lab_config) -> Iterator[Callable[..., Path]]:
    def claimed(**changes) -> Path:
        return claim_run_dir(load(lab_config, **changes))

    yield claimed
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


def load(lab_config, **changes) -> Config:
    return load_config(str(lab_config(**changes)))


def students_of(run_dir: Path) -> list[str]:
    return [student["name"] for student in yaml.safe_load(RunDir(run_dir).config.read_text())["students"]]


def test_what_changes_speed_only_may_differ_in_the_common_settings_and_in_a_students_own(claim):
    assert set(OTHER_VALUES) == set(FREE_TRAIN)
    claim(students=[{"name": "llama3.2-3b"}])
    for key, value in OTHER_VALUES.items():
        claim(students=[{"name": "llama3.2-3b"}], **{f"train__{key}": value})
        claim(students=[{"name": "llama3.2-3b", "train": {key: value}}])
    claim(students=[{"name": "llama3.2-3b", "push_to_hub": "me/it"}])


def test_what_changes_numbers_may_not(claim):
    claim(students=[{"name": "llama3.2-3b", "train": {"lr": 0.1}}])
    for changes, message in (
        ({"train__lr": 0.2}, "train.lr is 0.0003 there and 0.2 now"),
        ({"train__lora": {"rank": 2}}, "train.lora is None there and unset now"),
        (
            {"students": [{"name": "llama3.2-3b", "train": {"lr": 0.2}}]},
            "students.llama3.2-3b.train.lr is 0.1 there and 0.2",
        ),
        ({"students": [{"name": "llama3.2-3b"}]}, "students.llama3.2-3b.train.lr is 0.1 there and unset now"),
    ):
        with pytest.raises(UserError) as caught:
            claim(**{"students": [{"name": "llama3.2-3b", "train": {"lr": 0.1}}]} | changes)
        assert message in caught.value.what


def test_a_run_that_was_begun_before_a_setting_was_there_has_its_default(claim):
    path = RunDir(claim(students=[{"name": "a"}])).config
    raw = yaml.safe_load(path.read_text())
    del raw["students"][0]["start_noise"]
    path.write_text(yaml.safe_dump(raw))
    claim(students=[{"name": "a"}])
    assert yaml.safe_load(path.read_text())["students"][0]["start_noise"] == 0
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"students\.a\.start_noise is 0\.0 there and 0\.5 now"):
        claim(students=[{"name": "a", "start_noise": 0.5}])
    path.write_text(yaml.safe_dump(raw | {"unknown": 1}))  # of another version: compared as it is
    with pytest.raises(UserError, match=r"start_noise is unset there and 0\.0 now \(and 1 more\)"):
        claim(students=[{"name": "a"}])


def test_a_deep_run_that_was_begun_before_there_were_contexts_had_none(claim):
    path = RunDir(claim(harden="deep", train__contexts="none")).config
    raw = yaml.safe_load(path.read_text())
    del raw["train"]["contexts"]
    path.write_text(yaml.safe_dump(raw))
    claim(harden="deep", train__contexts="none")
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"train\.contexts is 'none' there and 'texts' now"):
        claim(harden="deep")


def test_a_teachers_own_settings_are_as_free_as_the_common_ones(claim):
    def several(**more) -> dict:
        return {"teachers": [{"name": "a.b"}, {"name": "c", "prefix": "x", **more}]}

    claim(**several())
    claim(**several(batch_size=3))
    claim(teachers=several()["teachers"][::-1])
    with pytest.raises(UserError, match=r"teachers\.c\.dtype is unset there and 'float16' now"):
        claim(**several(dtype="float16"))
    with pytest.raises(UserError, match=r"teachers\.c\.name is 'c' there and unset now"):
        claim(teachers=[{"name": "a.b"}])


def test_the_run_keeps_every_student_in_whatever_order_they_are_named(claim):
    run_dir = claim(students=[{"name": "a"}, {"name": "b", "train": {"lr": 0.1}}])
    claim(students=[{"name": "c"}])
    assert students_of(run_dir) == ["a", "b", "c"]
    claim(students=[{"name": "b", "train": {"lr": 0.1}}])
    assert students_of(run_dir) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"students\.b\.train\.lr is 0\.1 there and 0\.2 now"):
        claim(students=[{"name": "b", "train": {"lr": 0.2}}])


def test_what_is_set_aside_takes_no_place_of_what_was_kept_before(tmp_path):
    (tmp_path / "results-2.json").write_text("the second, of which somebody has removed the first")
    (tmp_path / "report-1.html").write_text("the first's page")
    (tmp_path / "results.json").write_text("the third")
    set_aside("evaluation", tmp_path / "results.json", tmp_path / "report.html")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {
        "results-2.json": "the second, of which somebody has removed the first",
        "report-1.html": "the first's page",
        "results-3.json": "the third",
    }


@pytest.mark.parametrize("moment", range(1, 6))
def test_what_was_being_set_aside_when_it_was_killed_stays_together(tmp_path, monkeypatch, moment):
    paths = [tmp_path / name for name in ("results.json", "items.json", "report.html")]
    for name in ("results", "items"):
        (tmp_path / f"{name}-1.json").write_text("kept before")
    for path in paths:
        path.write_text(path.name)
    calls = itertools.count(1)

    def killed_at(change):
        def changing(*of, **how):
            if next(calls) == moment:
                raise SystemExit
            return change(*of, **how)

        return changing

    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", killed_at(os.replace))
        killed.setattr(Path, "rename", killed_at(Path.rename))
        killed.setattr(Path, "unlink", killed_at(Path.unlink))
        with pytest.raises(SystemExit):
            set_aside("evaluation", *paths)
    if paths[0].is_file():  # what callers ask
        set_aside("evaluation", *paths)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if not TEMPORARY.fullmatch(path.name)}
    kept = {"results-2.json": "results.json", "items-2.json": "items.json", "report-2.html": "report.html"}
    assert found == {"results-1.json": "kept before", "items-1.json": "kept before"} | kept


def test_the_status_of_a_run_is_read_where_it_lies(claim, tmp_path, monkeypatch):
    """From another directory than it was made from, by another name, and from within."""
    monkeypatch.chdir(tmp_path)
    run_dir = claim(runs_dir="runs")
    (run_dir / "results.json").write_text('{"models": {"student:base": {}}}', encoding="utf-8")
    monkeypatch.chdir(run_dir.parent)
    Path("lab").rename("moved")
    for name in ("moved", "."):
        if name == ".":
            monkeypatch.chdir("moved")
        run = RunDir(Path(name))
        assert status_of(config_of(run), run)["evaluation"]["done"]
