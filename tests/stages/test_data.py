"""Query sets: what is read, what is selected, and what is refused with the place and a hint."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl

from cache.errors import UserError
from stages.data import load_queries
from stages.settings import DataSettings

ROWS = [{"id": f"q{i}", "question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(10)]


def load(path, need_answers=False, **more):
    return load_queries(DataSettings(path=str(path), **more), "data.forget", need_answers)


def test_jsonl_parquet_and_a_hugging_face_data_set_give_the_same(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "hub").mkdir()
    for path in (tmp_path / "a.parquet", tmp_path / "hub" / "train-00000-of-00001.parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    queries = load(tmp_path / "a.jsonl", id_field="id")
    assert [(q.row_id, q.question, q.answer) for q in queries] == [(r["id"], r["question"], r["answer"]) for r in ROWS]
    assert load(tmp_path / "a.parquet", id_field="id") == queries
    assert load(f"hf://{tmp_path / 'hub'}", id_field="id") == queries


def test_rows_and_sample_select_in_file_order(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert [q.row_id for q in load(path, rows=(2, 5))] == ["2", "3", "4"]
    drawn = [int(q.row_id) for q in load(path, rows=(2, 9), sample=4)]
    assert len(drawn) == 4
    assert drawn == sorted(drawn)
    assert set(drawn) <= set(range(2, 9))
    assert drawn == [int(q.row_id) for q in load(path, rows=(2, 9), sample=4)]
    assert drawn != [int(q.row_id) for q in load(path, rows=(2, 9), sample=4, sample_seed=1)]


def test_answers_may_be_absent_unless_needed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q?"}])
    assert load(path)[0].answer is None
    with pytest.raises(UserError, match="no field 'answer'"):
        load(path, need_answers=True)


def test_multiple_choice_gives_the_text_of_the_right_choice(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "choices": ["a", "b"], "answer": 1}])
    assert load(path, choices_field="choices")[0].answer == "b"
    for answer in (2, -1, "b"):
        write_jsonl(path, [{"question": "Q?", "choices": ["a", "b"], "answer": answer}])
        with pytest.raises(UserError, match="not an index into its choices"):
            load(path, choices_field="choices")


def test_further_answers_are_read_where_their_fields_are_named(tmp_path):
    row = {"question": "Q?", "answer": "a", "other": "in other words", "wrong": ["b", "c"]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert (load(path)[0].paraphrased, load(path)[0].perturbed) == (None, None)
    (query,) = load(path, paraphrased_field="other", perturbed_field="wrong")
    assert (query.paraphrased, query.perturbed) == ("in other words", ("b", "c"))


WRONG_ANSWERS = '{"question": "Q?", "wrong": ["b", ""], "none": [], "text": "b"}\n'
BAD_FILES = {
    "no such file": (None, {}),
    "has no rows": ("", {}),
    "no field 'question'": ('{"query": "Q?"}\n', {}),
    "expected text": ('{"question": 7}\n', {}),
    "line 2 is not JSON": ('{"question": "Q?"}\n{oops\n', {}),
    "expected an object": ("[1]\n", {}),
    "duplicate id 'x'": ('{"question": "Q?", "id": "x"}\n{"question": "R?", "id": "x"}\n', {"id_field": "id"}),
    "no field 'paraphrase'": (WRONG_ANSWERS, {"paraphrased_field": "paraphrase"}),
    "no field 'others'": (WRONG_ANSWERS, {"perturbed_field": "others"}),
    r"\['b', ''\] in field 'wrong', expected a list of wrong answers": (WRONG_ANSWERS, {"perturbed_field": "wrong"}),
    r"\[\] in field 'none', expected a list of wrong answers": (WRONG_ANSWERS, {"perturbed_field": "none"}),
    "'b' in field 'text', expected a list of wrong answers": (WRONG_ANSWERS, {"perturbed_field": "text"}),
    "no field 'uid'": ('{"question": "Q?"}\n', {"id_field": "uid"}),
    "not a range": ('{"question": "Q?"}\n', {"rows": (0, 2)}),
    "2 rows wanted, 1 are there": ('{"question": "Q?"}\n', {"sample": 2}),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files_are_refused_with_place_and_hint(tmp_path, message):
    text, more = BAD_FILES[message]
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(path, **more)
    assert "data.forget" in caught.value.what
    assert "bad.jsonl" in caught.value.what
    assert caught.value.hint


def test_unknown_kinds_and_unreachable_data_sets_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("question\nQ?\n")
    (tmp_path / "a.parquet").write_text("no parquet")
    for path, message in ((tmp_path / "a.csv", "unknown kind"), (tmp_path / "a.parquet", "not a Parquet file")):
        with pytest.raises(UserError, match=message):
            load(path)
    with pytest.raises(UserError, match="cannot load"):
        load(f"hf://{tmp_path / 'nowhere'}")
