"""The preset `harden`: what it sets, what a config says itself, and what it cannot be combined with."""

from __future__ import annotations

import json

import pytest
from command_line import all_stages, refused
from support import LAB_BASE, ROOT, write_jsonl

from duet.cache.errors import EXIT_DONE, UserError
from duet.pipeline.cli.main import main
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import PRESETS, Config
from duet.pipeline.run.exam import exam_of
from duet.stages.questions.contexts import context_texts


def test_a_preset_sets_what_the_config_leaves_open_and_the_resolved_config_shows_it(lab_config):
    path = str(lab_config(harden="deep", students=[{"name": "a"}, {"name": "b", "start_noise": 0.1}]))
    found = load_config(path, ("teacher.max_positions=4",))
    assert (found.teacher.prefix_on, found.teacher.max_positions) == ("forget", 4)
    assert [student.start_noise for student in found.students] == [PRESETS["deep"]["students"]["start_noise"], 0.1]
    assert found.train.contexts == "texts"
    resolved = found.model_dump(mode="json")
    assert Config(**resolved) == found, "what is resolved is not expanded again"
    assert resolved["harden"] == "deep"


def test_the_wide_preset_sets_what_is_common_to_all_students_too(lab_config):
    found = load_config(str(ROOT / "configs/lab_wide.yaml"), ("train.lr=1e-3",))
    assert (found.teacher.prefix_on, found.teacher.max_positions) == ("forget", 8)
    assert (found.train.contexts, found.train.lr) == ("attacks", 1e-3)
    raw = {key: value for key, value in found.model_dump().items() if key != "train"}
    assert Config(**raw).train.contexts == "attacks", "in a config that has no train: of its own, too"
    own = load_config(str(lab_config(harden="wide", train__contexts="none")))
    assert own.train.contexts == "none"


def test_contexts_on_first_tokens_alone_are_refused_at_the_start(lab_config, capsys):
    what, hint = refused(capsys, "run", "--config", str(lab_config(train__contexts="attacks")))
    assert "train.contexts: every row of the store has one position" in what
    assert "teacher.max_positions" in hint


def test_an_attack_with_a_text_that_a_student_is_trained_on_is_refused_at_the_start(lab_config, tmp_path, capsys):
    text = context_texts()["reverse"][0]
    extra = tmp_path / "attacks.yaml"
    extra.write_text(f'reverse:\n  mine: {{ in_front: "Listen. {text}" }}\n', encoding="utf-8")
    path = str(lab_config(harden="wide", teacher__max_positions=8, evaluate__attack_texts=str(extra)))
    what, hint = refused(capsys, "run", "--config", path)
    assert "attack reverse, mine: student" in what
    assert text in what
    assert "evaluate.attack_texts" in hint
    exam_of(load_config(path, ("train.contexts=none",)))
    exam_of(load_config(path, ("evaluate.attacks=[role_play]",)))


def test_the_estimate_of_a_wide_student_knows_its_longer_rows(lab_config, capsys):
    seconds = {}
    for contexts in ("none", "attacks"):  # on a named GPU: this machine's own rate is measured, and another each time
        path = str(lab_config(harden="wide", teacher__max_positions=8, train__contexts=contexts))
        assert main(["estimate", "--json", "--gpu", "A100-80", "--config", path]) == EXIT_DONE
        seconds[contexts] = next(
            stage["seconds"]
            for stage in json.loads(capsys.readouterr().out)["stages"]
            if stage["stage"].startswith("student")
        )
    assert seconds["attacks"] > 1.05 * seconds["none"], "on so small a model most of a step is not the tokens'"


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
        teacher__max_positions=2,
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
    assert training["trained_on"] == ["reverse", "prefix_injection"]


def test_a_wide_student_goes_through_all_stages(lab_config, tmp_path):
    config = lab_config(
        harden="wide", teacher__max_positions=2, train__epochs=1, evaluate__attacks=[], evaluate__sets={}
    )
    arguments = ["--config", str(config), "--only", "base"]
    all_stages(*arguments, "--set", "data.forget.rows=[0,4]", "--set", "data.retain.sample=4")
    training = json.loads((tmp_path / "runs/lab/base/training.json").read_text())
    assert training["trained_on"] == ["reverse", "prefix_injection", "prefill"]
    results = json.loads((tmp_path / "runs/lab/results.json").read_text())
    assert results["students"]["base"]["trained_on"] == training["trained_on"]
