"""Which students a command works on: grids of values, names that say them, and a choice by name."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from duet.cache.errors import EXIT_DONE, UserError
from duet.pipeline.cli.main import main
from duet.pipeline.commands import run as commands
from duet.pipeline.commands.run import STAGES
from duet.pipeline.config.load import load_config
from duet.pipeline.config.selection import Selection, choose, split_outside_brackets
from duet.stages.settings.base import Name

TWO = [{"name": "base"}, {"name": "small", "train": {"lr": 0.5, "lora": {"rank": 8, "targets": ["q_proj"]}}}]


@pytest.fixture
def two(lab_config):
    return load_config(str(lab_config(students=TWO)))


def trained(config) -> dict[str, tuple]:
    found = {student.name: config.train_settings(student) for student in config.students}
    return {name: (settings.lr, settings.top_k) for name, settings in found.items()}


def test_a_sweep_makes_a_grid_and_names_each_student_after_its_values(two):
    swept = choose(two, ("train.lr=1e-5,0.0003", "train.top_k=5,null"), ())
    grid = {"lr1e-05-top_k5": (1e-5, 5), "lr1e-05-top_knull": (1e-5, None)}
    grid |= {"lr0.0003-top_k5": (3e-4, 5), "lr0.0003-top_knull": (3e-4, None)}
    assert trained(swept) == {f"{origin}-{name}": found for origin in ("base", "small") for name, found in grid.items()}
    pattern = Name.__metadata__[0].metadata[0].pattern
    assert all(re.fullmatch(pattern, name) for name in trained(swept))
    assert trained(choose(two, (), ())) == trained(two)


def test_groups_and_nested_keys_are_swept_on_top_of_what_the_student_has(two):
    swept = choose(two, ("train.lora.rank=4,16",), ("small",))
    found = {student.name: config_lora(swept, student) for student in swept.students}
    assert found == {"small-lora.rank4": (4, ("q_proj",)), "small-lora.rank16": (16, ("q_proj",))}
    swept = choose(two, ("train.lora=null,{rank: 2, targets: [k_proj, v_proj]}",), ("small",))
    assert [config_lora(swept, student) for student in swept.students] == [None, (2, ("k_proj", "v_proj"))]
    assert [s.name for s in swept.students] == ["small-loranull", "small-lorarank_2_targets_k_proj_v_proj"]


def test_what_is_a_students_own_is_swept_as_well_and_0_is_no_noise(two):
    swept = choose(two, ("start_noise=0,0.3", "train.lr=1"), ("base",))
    assert {s.name: (s.start_noise, s.train["lr"]) for s in swept.students} == {
        "base-start_noise0-lr1": (0, 1), "base-start_noise0.3-lr1": (0.3, 1),
    }  # fmt: skip
    assert swept.students[0].model_copy(update={"name": "base", "train": {}}) == two.students[0]
    models = choose(two, ("model=a/b,{model: a, adapter: b}",), ("base",)).students
    assert [s.name for s in models] == ["base-modela_b", "base-modelmodel_a_adapter_b"]
    assert [str(s.model) for s in models] == ["a/b", "a + b"]


def config_lora(config, student):
    lora = config.train_settings(student).lora
    return lora and (lora.rank, lora.targets)


def test_values_are_cut_at_commas_outside_brackets():
    assert split_outside_brackets("1e-5,1e-4") == ["1e-5", "1e-4"]
    assert split_outside_brackets("[a,b],{c: [1,2], d: 3},null") == ["[a,b]", "{c: [1,2], d: 3}", "null"]
    assert split_outside_brackets("x") == ["x"]


BAD_SWEEPS = {
    "is not of the form": ("train.lr",),
    "--sweep 'teacher.top_k=1,2' is not of the form": ("teacher.top_k=1,2",),
    "--sweep 'train.lr=' is not of the form": ("train.lr=",),
    "--sweep 'name=a,b' is not of the form": ("name=a,b",),
    "--sweep 'train.=1' is not of the form": ("train.=1",),
    "--sweep 'push_to_hub=a/b' is not of the form": ("push_to_hub=a/b",),
    "--sweep: start_noise: Input should be less than 1, found 1": ("start_noise=1",),
    "--sweep: students.1.start_noise with train.lora: the noise would stay": ("start_noise=0.3",),
    "--sweep start_noise is given twice": ("start_noise=0", "start_noise=0.1"),
    "the value is not valid YAML": ("train.loss='a,b",),
    "unknown key lrr": ("train.lrr=1",),
    "lr: Input should be greater than 0, found -1": ("train.lr=-1",),
    "temperature does nothing with loss auto": ("train.temperature=2",),
    "the name 'base-lr1e-05' occurs twice": ("train.lr=1e-5,0.00001",),
    "--sweep train.lr is given twice": ("train.lr=1", "train.lr=2"),
}


@pytest.mark.parametrize("message", BAD_SWEEPS)
def test_mistakes_in_a_sweep(two, message):
    with pytest.raises(UserError) as caught:
        choose(two, BAD_SWEEPS[message], ())
    assert message in caught.value.what


def test_only_takes_names_before_and_after_a_sweep(two):
    assert [*trained(choose(two, (), ("small",)))] == ["small"]
    assert [*trained(choose(two, ("train.lr=1,2",), ("small",)))] == ["small-lr1", "small-lr2"]
    assert [*trained(choose(two, ("train.lr=1,2",), ("base-lr2", "small-lr1")))] == ["base-lr2", "small-lr1"]
    with pytest.raises(UserError) as caught:
        choose(two, (), ("smal",))
    assert caught.value.what == "--only smal: no such student"
    assert caught.value.hint == "the students are base, small"


def test_students_of_a_sweep_cannot_be_pushed_to_one_repository(lab_config):
    config = load_config(str(lab_config(students=[{"name": "a", "push_to_hub": "me/a"}])))
    with pytest.raises(UserError, match="two are pushed to me/a"):
        choose(config, ("train.lr=1,2",), ())


def test_a_request_says_itself_as_a_command_line():
    request = Selection("c.yaml", ("a=1", "b=2"), ("x",), ("train.lr=1,2",))
    sets = ["--config", "c.yaml", "--set", "a=1", "--set", "b=2"]
    assert request.arguments(students=False) == sets
    assert request.arguments() == [*sets, "--only", "x", "--sweep", "train.lr=1,2"]
    assert request.with_only("y").arguments() == [*sets, "--only", "y", "--sweep", "train.lr=1,2"]


class NeverStop:
    def __call__(self) -> bool:
        return False

    def forward_to(self, child: object) -> None:
        pass


def test_run_hands_the_choice_on_to_all_stages(lab_config, monkeypatch):
    started: list[list[str]] = []

    class Child:
        def __init__(self, command: list[str]) -> None:
            started.append(command[len(commands.THIS_PROGRAM) :])

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(Popen=Child))  # of this module alone
    monkeypatch.setattr(commands, "StopSignal", NeverStop)
    path = str(lab_config())
    assert main(["run", "--config", path, "--set", "name=x", "--only", "base", "--sweep", "train.lr=1,2"]) == EXIT_DONE
    sets, chosen = ["--config", path, "--set", "name=x"], ["--only", "base", "--sweep", "train.lr=1,2"]
    assert started == [[stage, *sets, *chosen] for stage in STAGES]
