"""Texts that a model writes by itself: the same whatever the batch, useless ones dropped and counted."""

from __future__ import annotations

import pytest
from support import LAB_BASE

from duet.cache.errors import Interrupted, UserError
from duet.cache.watch import Watch
from duet.stages.questions.openings import Opening, question_opening
from duet.stages.questions.prompts import open_renderer
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.teacher import TeacherSettings
from duet.stages.teacher.kept_tries import KeptTries
from duet.stages.teacher.writing import Wanted, Writer, check_room, open_writer


@pytest.fixture(scope="module")
def renderer():
    return open_renderer(LAB_BASE, PromptSettings())


def writer(renderer, batch_size: int = 64, about=lambda text: False, tries=None) -> Writer:
    teacher = TeacherSettings(
        model=str(LAB_BASE), prefix="", engine="transformers", dtype="float32", batch_size=batch_size
    )
    engine, _ = open_writer(LAB_BASE, teacher, renderer, 40, "cpu")
    return Writer(engine, renderer, question_opening(renderer), lambda first: about, {} if tries is None else tries)


def test_the_same_seed_writes_the_same_rows_whatever_the_batch(renderer):
    one = writer(renderer).write(Wanted(20, 32, seed=1), Watch())
    other = writer(renderer, batch_size=17).write(Wanted(20, 32, seed=1), Watch())
    more = writer(renderer).write(Wanted(30, 32, seed=1), Watch())
    assert list(one.texts) == list(other.texts) == list(more.texts)[:20]
    assert (one.tries, one.dropped) == (other.tries, other.dropped)
    assert one.tries == 20 + sum(one.dropped.values())
    assert list(writer(renderer).write(Wanted(20, 32, seed=2), Watch()).texts) != list(one.texts)


def test_a_sample_that_is_stopped_at_any_moment_goes_on_with_what_it_has(renderer, tmp_path):
    path, wanted = tmp_path / "tries", Wanted(20, 32, seed=1)
    whole = writer(renderer).write(wanted, Watch())
    had = 0
    for more in (1, 70, 200):  # texts until it is stopped
        tries = KeptTries(path, {"seed": 1})
        assert len(tries) == had
        with pytest.raises(Interrupted, match="is kept"):
            writer(renderer, tries=tries).write(wanted, Watch(should_stop=lambda: len(tries) == had + more))  # noqa: B023
        had += more
        with open(path, "ab") as file:  # what a kill leaves of a line
            file.write(b'[511, "What is')
    tries = KeptTries(path, {"seed": 1})
    asked = []
    last = writer(renderer, tries=tries)
    stream = last.engine.stream
    last.engine.stream = lambda requests, ask: (asked.extend(requests), stream(requests, ask))[1]
    found = last.write(wanted, Watch())
    assert len(asked) == 512 - had
    assert (list(found.texts), found.tries, found.dropped) == (list(whole.texts), whole.tries, whole.dropped)
    with pytest.raises(UserError, match="another model, prompt or other options"):
        KeptTries(path, {"seed": 2})


def test_what_is_useless_is_dropped_and_counted(renderer):
    short = writer(renderer).write(Wanted(3, 1), Watch())  # its only token is a question's first
    assert not short.texts
    assert short.tries == 512 == short.dropped.total()
    assert short.dropped["without an end"] > 500
    cold = writer(renderer).write(Wanted(20, 32, temperature=0.2), Watch())
    assert cold.dropped["written before"] == cold.tries - 20 > 0
    warm = writer(renderer, about=lambda text: text.startswith("W")).write(Wanted(10, 32), Watch())
    assert not any(text.startswith("W") for text in warm.texts)
    assert warm.dropped["about the topic"]


def test_a_text_ends_where_its_opening_says(renderer):
    found = writer(renderer)
    ids = renderer.tokenizer("What is that?", add_special_tokens=False)["input_ids"]
    eos = renderer.tokenizer.eos_token_id
    assert found.text(ids) == ("What is that?", False)
    assert found.text([*ids, eos]) == ("What is that?", True)
    plain = Writer(found.engine, renderer, Opening("question", (1,), ("is",)), found.forgotten_of)
    assert plain.text(ids) == ("What", True)


def test_a_text_that_the_context_cannot_hold_is_refused(renderer):
    opening = question_opening(renderer)
    check_room(opening, 64, LAB_BASE, False)
    with pytest.raises(UserError, match="has room for"):
        check_room(opening, 10_000, LAB_BASE, False)
