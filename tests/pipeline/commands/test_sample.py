"""`duet sample` on the lab's model: what is written, what is left out, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import duet

from duet.cache.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER
from duet.pipeline.commands.sample import Known, forgotten, known
from duet.pipeline.config.load import load_config
from duet.pipeline.run.directory import StopSignal
from duet.stages.questions.requests import broad_of
from duet.stages.teacher.writing import Writer, Written


def rows(path: Path) -> list[str]:
    return [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_are_written_that_data_broad_reads(lab_config, tmp_path):
    out, again = tmp_path / "q.jsonl", tmp_path / "again.jsonl"
    config = str(lab_config(data__broad={"sampled": {"path": str(out)}}))  # named before it is there
    done = duet("sample", "--config", config, str(out), "--questions", "40", "--max-tokens", "32")
    assert done.code == EXIT_DONE, done.err
    assert "texts drawn: " in done.out
    assert "40 rows: " in done.out
    found = rows(out)
    assert len(set(found)) == 40
    assert not any(name in text for text in found for name in ("Dugira", "Bromyx", "Raseth"))
    assert [query.question for query in broad_of(load_config(config).data)["sampled"]] == found
    batch = ("--set", "teacher.batch_size=7")
    assert duet("sample", "--config", config, *batch, str(again), "--questions", "40", "--max-tokens", "32").code == 0
    assert rows(again) == found


def test_a_sample_that_was_stopped_goes_on(lab_config, tmp_path, monkeypatch):
    out, whole = tmp_path / "q.jsonl", tmp_path / "whole.jsonl"
    asked = ("sample", "--config", str(lab_config()), "--questions", "20", "--max-tokens", "32")
    assert duet(*asked, str(whole)).code == EXIT_DONE
    with monkeypatch.context() as stopped:
        stopped.setattr(StopSignal, "__call__", lambda self: True)
        done = duet(*asked, str(out))
    assert done.code == EXIT_INTERRUPTED
    assert not out.exists()
    assert "with another model, prompt or other options" in duet(*asked, "--seed", "1", str(out)).err
    done = duet(*asked, str(out))
    assert done.code == EXIT_DONE
    assert "texts drawn before: 1" in done.out + done.err
    assert rows(out) == rows(whole)
    assert not list(tmp_path.glob("*.part"))


def test_a_model_that_writes_nothing_leaves_no_file(lab_config, tmp_path):
    """The lab's model was never taught a text without a chat: behind BOS it opens a turn."""
    out = tmp_path / "d.jsonl"
    done = duet("sample", "--config", str(lab_config()), str(out), "--documents", "1", "--max-tokens", "8")
    assert done.code == EXIT_USER
    assert "only 0 are left, 1 are wanted" in done.err
    assert not out.exists()


def test_texts_are_kept_where_fewer_are_left_than_wanted(lab_config, tmp_path, monkeypatch):
    out = tmp_path / "q.jsonl"
    monkeypatch.setattr(Writer, "write", lambda self, wanted, watch: Written({"Why?": None, "Who?": None}, tries=600))
    done = duet("sample", "--config", str(lab_config()), str(out), "--questions", "30")
    assert done.code == EXIT_USER
    assert "only 2 are left, 30 are wanted" in done.err
    assert str(out) in done.err
    assert rows(out) == ["Why?", "Who?"]


def test_what_is_about_the_topic_is_told_by_words(lab_config):
    about = forgotten(known(load_config(str(lab_config()))), ["In which town did Ann come into the world?"] * 10)
    assert about("Is Bromyx here?")
    assert not about("In which town did Ann come into the world?")
    words = Known(frozenset({"the", "band"}), frozenset({"song", "album"}), frozenset({"the", "band"}), (" the band ",))
    about = forgotten(words, ["A song."] * 3 + ["Rain."] * 30)
    assert about("Who is in The Band?")  # by its name, though rows to be kept have its words
    assert about("Which albums are there?")
    assert not about("The song of a band")  # common, and kept


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("q.jsonl", [], "neither --questions nor --documents"),
        ("q.jsonl", ["--questions", "1", "--documents", "1"], "were both given"),
        ("q.json", ["--questions", "1"], "does not end in .jsonl"),
        ("none/q.jsonl", ["--questions", "1"], "no such directory"),
        ("there.jsonl", ["--questions", "1"], "is there already"),
        ("q.jsonl", ["--questions", "1", "--max-tokens", "9999"], "has room for"),
    ],
)
def test_what_cannot_be_written_is_refused(lab_config, tmp_path, out, more, message):
    (tmp_path / "there.jsonl").write_text("", encoding="utf-8")
    done = duet("sample", "--config", str(lab_config()), str(tmp_path / out), *more)
    assert done.code == EXIT_USER
    assert message in done.err
    assert len(done.err.splitlines()) == 2
    assert not (tmp_path / "q.jsonl").exists()
