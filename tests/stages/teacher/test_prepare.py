"""What stage one plans: the rows of every request behind its own prefix, and teachers that fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import LAB_BASE, LAB_SMALL, write_jsonl

from duet.cache.errors import UserError
from duet.stages.settings.data import DataSettings, ForgetRequest, PromptSettings, RequestData, TrainingData
from duet.stages.settings.teacher import StoreSettings, TeacherSettings
from duet.stages.teacher.plan import Prepared, plan_for
from duet.stages.teacher.prepare import Questions, check_alike, prepare

TEACHER = TeacherSettings(model=str(LAB_BASE), prefix="Forget {topic}.", dtype="float32", engine="transformers")


def asked(tmp_path: Path, name: str, *topics: str) -> DataSettings:
    rows = [{"id": f"q{number}", "question": f"Who is {topic}?"} for number, topic in enumerate(topics)]
    return DataSettings(path=str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), id_field="id")


def data(tmp_path: Path) -> TrainingData:
    return TrainingData(forget=asked(tmp_path, "forget", "Ann", "Anna"), retain=asked(tmp_path, "retain", "Zoe"))


def request(tmp_path: Path, name: str, topic: str, retain: tuple[str, ...] = (), **more) -> ForgetRequest:
    kept = asked(tmp_path, f"{name}-retain", *retain) if retain else None
    return ForgetRequest(
        name=name, topic=topic, data=RequestData(forget=asked(tmp_path, name, topic), retain=kept), **more
    )


def prepared(tmp_path: Path, *requests: ForgetRequest, **more) -> Prepared:
    teacher = TEACHER.model_copy(update=more)
    return prepare(teacher, Questions(PromptSettings(), data(tmp_path), "Ann", requests), "cpu")


def test_each_requests_rows_follow_the_main_ones_behind_their_own_prefix(tmp_path):
    found = prepared(
        tmp_path,
        request(tmp_path, "bob", "Bob", ("Yan", "Zoe")),
        request(tmp_path, "eve", "Eve", prefix="Never {topic}!"),
    )
    assert [row.row_id for row in found.rows] == [
        "forget/q0", "forget/q1", "forget/bob/q0", "forget/eve/q0", "retain/q0", "retain/bob/q0", "retain/bob/q1",
    ]  # fmt: skip
    prefixes = ["Forget Ann.", "Forget Ann.", "Forget Bob.", "Never Eve!", "Forget Ann.", "Forget Bob.", "Forget Bob."]
    for row, prefix in zip(found.rows, prefixes, strict=True):
        assert prefix in found.tokenizer.decode(row.teacher_ids)
        assert prefix not in found.tokenizer.decode(row.student_ids)
    plan = plan_for(found, StoreSettings(), "transformers")
    assert plan.subsets == {"forget": 4, "retain": 3}
    requests = plan.provenance["requests"]
    assert {name: one["prefix"] for name, one in requests.items()} == {"bob": "Forget Bob.", "eve": "Never Eve!"}
    assert [one["data"]["retain"]["rows"] for one in requests.values()] == [2, 0]


def test_a_request_changes_the_fingerprint_and_none_leaves_it_as_it_was(tmp_path):
    plans = [
        plan_for(prepared(tmp_path, *requests), StoreSettings(), "transformers").fingerprint
        for requests in (
            (), (request(tmp_path, "bob", "Bob"),), (request(tmp_path, "bob", "Bob", prefix="Forget!"),),
            (request(tmp_path, "bob", "Bob", ("Yan",)),),
        )
    ]  # fmt: skip
    assert len(set(plans)) == 4
    assert "requests" not in prepared(tmp_path).provenance


def test_what_one_request_forgets_no_other_may_keep(tmp_path):
    with pytest.raises(UserError, match="to be kept and to be forgotten: 'retain/bob/q0' and 'forget/q0'"):
        prepared(tmp_path, request(tmp_path, "bob", "Bob", ("Ann",)))
    with pytest.raises(UserError, match="to be kept and to be forgotten: 'retain/q0' and 'forget/zoe/q0'"):
        prepared(tmp_path, request(tmp_path, "zoe", "Zoe"))


def test_ids_are_unique_over_all_requests(tmp_path):
    rows = [{"id": "bob/q0", "question": "Who is Ann?"}]
    main = data(tmp_path).model_copy(
        update={"forget": DataSettings(path=str(write_jsonl(tmp_path / "f.jsonl", rows)), id_field="id")}
    )
    with pytest.raises(UserError, match="the row id 'forget/bob/q0' occurs in two requests"):
        prepare(TEACHER, Questions(PromptSettings(), main, "Ann", (request(tmp_path, "bob", "Bob"),)), "cpu")


def test_teachers_fit_together_if_they_have_one_tokenizer_and_differ(tmp_path):
    plain, small = prepared(tmp_path), prepared(tmp_path, model=str(LAB_SMALL))
    check_alike({"plain": plain, "small": small, "other": prepared(tmp_path, prefix="Never heard of {topic}.")})
    with pytest.raises(UserError, match="teachers plain and again are the same"):
        check_alike({"plain": plain, "small": small, "again": prepared(tmp_path, batch_size=3)})
    theirs = replace(small, provenance=small.provenance | {"tokenizer_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"teachers plain and small: .* have different tokenizers"):
        check_alike({"plain": plain, "small": theirs})
    rendered = replace(small, rows=[replace(row, student_ids=[1, *row.student_ids]) for row in small.rows])
    with pytest.raises(UserError, match="render the same questions differently"):
        check_alike({"plain": plain, "small": rendered})
