"""Query sets: what is read, what is selected, and what is refused with the place and a hint."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import write_jsonl

from duet.cache.errors import UserError
from duet.stages.questions.queries import load_queries
from duet.stages.settings.data import DataSettings

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
    (tmp_path / "a.xlsx").write_text("question\nQ?\n")
    (tmp_path / "a.parquet").write_text("no parquet")
    for path, message in ((tmp_path / "a.xlsx", "unknown kind"), (tmp_path / "a.parquet", "not a Parquet file")):
        with pytest.raises(UserError, match=message):
            load(path)
    with pytest.raises(UserError, match="cannot load"):
        load(f"hf://{tmp_path / 'nowhere'}")


def table(path, text: str, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_table_gives_what_json_lines_give(tmp_path, encoding, ending):
    rows = [
        {"id": "a", "question": 'Who said "no, never"?', "answer": "Ann, of course.", "note": ""},
        {"id": "b", "question": "Two\nlines?", "answer": "Zoë.", "note": "x"},
    ]
    lines = [
        "id,question,answer,note",
        'a,"Who said ""no, never""?","Ann, of course.",',
        "",
        'b,"Two\nlines?",Zoë.,x',
        "",
    ]
    expected = load(write_jsonl(tmp_path / "a.jsonl", rows), id_field="id")
    assert load(table(tmp_path / "a.csv", ending.join(lines), encoding), id_field="id") == expected
    assert load(table(tmp_path / "A.CSV", ending.join(lines), encoding), id_field="id") == expected
    tabs = ending.join(
        ["id\tquestion\tanswer", 'a\t"Who said ""no, never""?"\tAnn, of course.', 'b\t"Two\nlines?"\tZoë.']
    )
    assert load(table(tmp_path / "a.tsv", tabs, encoding), id_field="id") == expected


BAD_TABLES = {
    "line 1: the header has no column 'question'; it has 'q', 'answer'": "q,answer\nWho?,Ann.\n",
    "line 1: the column 'question' occurs twice": "question,question\nWho?,Ann.\n",
    "line 3 has 3 cells, the header has 2": "question,answer\nWho?,Ann.\nWho, then?,Bob.\n",
    "line 4: the cell of column 'answer' is empty": 'question,answer\n"Who\nis it?",Ann.\nWhere?, \n',
    "separated by semicolons": "question;answer\nWho?;Ann.\n",
    "separated by tabs": "question\tanswer\nWho?\tAnn.\n",
    "line 3 begins a row that is not CSV": 'question,answer\nWho?,Ann.\n"Where?,Here.\n',
    "has no rows": "question,answer\n",
    "'question;answer, if any' seem to be separated by semicolons": "question;answer, if any\nWho?;Ann.\n",
    "Excel's own line 'sep='": "sep=,\nquestion,answer\n",
    "line 2 has 2 cells, the header has 3": "question,answer,note\nWho?,Ann.\n",
    "line 2 has 4 cells, the header has 2": "question,answer\nWho?,Ann.,,\n",
    "line 3 repeats the header": "question,answer\nWho?,Ann.\n\ufeffquestion,answer\nWhy?,No.\n",
    "line 2: a space stands before the quotes of column 'answer'": 'question,answer\nWho?, "Ann."\n',
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_a_table_that_is_not_as_it_should_be_is_refused_with_its_line(tmp_path, message):
    with pytest.raises(UserError) as caught:
        load(table(tmp_path / "a.csv", BAD_TABLES[message]))
    assert message in caught.value.what
    assert str(tmp_path / "a.csv") in caught.value.what
    assert caught.value.hint


def test_a_table_holds_no_lists(tmp_path):
    path = table(tmp_path / "a.csv", "question,answer,choices\nWho?,0,\"['a']\"\n")
    for setting in ("choices_field", "perturbed_field"):
        with pytest.raises(UserError, match="must hold lists"):
            load(path, **{setting: "choices"})


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize(("encoding", "what"), [("latin-1", "byte 0xeb"), ("utf-16", "UTF-16")])
def test_another_encoding_is_refused_with_the_line(tmp_path, name, encoding, what):
    lines = {"a.csv": "question,answer\nWho?,Zoë.\n", "a.jsonl": '{"question": "?"}\n{"question": "Zoë?"}\n'}[name]
    with pytest.raises(UserError, match=r"line \d is not UTF-8") as caught:
        load(table(tmp_path / name, lines, encoding))
    assert f"line {2 if encoding == 'latin-1' else 1} is" in caught.value.what
    assert what in caught.value.what


def test_a_directory_is_refused_with_the_files_in_it(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", ROWS)
    with pytest.raises(UserError, match="is a directory") as caught:
        load(tmp_path)
    assert "mine.jsonl" in caught.value.hint


def test_only_line_ends_end_a_row_of_json_lines(tmp_path):
    question = "One\u2028two\x85three?"
    (tmp_path / "a.jsonl").write_text(f'{{"question": "{question}"}}\r\n{{"question": "?"}}', encoding="utf-8")
    assert [query.question for query in load(tmp_path / "a.jsonl")] == [question, "?"]
