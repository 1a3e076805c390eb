"""Copies of data sets in the place of those of the hub, by one setting."""

from __future__ import annotations

import re

import pytest
import yaml
from support import ROOT, SHARED, write_jsonl

from duet.cache.errors import UserError
from duet.pipeline.config.load import load_config
from duet.stages.questions.queries import load_queries

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ROWS = [{"question": "Who?", "answer": "Ann."}]


def config_of(tmp_path, *sets: dict, **more) -> str:
    raw = yaml.safe_load((ROOT / "configs/lab.yaml").read_text(encoding="utf-8"))
    raw["data"] = {"forget": sets[0], "retain": {"path": "retain.jsonl"}}
    raw["evaluate"]["sets"] = {f"s{i}": {**of, "expect": "kept"} for i, of in enumerate(sets[1:])}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw | more))
    return str(tmp_path / "c.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_config_names_a_folder_that_a_user_does_not_have(path):
    text = path.read_text(encoding="utf-8")
    for named in re.findall(r"(?:path|model|documents|control_model|oracle): ([^\s,}]+)", text):
        is_hub = named.startswith("hf://") or (re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not (ROOT / named).exists())
        assert is_hub or not named.startswith(("..", "/", "~")), named
        assert is_hub or named.startswith("runs/") or (ROOT / named).exists() or "/" not in named, named


def test_every_kind_of_name_finds_its_copy(tmp_path):
    for place in ("plain.jsonl", "named/test.json", "shards/validation-00000-of-00001.parquet", "train.csv"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("")
    hub = [
        {"path": "hf://a/b", "name": "plain", "rows": [0, 2]},
        {"path": "hf://a/b", "name": "named", "split": "test", "shots": {"path": "hf://a/b", "name": "plain"}},
        {"path": "hf://c/d", "name": "shards", "split": "validation"},
        {"path": "hf://e/f"},
        {"path": "mine.jsonl"},
    ]
    config = load_config(config_of(tmp_path, *hub), (f"data_dir={tmp_path}",))
    sets = config.evaluate.sets
    assert config.data.forget.path == f"{tmp_path}/plain.jsonl"
    assert config.data.forget.rows == (0, 2)
    assert (config.data.forget.name, config.data.forget.split) == (None, "train")
    assert sets["s0"].path == f"{tmp_path}/named/test.json"
    assert sets["s0"].shots is not None
    assert sets["s0"].shots.path == f"{tmp_path}/plain.jsonl"
    assert sets["s1"].path == f"{tmp_path}/shards/validation-00000-of-00001.parquet"
    assert (sets["s2"].path, sets["s3"].path) == (f"{tmp_path}/train.csv", "mine.jsonl")
    assert config.data_dir is None, "the resolved config names files, and is loaded again as it is"
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(again)) == config


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ((), r"data_dir: .* has no copy of hf://a/b \(name x, split train\)", r"expected .*x/train.jsonl or .*x.jsonl"),
        (("x.jsonl", "x.csv"), "has several copies: .*x.jsonl, .*x.csv", "leave one"),
    ],
)
def test_a_copy_that_is_missing_or_there_twice_is_refused(tmp_path, files, message, hint):
    for name in files:
        write_jsonl(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=message) as error:
        load_config(config_of(tmp_path, {"path": "hf://a/b", "name": "x"}), (f"data_dir={tmp_path}",))
    assert re.search(hint, error.value.hint)


def test_a_folder_that_would_do_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="names no data set of the hub"):
        load_config(config_of(tmp_path, {"path": "mine.jsonl"}, data_dir="x"))


@pytest.mark.skipif(not (SHARED / "data/tofu").is_dir(), reason="needs ../shared/data/tofu")
@pytest.mark.parametrize("name", ["tofu", "tofu_deep"])
def test_tofus_copies_are_read_in_place(name):
    config = load_config(str(ROOT / f"configs/{name}.yaml"), (f"data_dir={SHARED / 'data/tofu'}",))
    assert len(load_queries(config.data.forget, "data.forget", need_answers=True)) == 40
    assert all(load_queries(of, name, need_answers=True) for name, of in config.evaluate.sets.items())
