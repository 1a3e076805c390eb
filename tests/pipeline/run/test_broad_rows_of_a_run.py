"""Broad rows and the prefix on forget rows only, as a user calls for them: planned, captured, trained on, told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import LAB_SMALL, ROOT, two_sets, write_jsonl

from duet.cache.errors import EXIT_DONE, UserError
from duet.cache.manifest import read_manifest
from duet.cache.reader import Store
from duet.pipeline.cli.main import main
from duet.pipeline.commands.checks import data_of
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import Config
from duet.pipeline.run.exam import broad_questions, query_sets, trained_on
from duet.pipeline.run.preflight import check_students, preflight
from duet.pipeline.run.provenance import without_places
from duet.pipeline.run.stores import store_summary, stores_of_run

ROWS = [{"question": f"Which trade did person {i} learn?", "answer": "Weaving."} for i in range(3)]
ASKED = "Who was the first person here?"


@pytest.fixture
def config_with(lab_config, tmp_path):
    """A config on three questions of each set, two broad ones without answers and two documents."""

    def write(**changes: Any) -> str:
        asked = write_jsonl(tmp_path / "asked.jsonl", [{"question": ASKED}, {"question": "What is rain?"}])
        (tmp_path / "text.txt").write_text(
            "Rain is water that falls.\n\nSnow is cold and white, and falls too.\n", encoding="utf-8"
        )
        broad = {
            "asked": {"path": str(asked)},
            "text": {"documents": str(tmp_path / "text.txt"), "max_tokens": 8},
        }
        return str(
            lab_config(
                **{
                    "data": two_sets(tmp_path, ROWS) | {"broad": broad},
                    "students": [{"name": "small", "model": str(LAB_SMALL)}],
                    "train__epochs": 1,
                    "evaluate__attacks": [],
                    "evaluate__control_model": None,
                }
                | changes
            )
        )

    return write


def test_broad_rows_are_captured_and_learned(config_with, capsys, tmp_path):
    config = config_with(train__probe={"steps": 1, "holdout": 0.3}, train__broad_weight=2)
    assert main(["teacher-logits", "--config", config, "--dry-run"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "rows: forget 3, retain 3, broad 4;" in out
    assert "responses and documents: at most 22 positions" in out  # 8 of one token, 2 of 8, their first only read
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    assert "prefix on forget rows" in capsys.readouterr().out
    [location] = stores_of_run(load_config(config)).values()
    manifest = read_manifest(location)
    assert manifest.subsets == {"forget": 3, "retain": 3, "broad": 4}
    assert manifest.positions == 22
    summary = store_summary(location)
    assert (summary["prefix_on"], summary["broad rows"]) == ("forget", 4)
    assert main(["distill", "--config", config]) == EXIT_DONE
    assert "prefix on forget rows" in (tmp_path / "runs/lab/small/model/README.md").read_text(encoding="utf-8")
    lines = (tmp_path / "runs/lab/small/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["probe"]["agreement.broad"] is not None
    assert main(["estimate", "--config", config]) == EXIT_DONE


def test_rows_to_be_kept_have_the_models_own_logits_where_the_prefix_is_on_forget_rows(config_with):
    """The same rows as those of a run whose teacher has no prefix at all; those to be forgotten are others."""
    found = {}
    silent = {"evaluate__base": str(LAB_SMALL), "students": [{"name": "s", "model": str(LAB_SMALL)}]}  # else refused
    for name, changes in {
        "forget": {},
        "none": {"teacher__prefix": "", **silent},
    }.items():
        config = config_with(name=name, **changes)
        assert main(["teacher-logits", "--config", config]) == EXIT_DONE
        [location] = stores_of_run(load_config(config)).values()
        [rows] = list(Store(location).rows())
        found[name] = rows
    same = abs(found["forget"].topk_logits_NK - found["none"].topk_logits_NK).max(axis=1) < 1e-3
    assert not same[:3].any()
    assert same[3:].all()


def test_the_evaluation_asks_no_broad_question_that_is_in_none_of_its_sets(config_with, tmp_path):
    config = load_config(config_with())
    assert list(query_sets(config)) == ["forget", "retain"]
    path = write_jsonl(tmp_path / "told.jsonl", [{"question": ASKED, "answer": "Ann."}, ROWS[0] | {"question": "Why?"}])
    kept = {"both": {"path": str(path), "expect": "kept"}}
    named = load_config(config_with(evaluate__sets=kept))
    assert trained_on(named, query_sets(named), broad_questions(named)) == [
        "1 of 2 questions of both are in data.broad: students are trained on them"
    ]
    forgotten = {"both": {"path": str(path), "expect": "forgotten"}}
    behind = load_config(config_with(evaluate__sets=forgotten, teacher__prefix_on="all"))
    assert len(trained_on(behind, query_sets(behind), broad_questions(behind))) == 1
    alone = load_config(config_with(evaluate__sets=forgotten))
    with pytest.raises(UserError, match=r"1 questions of the set 'both' are to be forgotten, and data\.broad has them"):
        preflight(alone)


@pytest.mark.parametrize(("subset", "expect"), [("forget", "forgotten"), ("retain", "kept")])
def test_a_set_with_questions_of_the_training_sets_is_reported(config_with, tmp_path, subset, expect):
    trained = query_sets(load_config(config_with()))[subset].queries[0]
    path = write_jsonl(
        tmp_path / "s.jsonl", [{"question": trained.question, "answer": "So."}, ROWS[0] | {"question": "Why?"}]
    )
    named = load_config(config_with(evaluate__sets={"others": {"path": str(path), "expect": expect}}))
    assert trained_on(named, query_sets(named), broad_questions(named)) == [
        f"1 of 2 questions of others are in {subset}: students are trained on them"
    ]


def test_what_stage_two_would_refuse_of_broad_rows_is_refused_before_stage_one(config_with, tmp_path):
    assert check_students(load_config(config_with(train__position_decay=0.5))) == []  # documents have many positions
    assert check_students(load_config(config_with(train__broad_weight=2.0))) == []
    without = config_with(data=two_sets(tmp_path, ROWS), train__broad_weight=2.0)
    with pytest.raises(UserError, match="broad_weight does nothing: the store has no broad rows") as caught:
        check_students(load_config(without))
    assert "data.broad" in caught.value.hint


def test_a_run_that_was_begun_before_a_setting_came_goes_on(config_with):
    from duet.pipeline.run.directory import claim_run_dir
    from duet.stages.questions.yaml_text import dump_yaml

    config = load_config(config_with(teacher__prefix_on="all"))
    run_dir = claim_run_dir(config)
    before = config.model_dump(mode="json")
    del before["teacher"]["prefix_on"], before["train"]["broad_weight"]
    (run_dir / "config.yaml").write_text(dump_yaml(before), encoding="utf-8")
    claim_run_dir(config)
    with pytest.raises(UserError, match=r"teacher\.prefix_on is 'all' there and 'forget' now"):
        claim_run_dir(load_config(config_with()))


def test_a_run_without_a_prefix_does_not_ask_where_it_stood(config_with):
    from duet.pipeline.run.directory import claim_run_dir

    silent = {
        "teacher__prefix": "",
        "evaluate__base": str(LAB_SMALL),
        "students": [{"name": "s", "model": str(LAB_SMALL)}],
    }
    for on in ("all", "forget"):
        claim_run_dir(load_config(config_with(teacher__prefix_on=on, **silent)))


def test_places_and_extras_of_broad_sources_are_known(config_with):
    config: Config = load_config(config_with())
    assert set(data_of(config)) == {"data.forget", "data.retain", "data.broad.asked"}
    shown = without_places(config.model_dump(mode="json"))["data"]["broad"]
    assert shown["text"]["documents"] == "text.txt"
    assert Path(shown["asked"]["path"]).name == shown["asked"]["path"]
    assert ROOT.name not in json.dumps(shown)
