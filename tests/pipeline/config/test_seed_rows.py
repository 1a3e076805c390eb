"""train.seeds: each student once per seed, and which of a run's students make a row."""

from __future__ import annotations

import pytest
import yaml
from support import ROOT

from duet.cache.errors import UserError
from duet.pipeline.config.load import load_config
from duet.pipeline.config.selection import choose
from duet.stages.settings.student import TrainSettings, deciding_settings

LAB = str(ROOT / "configs" / "lab.yaml")
TWO = "train.seeds=[0, 7]"


def test_each_student_is_trained_once_with_each_seed(tmp_path):
    config = load_config(LAB, (TWO,))
    assert [student.name for student in config.students] == ["base-seed0", "base-seed7", "small-seed0", "small-seed7"]
    assert [config.train_settings(student).seed for student in config.students] == [0, 7, 0, 7]
    assert [student.model for student in config.students] == [None, None, "lab/models/small", "lab/models/small"]
    assert config.seed_rows(config.students) == {
        "base": ["base-seed0", "base-seed7"],
        "small": ["small-seed0", "small-seed7"],
    }
    assert config.seed_rows(config.students[1:]) == {"small": ["small-seed0", "small-seed7"]}
    resolved = tmp_path / "config.yaml"
    resolved.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(resolved)) == config


def test_a_sweep_has_a_row_of_all_seeds_for_each_of_its_values():
    config = choose(load_config(LAB, (TWO,)), ("train.lr=1e-4,1e-3",), ())
    assert config.seed_rows(config.students) == {
        f"{student}-lr{lr}": [f"{student}-lr{lr}-seed{seed}" for seed in (0, 7)]
        for student in ("base", "small")
        for lr in ("0.0001", "0.001")
    }


def test_a_row_is_of_students_that_differ_in_nothing_else():
    other = (
        "students=[{name: base-seed0}, {name: base-seed1, train: {seed: 1, lr: 0.5}}, {name: apart, train: {seed: 1}}]"
    )
    config = load_config(LAB, (other,))
    assert config.seed_rows(config.students) == {}
    config = load_config(LAB, ("students=[{name: b-seed0}, {name: b-seed1, train: {seed: 1}}]",))
    assert config.seed_rows(config.students) == {"b": ["b-seed0", "b-seed1"]}


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.seeds=[0]",),
        ("train.seeds=[0, 0]",),
        ("train.seeds=[0, -1]",),
        ("train.seeds=3",),
        (TWO, "train.seed=1"),
        (TWO, "students=[{name: base, train: {seed: 3}}]"),
        ("students=[{name: base, train: {seeds: [0, 1]}}]",),
    ],
)
def test_seeds_that_would_do_nothing_are_refused(overrides):
    with pytest.raises(UserError, match="seeds"):
        load_config(LAB, overrides)


def test_it_is_no_part_of_a_students_identity():
    assert "seeds" not in deciding_settings(TrainSettings())
