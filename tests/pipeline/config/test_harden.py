"""The preset `harden`: what it sets, what a config says itself, and what it cannot be combined with."""

from __future__ import annotations

import json

import pytest
from command_line import all_stages, refused
from support import LAB_BASE, write_jsonl

from duet.cache.errors import UserError
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import PRESETS, Config


def test_a_preset_sets_what_the_config_leaves_open_and_the_resolved_config_shows_it(lab_config):
    path = str(lab_config(harden="deep", students=[{"name": "a"}, {"name": "b", "start_noise": 0.1}]))
    found = load_config(path, ("teacher.max_positions=4",))
    assert (found.teacher.prefix_on, found.teacher.max_positions) == ("forget", 4)
    assert [student.start_noise for student in found.students] == [PRESETS["deep"]["students"]["start_noise"], 0.1]
    resolved = found.model_dump(mode="json")
    assert Config(**resolved) == found, "what is resolved is not expanded again"
    assert resolved["harden"] == "deep"


def test_without_a_preset_nothing_changes(lab_config):
    path = str(lab_config())
    left_open, none = (load_config(path, sets) for sets in ((), ("harden=none",)))
    assert left_open == none
    assert none.students[0].start_noise == 0
    assert none.teacher.prefix_on == "forget"


@pytest.mark.parametrize("train", [{"lora": {"rank": 2}}, {"last_layers": 1}, {"freeze_embeddings": True}])
def test_weights_that_are_not_trained_cannot_be_repaired(lab_config, train):
    with pytest.raises(UserError, match="start_noise"):
        load_config(str(lab_config(harden="deep", train=train)))


@pytest.mark.parametrize("name", ["deeper", ["deep"]])
def test_a_preset_that_is_none_is_named(lab_config, capsys, name):
    what, hint = refused(capsys, "run", "--config", str(lab_config(harden=name)))
    assert "harden" in what
    assert "deep" in what + hint


def test_a_hardened_student_goes_through_all_stages(lab_config, tmp_path):
    people = write_jsonl(tmp_path / "broad.jsonl", [{"question": f"Where was person {i} born?"} for i in range(4)])
    config = lab_config(
        harden="deep",
        data__broad={"people": {"path": str(people)}},
        students=[{"name": "s", "model": str(LAB_BASE)}],
        train__epochs=1,
        evaluate__attacks=[],
        evaluate__sets={},
    )
    printed = all_stages("--config", str(config), "--set", "data.forget.rows=[0,4]", "--set", "data.retain.sample=4")
    assert "base + 0.5" in printed
    training = json.loads((tmp_path / "runs/lab/s/training.json").read_text())
    assert training["loss"] == "forward_kl_tail"
    assert training["start_noise"] == 0.5
