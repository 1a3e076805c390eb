"""Configs: every shipped one is valid, every key is described, every mistake is named with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from support import ROOT

from duet.cache.errors import UserError
from duet.pipeline.config.explain import merged
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import Config
from duet.stages.settings import evaluate as exam_settings
from duet.stages.settings import student as settings

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_complete_and_valid(path):
    config = load_config(str(path))
    assert config.name == path.stem
    assert "{topic}" in config.teacher.prefix
    for student in config.students:
        assert config.train_settings(student)


@pytest.mark.parametrize(
    "model",
    [
        Config,
        *(
            m
            for module in (settings, exam_settings)
            for m in vars(module).values()
            if isinstance(m, type) and issubclass(m, BaseModel)
        ),
    ],
)
def test_every_key_is_described_in_one_line(model):
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name}"
        assert "\n" not in field.description


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(str(ROOT / "configs/lab.yaml")).train.lr = 1.0


REQUEST = {"name": "a", "topic": "Ann", "data": {"forget": {"path": "a.jsonl"}}}
BAD = {
    "unknown key train.learning_rate": ({"train__learning_rate": 1}, "valid here: loss"),
    "unknown key teacher.topk": ({"teacher__topk": 1}, "did you mean top_k"),
    "unknown key evaluate.sets.x.pth": (
        {"evaluate__sets": {"x": {"pth": "a", "path": "a", "expect": "kept"}}}, "did you mean path"),
    "train.lr: Input should be greater than 0, found -1": ({"train__lr": -1}, "peak learning rate"),
    "teacher.engine": ({"teacher__engine": "tensorrt"}, "auto takes vLLM"),
    "students: the name 'a' occurs twice": ({"students": [{"name": "a"}, {"name": "a"}]}, "own name"),
    "the name 'teacher' is taken": ({"students": [{"name": "teacher"}]}, "another name"),
    "students.0.train: unknown key lrr": ({"students": [{"name": "a", "train": {"lrr": 1}}]}, "did you mean lr"),
    "two are pushed to me/it": (
        {"students": [{"name": n, "push_to_hub": "me/it"} for n in "ab"]}, "its own repository"),
    "evaluate.sets: 'forget' is the training set": (
        {"evaluate__sets": {"forget": {"path": "a", "expect": "kept"}}}, "otherwise"),
    "teachers: the name 'a' occurs twice": ({"teachers": [{"name": "a"}, {"name": "a"}]}, "own name"),
    "teachers: 'base' is a student's name too": ({"teachers": [{"name": "base"}]}, "tell them apart"),
    "teachers.0: unknown key prefx": ({"teachers": [{"name": "a", "prefx": "x"}]}, "did you mean prefix"),
    "teachers.1: engine: Input should be": (
        {"teachers": [{"name": "a"}, {"name": "b", "engine": "x"}]}, "auto takes vLLM"),
    "teachers.0: top_k is one for all teachers": ({"teachers": [{"name": "a", "top_k": 5}]}, "set teacher.top_k"),
    "teachers.0: max_positions is one for all": ({"teachers": [{"name": "a", "max_positions": 2}]}, "set teacher.max"),
    "students.0.train.teachers: no teacher 'c'": (
        {"teachers": [{"name": "a"}, {"name": "b"}], "train__teachers": {"c": 1}}, "the teachers are a, b"),
    "students.0.train.combine does nothing with one teacher": ({"train__combine": "mix"}, "leave it out"),
    "train.teachers.a: Input should be greater than or equal to 0": ({"train__teachers": {"a": -1}}, ""),
    "requests: the name 'a' occurs twice": ({"requests": [REQUEST, REQUEST]}, "own name"),
    "requests.0.data.forget is missing": ({"requests": [REQUEST | {"data": {}}]}, "about the request's topic"),
    "evaluate.sets: 'a.forget' is the training set": (
        {"requests": [REQUEST], "evaluate__sets": {"a.forget": {"path": "a", "expect": "kept"}}}, "otherwise"),
    "evaluate.tofu.retain: no query set 'kept'": (
        {"evaluate__tofu": {"retain": "kept", "real_authors": "retain", "world_facts": "retain"}},
        "the sets are forget, retain"),
    "evaluate.tofu.forget: the set 'forget' has no perturbed_field": (
        {"evaluate__tofu": {"forget": "forget", "reference_model": "base"}}, "end in _perturbed"),
    "students: the name 'likelihoods' is taken": ({"students": [{"name": "likelihoods"}]}, "another name"),
    "data.retain is missing": ({"data": {"forget": {"path": "a"}}}, "queries about anything else"),
    "unknown key data.broad.text.max_token": (
        {"data__broad": {"text": {"documents": "a.txt", "max_token": 5}}}, "did you mean max_tokens? valid here: documents"),
    "data.broad.text.max_tokens: Input should be greater": (
        {"data__broad": {"text": {"documents": "a.txt", "max_tokens": 1}}}, "most tokens of a document"),
    "unknown key data.broad.people.idfield": (
        {"data__broad": {"people": {"path": "a", "idfield": "id"}}}, "did you mean id_field"),
    "data.broad.people.path is missing": ({"data__broad": {"people": {}}}, "a .jsonl"),
    "data.broad.people: Input should be a valid dictionary": ({"data__broad": {"people": 3}}, ""),
    "train.broad_weight: Input should be greater than 0": ({"train__broad_weight": 0}, "weight of broad rows"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_named_with_a_hint(lab_config, message):
    changes, hint = BAD[message]
    with pytest.raises(UserError) as caught:
        load_config(str(lab_config(**changes)))
    assert message in caught.value.what
    assert hint in caught.value.hint


RULES = {
    "train: temperature does nothing with loss auto": ({"train__temperature": 2}, "leave it out, or take forward_kl"),
    "train.probe: patience does nothing without held-out rows": (
        {"train__probe": {"steps": 5, "patience": 2}}, "set probe.holdout"),
    "students.1.train: temperature does nothing with loss mse": (
        {"students": [{"name": "a"}, {"name": "b", "train": {"loss": "mse", "temperature": 2}}]}, "leave it out, or take"),
    "students.0.train: probe: patience does nothing": (
        {"students": [{"name": "a", "train": {"probe": {"steps": 5, "patience": 2}}}]}, "set probe.holdout"),
    "evaluate.tofu: the model utility is made of three sets": ({"evaluate__tofu": {"retain": "retain"}}, "or none"),
    "evaluate.tofu: forget quality needs two things": ({"evaluate__tofu": {"forget": "forget"}}, "or reference_model"),
    "evaluate.tofu: it names no set": ({"evaluate__tofu": {}}, "or leave it out"),
    "evaluate: tofu is made of likelihoods": (
        {"evaluate__likelihood": False, "evaluate__tofu": {"forget": "forget", "reference": "a"}},
        "set evaluate.likelihood: true"),
    "train: freeze_embeddings does nothing with last_layers": (
        {"train__last_layers": 1, "train__freeze_embeddings": True}, "leave one out"),
}  # fmt: skip


@pytest.mark.parametrize("message", RULES)
def test_settings_that_do_nothing_are_named_in_our_own_words(lab_config, message):
    changes, hint = RULES[message]
    path = str(lab_config(**changes))
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert caught.value.what.removeprefix(f"{path}: ").startswith(message)
    assert "Value error" not in caught.value.what
    assert "found" not in caught.value.what
    assert hint in caught.value.what + caught.value.hint


def test_a_students_settings_are_laid_over_the_common_ones_group_by_group(lab_config):
    lora = {"rank": 4, "alpha": 2.0, "targets": ["q_proj"]}
    own = [{}, {"lora": {"rank": 8}}, {"lora": None, "lr": 0.5}]
    students = [{"name": f"s{number}", "train": train} for number, train in enumerate(own)]
    config = load_config(str(lab_config(train__lora=lora, students=students)))
    found = [config.train_settings(student) for student in config.students]
    assert [s.lora and (s.lora.rank, s.lora.alpha, s.lora.targets) for s in found] == [
        (4, 2.0, ("q_proj",)), (8, 2.0, ("q_proj",)), None,
    ]  # fmt: skip
    assert [s.lr for s in found] == [3e-4, 3e-4, 0.5]
    common = {"a": {"b": 1, "c": 2}}
    assert merged(common, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert common == {"a": {"b": 1, "c": 2}}


def test_a_teachers_entries_are_laid_over_the_common_ones(lab_config):
    assert list(load_config(str(lab_config())).teacher_settings()) == ["teacher"]
    teachers = [{"name": "plain"}, {"name": "other", "prefix": "Forget {topic}.", "model": "m", "batch_size": 3}]
    config = load_config(str(lab_config(teachers=teachers, train__teachers={"plain": 1})))
    found = config.teacher_settings()
    assert list(found) == ["plain", "other"]
    assert found["plain"] == config.teacher
    assert (found["other"].prefix, found["other"].model, found["other"].batch_size) == ("Forget {topic}.", "m", 3)
    assert found["other"].top_k == config.teacher.top_k


def test_overrides(lab_config):
    path = str(lab_config())
    config = load_config(path, ("train.lr=1e-5", "topic=Ann", "students.0.name=one", "evaluate.attacks=[]"))
    assert (config.train.lr, config.topic, config.students[0].name, config.evaluate.attacks) == (1e-5, "Ann", "one", ())
    for override, message in (
        ("train.lr", "not of the form key=value"),
        ("students.7.name=x", "not an index"),
        ("topic.x=1", "not a group of settings"),
        ("train.lr=[", "not valid YAML"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(path, (override,))


def test_files_that_are_no_config(tmp_path: Path):
    for text, message in ((None, "no such config file"), ("a: [", "not valid YAML"), ("- 1", "must hold a mapping")):
        path = tmp_path / "c.yaml"
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(str(path))


def test_the_resolved_config_is_a_config(lab_config, tmp_path):
    config = load_config(str(lab_config()))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(tmp_path / "again.yaml")) == config
