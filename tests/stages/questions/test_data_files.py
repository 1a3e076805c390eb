"""Files of questions as people have them: of every form, cut off, of another kind, with holes. Read, or told in two lines."""

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


def table(path, text: str, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


ARRAY = (
    '[\n {"id": "a", "question": "Who?", "answer": "Ann."},\n {"id": "b", "question": "Zoë 🙂?", "answer": "No."}\n]'
)
SAME_ROWS = {  # one array, whatever the form and the end of the file's name
    "array": ARRAY,
    "byte-order mark": "\ufeff" + ARRAY,
    "Windows line ends": ARRAY.replace("\n", "\r\n"),
    "lines": '{"id": "a", "question": "Who?", "answer": "Ann."}\n\n{"id": "b", "question": "Zoë 🙂?", "answer": "No."}\n',
    "several lines each": '{"id": "a",\n "question": "Who?", "answer": "Ann."}\n'
    '{"id": "b",\n "question": "Zoë 🙂?", "answer": "No."}',
    "joined without a line break": '{"id": "a", "question": "Who?", "answer": "Ann."}'
    '{"id": "b", "question": "Zoë \\ud83d\\ude42?", "answer": "No."}',
}  # fmt: skip


@pytest.mark.parametrize("form", SAME_ROWS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.JSON", "a.ndjson"])
def test_json_is_read_in_every_form_under_every_name(tmp_path, name, form):
    (tmp_path / name).write_text(SAME_ROWS[form], encoding="utf-8", newline="")
    queries = load(tmp_path / name, id_field="id")
    assert [(q.row_id, q.question, q.answer) for q in queries] == [("a", "Who?", "Ann."), ("b", "Zoë 🙂?", "No.")]


BAD_JSON = {  # text -> what is told, and what to do about it
    '[{"question": "Who?"},\n]': ("line 2 is not JSON: a comma stands before a closing bracket", "take the comma out"),
    '[{"question": "Who?",}]': ("a comma stands before a closing bracket", "take the comma out"),
    '{"question": "Who?"},\n{"question": "Why?"},\n': ("line 1 is not JSON: a comma follows a row", "in [ ]"),
    '[{"question": "Who?"},\n{"question": "W': ("line 2 is not JSON: the file ends within a row", "cut off"),
    '{"question": "Who?"}\n{"question":\n': ("line 2 is not JSON: the file ends within a row", "cut off"),
    '[{"question": "Who?"}': ("the file ends within a row", "cut off"),
    '[{"question": "Who?"}] 1': ("something follows the array", "one array"),
    '[{"question": "Who?"} {"question": "Why?"}]': ("a comma or ] must follow a row", "one array"),
    '{"question": "Who?"}\n\ufeff{"question": "Why?"}': ("line 2 is not JSON: a byte-order mark", "joined"),
    '{"question": "Who\nis it?"}': ("a line break or a tab stands in a text", r"\n or \t"),
    "[{'question': 'Who?'}]": ("Expecting property name enclosed in double quotes", "one array"),
    "question,answer\nWho?,Ann.\n": ("begins with neither { nor [", ".csv"),
    '{"question": "Who?", "question": "Why?"}': ("line 1 has the key 'question' twice", "keep one"),
    "[" * 100_000: ("is nested too deeply", "one object per row"),
    '[{"question": "Who?", "n": ' + "1" * 5000 + "}]": ("cannot be read: Exceeds the limit", "in quotes"),
    '["Who?"]': ("row 0 is 'Who?', expected an object", '{"question": "…"}'),
    '{"all": [{"question": "Who?"}]}': ("lists of objects are in its 'all'", """jq -c '.["all"][]'"""),
    '{"a": {"question": "Who?"}, "b": {"question": "Why?"}}': ("holds rows by their ids", "to_entries"),
    '{"question": {"0": "Who?"}}': ("one object that holds columns", "orient='records'"),
    '{"question": ["Who?", "Why?"]}': ("one object that holds columns", "orient='records'"),
    "{}": ("row 0 has no field 'question'", "question_field"),
    "[]": ("has no rows", "at least one question"),
}


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_json_that_cannot_be_read_is_told_with_what_to_do(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.json")
    what, hint = BAD_JSON[text]
    assert what in caught.value.what
    assert hint in caught.value.hint


BAD_VALUES = {  # a row beside one that is right -> what is told of it
    "row 1: id is null": {"id": None},
    "row 1: id is NaN": {"id": float("nan")},
    "row 1 has ' ' in field 'id', expected an id": {"id": " "},
    "row 1 has True in field 'id', expected an id": {"id": True},
    "row 1 has ['x'] in field 'id', expected an id": {"id": ["x"]},
    "row 1: id holds half of a surrogate pair (\\udc00, character 1)": {"id": "x\udc00"},
    "row 1: question is null": {"question": None},
    "row 1 has '' in field 'question', expected text": {"question": ""},
    "row 1: question, message 0 has the role 'human'": {"question": [{"role": "human", "content": "Who?"}]},
    "row 1 has 7 in field 'question', expected text": {"question": 7},
    "row 1: question holds half of a surrogate pair (\\ud83d, character 3)": {"question": "Zoë\ud83d"},
    "row 1: question holds a NUL character (character 0)": {"question": "\0"},
    "row 1: answer is null": {"answer": None},
    "row 1: answer holds half": {"answer": "\ud83d"},
    "row 1: other holds half": {"other": "\ud83d"},
    "row 1: wrong, entry 1, holds half": {"wrong": ["b", "\ud83d"]},
    "row 1: wrong is null": {"wrong": None},
}


@pytest.mark.parametrize("message", BAD_VALUES)
def test_a_value_that_cannot_be_used_is_told_with_its_row(tmp_path, message):
    right = {"id": "a", "question": "Q?", "answer": "A.", "other": "a", "wrong": ["b", "c"]}
    path = write_jsonl(tmp_path / "a.jsonl", [right, right | {"id": "b"} | BAD_VALUES[message]])
    fields = {"id_field": "id", "paraphrased_field": "other", "perturbed_field": "wrong"}
    with pytest.raises(UserError) as caught:
        load(path, need_answers=True, **fields)
    assert message in caught.value.what


def test_halves_of_a_pair_are_found_in_choices(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "Q?", "choices": ["a", "\ud83d"], "answer": 0}])
    with pytest.raises(UserError, match="row 0: choices, entry 1, holds half of a surrogate pair"):
        load(path, choices_field="choices")


def test_a_long_value_is_shown_in_part(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": ["word " * 10_000]}])
    with pytest.raises(UserError) as caught:
        load(path)
    assert len(caught.value.what) < 500


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"
OTHER_KINDS = {  # the first bytes of a file -> what is told, and what to do
    POINTER.encode(): ("a Git LFS pointer", "git lfs pull"),
    b"\n<!DOCTYPE html>\n<html lang='en'>": ("a web page", "the file itself"),
    b"PK\x03\x04\x14": ("a ZIP archive", "CSV UTF-8"),
    b"\x1f\x8b\x08": ("compressed with gzip", "gunzip"),
    b"%PDF-1.7": ("a PDF file", "export"),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.xlsx", "a.jsonl.gz"])
@pytest.mark.parametrize("head", OTHER_KINDS)
def test_a_file_of_another_kind_is_told_by_its_first_bytes(tmp_path, name, head):
    (tmp_path / name).write_bytes(head)
    with pytest.raises(UserError) as caught:
        load(tmp_path / name)
    what, hint = OTHER_KINDS[head]
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_a_pointer_in_a_data_set_of_several_files_is_told(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train-00000-of-00002.parquet")
    (tmp_path / "train-00001-of-00002.parquet").write_text(POINTER)
    with pytest.raises(UserError, match=r"train-00001-of-00002.parquet is a Git LFS pointer"):
        load(f"hf://{tmp_path}")


def test_a_kind_of_file_under_another_ones_name_is_told(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.csv", ROWS)
    (tmp_path / "a.parquet").write_bytes(b"")
    for name, message in (
        ("a.jsonl", "is a Parquet file"),
        ("a.csv", "is JSON, expected a table"),
        ("a.parquet", "empty"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path / name)


def test_a_parquet_file_that_was_cut_or_overwritten_is_told_wherever_that_was(tmp_path):
    """Every way in which the file can be damaged is a UserError, or leaves what is read unchanged."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    whole, queries = path.read_bytes(), load(path, id_field="id")
    told = 0
    for at in range(4, len(whole), 7):
        for damaged in (whole[:at], whole[:at] + b"\xff" * 8 + whole[at + 8 :]):
            path.write_bytes(damaged)
            try:
                load(path, id_field="id")
            except UserError as error:
                told += "a.parquet" in error.what
    assert told > len(whole) / 7  # at least all that were cut
    path.write_bytes(whole)
    assert load(path, id_field="id") == queries


def test_columns_that_nobody_names_are_not_read(tmp_path):
    """A picture, or a time in nanoseconds, which Python has no type for, is no reason to refuse the questions."""
    table = pa.table({"question": ["Who?"], "made": pa.array([1_234_567], pa.timestamp("ns"))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [query.question for query in load(tmp_path / "a.parquet")] == ["Who?"]
    with pytest.raises(UserError, match="row 0 has no field 'query'; it has 'question', 'made'"):
        load(tmp_path / "a.parquet", question_field="query")


def test_parquet_of_other_types_is_read_or_told(tmp_path):
    path = tmp_path / "a.parquet"
    words = pa.array(["a", "b"])
    pq.write_table(pa.table({"id": words.dictionary_encode(), "question": words.cast(pa.large_string())}), path)
    assert [query.row_id for query in load(path, id_field="id")] == ["a", "b"]
    pq.write_table(pa.table({"id": pa.array([1, None]), "question": words}), path)
    with pytest.raises(UserError, match="row 1: id is null"):
        load(path, id_field="id")
    pq.write_table(pa.table({"question": [b"Who?"]}), path)
    with pytest.raises(UserError, match="row 0 has b'Who\\?' in field 'question', expected text"):
        load(path)
    pq.write_table(pa.Table.from_arrays([words, words], names=["question", "question"]), path)
    with pytest.raises(UserError, match="2 columns 'question'"):
        load(path)


def test_spreadsheets_empty_rows_at_the_end_are_not_rows(tmp_path):
    head = "id,question,answer\na,Who?,Ann.\n"
    for tail in (",,\n,,\n", " , ,\n\n,,"):
        assert len(load(table(tmp_path / "a.csv", head + tail), id_field="id")) == 1
    with pytest.raises(UserError, match="line 3: all cells are empty, and rows follow"):
        load(table(tmp_path / "a.csv", head + ",,\n,,\nb,Why?,No.\n"), id_field="id")


def test_a_cell_may_be_of_any_length(tmp_path):
    answer = "word " * 60_000
    assert load(table(tmp_path / "a.csv", f"question,answer\nWho?,{answer}\n"))[0].answer == answer


def test_columns_without_a_name_are_not_read(tmp_path):
    """pandas' index, and the empty columns to the right of a spreadsheet."""
    assert load(table(tmp_path / "a.csv", ",question,,\n0,Who?,,\n"))[0].question == "Who?"


def test_a_file_that_cannot_be_opened_and_an_address_are_told(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load(path)
    with pytest.raises(UserError, match="is an address, expected a file"):
        load("https://example.org/a.jsonl")
    with pytest.raises(UserError, match="no such file") as caught:
        load("~/a.jsonl")
    assert "~ is the shell's" in caught.value.hint


def test_utf_16_without_a_mark_is_told(tmp_path):
    path = table(tmp_path / "a.csv", "question,answer\nWho?,Ann.\n", "utf-16-le")
    with pytest.raises(UserError, match="it looks like UTF-16LE") as caught:
        load(path)
    assert f"iconv -f UTF-16LE -t UTF-8 {path}" in caught.value.hint
