"""MUSE's KnowMem: its prompt, its cut, its score, and real questions through a real model."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from support import SHARED, write_jsonl

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.evaluate.answers import answer_all, session_of
from duet.stages.evaluate.muse import cut, knowmem, load_shots
from duet.stages.evaluate.results import results_of
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import DataSettings, EvaluationSet, PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

BOOKS = SHARED / "data/muse_books_qa"
MODEL = SHARED / "models/tofu-lab"


def test_an_answer_ends_where_the_next_question_begins():
    assert cut("Grawp\n\nQuestion: Who?") == "Grawp"
    assert cut(" Grawp\nQuestion: Who?") == " Grawp"
    assert cut("Grawp Question: Who?") == "Grawp "
    assert cut("\n\nGrawp") == ""
    assert cut("the\nquestion") == "the\nquestion"


def test_no_stemmer():
    answers, outputs = ["the running dogs", "a hundred points"], ["the run dogs", "fifty points, a hundred points"]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(a, o)["rougeL"].fmeasure for a, o in zip(answers, outputs, strict=True)]
    assert knowmem(answers, outputs).tolist() == expected
    assert expected[0] == pytest.approx(2 / 3), "with a stemmer it would be 1"


def test_too_few_shots_are_an_error(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}] * 3))
    settings = EvaluationSet(path=path, expect="kept", shots=DataSettings(path=path), num_shots=2)
    assert [shot.answer for shot in load_shots(settings, "x")] == ["a", "a"]
    with pytest.raises(UserError, match=r"num_shots is 10, .* gives 3"):
        load_shots(settings.model_copy(update={"num_shots": 10}), "x")
    assert load_shots(EvaluationSet(path=path, expect="kept"), "x") == ()
    messages = [{"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Q?"))]
    talks = str(write_jsonl(tmp_path / "talks.jsonl", [{"messages": messages, "answer": "a"}]))
    with pytest.raises(UserError, match=r"x.shots: row '0' is a conversation"):
        load_shots(settings.model_copy(update={"shots": DataSettings(path=talks), "num_shots": 1}), "x")


@pytest.mark.skipif(
    not (BOOKS.is_dir() and MODEL.is_dir()), reason="needs ../shared/data and ../shared/models/tofu-lab"
)
def test_books_through_a_real_model(tmp_path):
    shots = tuple(load_queries(DataSettings(path=str(BOOKS / "forget_qa_icl.jsonl")), "shots", need_answers=True))
    rows = load_queries(DataSettings(path=str(BOOKS / "forget_qa.jsonl"), rows=(0, 4)), "forget", need_answers=True)
    prompt = PromptSettings(
        format="plain", prefix_placement="text", template="Question: {question}\nAnswer:", bos="always"
    )
    settings = EvaluateSettings(max_new_tokens=32, attacks=(), engine="transformers", dtype="float32")
    tofu = Query("0", "What is the full name of the author born in Taipei?", "Hsiao Yun-Hwa")
    exam = Exam(
        {"books": QuerySet(rows, "forgotten", shots[:4]), "plain": QuerySet([tofu], "kept")},
        "t",
        prompt,
        settings,
        "cpu",
    )
    subjects = [Subject("base", MODEL, "", "base"), Subject("teacher", MODEL, "Forget the books.", "base")]

    session = session_of(MODEL, exam, subjects)
    tokenizer = session.tokenizer
    (base_ids,), (teacher_ids,) = (session.prompts(s, "muse.knowmem.books")[:1] for s in subjects)
    shown = "".join(f"Question: {s.question}\nAnswer: {s.answer}\n\n" for s in shots[:4])
    asked = f"Question: {rows[0].question}\nAnswer: "
    assert tokenizer.decode(base_ids, skip_special_tokens=True) == shown + asked
    assert tokenizer.decode(teacher_ids, skip_special_tokens=True) == "Forget the books.\n" + shown + asked
    assert base_ids[0] == teacher_ids[0] == tokenizer.bos_token_id

    answers = answer_all(subjects, exam, tmp_path, Watch())
    found = results_of(subjects, exam, answers)[0]
    said = answers["base"]["muse.knowmem.books"]
    assert not any("\n\n" in text or "Question:" in text for text in said)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = np.mean([scorer.score(q.answer or "", o)["rougeL"].fmeasure for q, o in zip(rows, said, strict=True)])
    score = found["models"]["base"]["books.muse.knowmem"]
    assert (score["value"], score["n"]) == (pytest.approx(expected), 4)
    assert "plain.muse.knowmem" not in found["models"]["base"]
    assert set(found["floors"]["books.muse.knowmem"]) == {"refusal", "echo"}
    assert found["definitions"]["muse.knowmem"].startswith("MUSE's KnowMem")
