"""What stage one plans: the rows of every request behind its own prefix, and teachers that fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import LAB_BASE, LAB_SMALL, write_jsonl

from duet.cache.errors import UserError
from duet.stages.settings.data import DataSettings, ForgetRequest, PromptSettings, RequestData, TrainingData
from duet.stages.settings.teacher import StoreSettings, TeacherSettings, rows_with_prefix
from duet.stages.teacher.plan import Prepared, plan_for
from duet.stages.teacher.prepare import Questions, check_alike, prepare

TEACHER = TeacherSettings(model=str(LAB_BASE), prefix="Forget {topic}.", dtype="float32", engine="transformers")
PLAIN = PromptSettings()


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
        prefix_on="all",
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


def test_what_a_request_forgets_it_may_keep_only_where_the_teacher_answers_both_alike(tmp_path):
    """Without the prefix on rows to be kept, one prompt would have two answers to learn."""
    given = data(tmp_path).model_copy(update={"retain": asked(tmp_path, "both", "Zoe", "Ann")})
    with pytest.raises(UserError, match="to be kept and to be forgotten: 'retain/q1' and 'forget/q0'"):
        broad_rows(tmp_path, given)
    for alike in ({"prefix_on": "all"}, {"prefix": ""}):
        assert len(broad_rows(tmp_path, given, **alike).rows) == 4


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


def with_broad(tmp_path: Path, **sources) -> TrainingData:
    return data(tmp_path).model_copy(update={"broad": TrainingData.model_validate(
        {"forget": {"path": "x"}, "retain": {"path": "x"}, "broad": sources}).broad})  # fmt: skip


def broad_rows(tmp_path: Path, given: TrainingData, prompt: PromptSettings = PLAIN, **more) -> Prepared:
    return prepare(TEACHER.model_copy(update=more), Questions(prompt, given, "Ann"), "cpu")


def test_the_prefix_is_on_the_forget_set_unless_the_settings_say_all(tmp_path):
    """Rows to be kept are the model's own; the identity of a store with the prefix on all rows is as it ever was."""
    bob = request(tmp_path, "bob", "Bob", ("Yan",))
    found = prepared(tmp_path, bob)
    for row in found.rows:
        assert (row.teacher_ids == row.student_ids) == (row.subset != "forget"), row.row_id
    assert found.provenance["prefix_on"] == "forget"
    assert found.provenance == prepared(tmp_path, bob, prefix_on="forget").provenance
    everywhere = prepared(tmp_path, bob, prefix_on="all")
    assert "prefix_on" not in everywhere.provenance
    assert [rows_with_prefix(of.provenance) for of in (found, everywhere)] == ["forget", "all"]
    assert [row.student_ids for row in everywhere.rows] == [row.student_ids for row in found.rows]
    check_alike({"all": everywhere, "forget": found})
    plans = [plan_for(of, StoreSettings(), "transformers").fingerprint for of in (found, everywhere)]
    assert len(set(plans)) == 2


def test_without_a_prefix_there_is_no_row_to_put_it_on(tmp_path):
    """A silent teacher's store is the same whatever the setting says; of requests with prefixes of their own it is not."""
    bare = [prepared(tmp_path, prefix="", prefix_on=on) for on in ("all", "forget")]
    assert bare[0].provenance == bare[1].provenance
    assert rows_with_prefix(bare[0].provenance) == "no"
    own = request(tmp_path, "eve", "Eve", ("Yan",), prefix="Never {topic}!")
    behind = [prepared(tmp_path, own, prefix="", prefix_on=on).provenance for on in ("all", "forget")]
    assert [rows_with_prefix(of) for of in behind] == ["all", "forget"]
    assert behind[0] != behind[1]


def test_broad_questions_follow_the_others_and_the_teacher_answers_them(tmp_path):
    """Behind the main prefix, whatever further requests there are; where only forget rows have it, without."""
    rows = [{"q": "Where is Rome?"}, {"q": "What is two?"}]
    people = asked(tmp_path, "people", "Eve", "Bo").model_dump()
    more = {"path": str(write_jsonl(tmp_path / "more.jsonl", rows)), "question_field": "q"}
    given = with_broad(tmp_path, people=people, more=more)
    found = broad_rows(tmp_path, given, prefix_on="all")
    assert [row.row_id for row in found.rows] == [
        "forget/q0", "forget/q1", "retain/q0",
        "broad/people/q0", "broad/people/q1", "broad/more/0", "broad/more/1",
    ]  # fmt: skip
    assert all(row.given_ids is None for row in found.rows)
    assert all("Forget Ann." in found.tokenizer.decode(row.teacher_ids) for row in found.rows)
    plan = plan_for(found, StoreSettings(), "transformers")
    assert plan.subsets == {"forget": 2, "retain": 1, "broad": 4}
    assert {name: one["rows"] for name, one in plan.provenance["data"]["broad"].items()} == {"people": 2, "more": 2}
    alone = broad_rows(tmp_path, given)
    assert all(row.teacher_ids == row.student_ids for row in alone.rows if row.subset == "broad")
    without = broad_rows(tmp_path, data(tmp_path))
    assert "broad" not in without.provenance["data"]
    assert [row.row_id for row in without.rows] == [row.row_id for row in found.rows[:3]]
    first = prepare(TEACHER, Questions(PLAIN, given, "Ann", limit=1), "cpu")
    assert [row.row_id for row in first.rows] == ["forget/q0", "retain/q0", "broad/people/q0", "broad/more/0"]


def test_given_responses_are_those_of_forget_and_retain_rows_alone(tmp_path):
    rows = [{"question": "Who is Zoe?", "answer": "A smith."}]
    path = {"path": str(write_jsonl(tmp_path / "answered.jsonl", rows))}
    others = {"path": str(write_jsonl(tmp_path / "forget.jsonl", [{"question": "Who is Ann?", "answer": "A cook."}]))}
    given = TrainingData.model_validate({"forget": others, "retain": path, "broad": {"a": asked(tmp_path, "a", "Eve")}})
    found = broad_rows(tmp_path, given, responses="given", max_positions=2)
    assert [row.given_ids is None for row in found.rows] == [False, False, True]
    assert [row.positions(2) for row in found.rows] == [2, 2, 2]


def test_no_broad_query_is_to_be_forgotten_and_one_that_is_kept_already_is_told(tmp_path, caplog):
    with pytest.raises(UserError, match="among the broad ones and to be forgotten: 'broad/a/q0' and 'forget/q1'"):
        broad_rows(tmp_path, with_broad(tmp_path, a=asked(tmp_path, "a", "Anna")))
    caplog.set_level("INFO")
    broad_rows(tmp_path, with_broad(tmp_path, a=asked(tmp_path, "a", "Eve", "Zoe")))
    assert "1 broad queries are retain queries too, the first 'broad/a/q1'" in caplog.text


@pytest.mark.parametrize("on", ["all", "forget"])
@pytest.mark.parametrize("prompt", [PLAIN, PromptSettings(format="plain", prefix_placement="text", bos="never")])
def test_both_sides_read_a_document_from_its_beginning(tmp_path, caplog, on, prompt):
    text = tmp_path / "a.txt"
    text.write_text("Rome lies on the river Tiber, and was not built in a day.\n\nHi\n", encoding="utf-8")
    given = with_broad(tmp_path, a={"documents": str(text), "max_tokens": 12})
    caplog.set_level("INFO")
    found = broad_rows(tmp_path, given, prompt, prefix_on=on)
    *_, first, second = found.rows
    assert [first.row_id, second.row_id] == ["broad/a/0", "broad/a/1"]
    for row, beginning, length in ((first, "Rome", 12), (second, "Hi", None)):
        assert row.given_ids is not None
        read = [*row.student_ids, *row.given_ids]
        spoken = found.tokenizer.decode(read, skip_special_tokens=True).strip()
        assert spoken.startswith(beginning) or beginning.startswith(spoken)
        in_front = 1 if found.tokenizer.bos_token_id == read[0] else 0
        assert length is None or len(read) == length + in_front
        assert list(row.teacher_ids)[-len(row.student_ids) :] == list(row.student_ids) or on == "all"
        before = found.tokenizer.decode(row.teacher_ids)
        assert ("Forget Ann." in before) == (on == "all")
    assert "data.broad.a: 1 of 2 documents are longer than is read" in caplog.text
    assert found.max_positions == len(first.given_ids)
    plan = plan_for(found, StoreSettings(), "transformers")
    assert (plan.max_positions, plan.provenance["max_positions"]) == (len(first.given_ids), 1)
    assert found.request(len(found.rows) - 1).given_ids == second.given_ids


@pytest.mark.parametrize("bos", ["always", "never"])
def test_a_longer_document_may_be_read_whole_in_parts_of_like_length(tmp_path, caplog, bos):
    text = "Rome lies on the river Tiber, and was not built in a day. It has seven hills."
    (tmp_path / "a.txt").write_text(f"{text}\n\nHi there\n", encoding="utf-8")
    given = with_broad(tmp_path, a={"documents": str(tmp_path / "a.txt"), "max_tokens": 10, "longer": "split"})
    caplog.set_level("INFO")
    found = broad_rows(tmp_path, given, PromptSettings(format="plain", prefix_placement="text", bos=bos))
    *parts, second = [row for row in found.rows if row.subset == "broad"]
    assert [row.row_id for row in parts] == [f"broad/a/0/{number}" for number in range(len(parts))]
    assert second.row_id == "broad/a/1"
    read = [[*row.student_ids, *(row.given_ids or ())] for row in parts]
    bos_ids = [found.tokenizer.bos_token_id] if bos == "always" else []
    assert all(ids[: len(bos_ids)] == bos_ids for ids in read)
    alone = [ids[len(bos_ids) :] for ids in read]
    assert [i for ids in alone for i in ids] == found.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(parts) > 1
    assert max(map(len, alone)) <= 10
    assert max(map(len, alone)) - min(map(len, alone)) <= 1
    assert "longer than is read" not in caplog.text


def test_a_document_without_a_token_to_predict_is_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("Rome lies on the Tiber.\n", encoding="utf-8")
    given = with_broad(tmp_path, a={"documents": str(text)})
    with pytest.raises(UserError, match="row 'broad/a/0' has 0 tokens behind the") as caught:
        broad_rows(tmp_path, given, prefix="Forget all of it. " * 200, prompt=PromptSettings(), prefix_on="all")
    assert "prefix_on: forget" in caught.value.hint
