"""Plain documents of each kind of file, and files that hold none."""

from __future__ import annotations

import pytest
from support import write_jsonl

from duet.cache.errors import UserError
from duet.stages.questions.documents import load_documents


def test_documents_of_both_kinds_of_file(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n\none\nline two\n \n\ntwo\n", encoding="utf-8")
    assert load_documents(str(text), "x") == ["one\nline two", "two"]
    rows = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", "more": 1}])
    assert load_documents(str(rows), "x") == ["one", "two"]
    for name, content, message in (
        ("b.jsonl", '{"txt": "a"}\n', "row 0 has no text in a field 'text'"),
        ("c.jsonl", "{\n", "line 1 is not JSON"),
        ("d.txt", " \n", "has no text"),
        ("e.csv", "a", "unknown kind of file"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_documents(str(tmp_path / name), "x")
    with pytest.raises(UserError, match="no such file"):
        load_documents(str(tmp_path / "f.txt"), "x")
