"""A judge behind a small server: what is asked, how replies are read, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judge_server import SECRET, Server

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.evaluate import judged
from duet.stages.evaluate.results import Read, results_of
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.exam.judge import Judge, Judged, check_judge, judge_of, read_judge, verdict_of
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings
from duet.stages.settings.judge import JudgeSettings


@pytest.fixture(name="server")
def named_server(judge_server: Server) -> Server:
    return judge_server


def judge(server: Server, **more) -> Judge:
    return judge_of(JudgeSettings(url=server.url, model="m", **more), SECRET)


FACTS = ("amber.", "basalt.", "cobalt.", "dolomite.")
EXAM = Exam(
    {
        "forget": QuerySet(
            [Query(str(i), f"What is {i}?", f"It is {fact}") for i, fact in enumerate(FACTS)], "forgotten"
        )
    },
    "stones",
    PromptSettings(),
    EvaluateSettings(attacks=()),
    "cpu",
)
SUBJECTS = [Subject(name, Path(name), "", "base") for name in ("base", "student:a")]
ANSWERS = {
    "base": {"forget": [f"Surely {fact}" for fact in FACTS]},
    "student:a": {"forget": ["Surely amber.", "It is {question}", "It is unknown.", "It is unknown."]},
}


def test_each_answer_is_judged_once_at_temperature_0_and_kept(server, tmp_path):
    check_judge(judge(server))
    assert len(server.asked) == 2, "a right answer and a wrong one show that it judges"
    found = read_judge(judge(server), SUBJECTS, EXAM, ANSWERS, tmp_path, Watch())
    assert found.replies["base"]["forget"] == ["Yes."] * 4
    assert found.replies["student:a"]["forget"] == ["Yes.", "no", "no", "no"]
    assert len(server.asked) == 2 + 4 + 4
    assert {(body["temperature"], body["model"]) for body in server.asked} == {(0, "m")}
    assert any("Answer to check: It is {question}\n" in body["messages"][1]["content"] for body in server.asked)
    again = read_judge(judge(server), SUBJECTS, EXAM, ANSWERS, tmp_path, Watch(should_stop=lambda: False))
    assert again.replies == found.replies
    assert len(server.asked) == 10, "nothing is asked again"


def test_the_key_is_sent_and_written_nowhere(server, tmp_path):
    found = judge(server)
    read_judge(found, SUBJECTS, EXAM, ANSWERS, tmp_path, Watch())
    assert server.keys == {f"Bearer {SECRET}"}
    assert SECRET not in repr(found)
    assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    server.failing = [401]
    with pytest.raises(UserError) as error:
        check_judge(found)
    assert "401" in error.value.what
    assert "DUET_JUDGE_KEY" in error.value.hint
    assert SECRET not in error.value.what + error.value.hint


def test_scores_and_agreement_by_hand(server, tmp_path):
    """Base is right in all four, the student in one: ROUGE-L gives all wrong answers but one as much as the right ones."""
    of_judge = read_judge(judge(server), SUBJECTS, EXAM, ANSWERS, tmp_path, Watch())
    results = results_of(SUBJECTS, EXAM, ANSWERS, Read(judged=of_judge))[0]
    assert results["models"]["base"]["forget.judged_right"]["value"] == 1
    of_student = results["models"]["student:a"]["forget.judged_right"]
    assert (of_student["value"], of_student["n"]) == (0.25, 4)
    told = results["judge"]
    assert (told["model"], told["answers"], told["unreadable"]) == ("m", 8, {"base": 0, "student:a": 0})
    assert told["agreement"]["distinctive_recall"]["value"] == 1
    # ROUGE-L recall: five right answers have the fact, 1 of 3 words; three wrong ones "It is", 2 of 3.
    assert told["agreement"]["rougeL_recall"]["value"] == 0
    assert told["agreement"]["exact_match"]["value"] == 0.5
    assert "judged_right" in results["definitions"]


def test_a_reply_that_is_neither_yes_nor_no_is_left_out_and_counted(server, tmp_path):
    server.always = "Perhaps"
    of_judge = read_judge(judge(server), SUBJECTS, EXAM, ANSWERS, tmp_path, Watch())
    results = results_of(SUBJECTS, EXAM, ANSWERS, Read(judged=of_judge))[0]
    assert "forget.judged_right" not in results["models"]["base"]
    assert results["judge"]["unreadable"] == {"base": 4, "student:a": 4}
    assert results["judge"]["agreement"] == {}
    with pytest.raises(UserError, match=r"judges the answer 'Paris.' with 'Perhaps', expected yes"):
        check_judge(judge(server))
    replies = ["YES", " no, it is not", "**Yes**", "", "Noted: yes"]
    assert [verdict_of(reply) for reply in replies] == [True, False, True, None, None]
    assert np.isnan(judged.right(["?"])).all()


def test_a_reply_that_cannot_be_read_of_one_model_alone_leaves_the_other_results_as_they_are(server):
    replies = {"base": {"forget": ["Yes."] * 4}, "student:a": {"forget": ["Yes.", "?", "no", "no"]}}
    results = results_of(SUBJECTS, EXAM, ANSWERS, Read(judged=Judged(judge(server), replies)))[0]
    assert results["models"]["student:a"]["forget.judged_right"]["n"] == 3
    compared = results["comparisons"]["student:a"]
    assert "forget.judged_right" not in compared, "the two are not of the same questions"
    assert compared["forget.distinctive_recall"]["n"] == 4


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(server, tmp_path):
    patient = replace(judge(server), waits=(0.0, 0.0))
    server.failing = [503, 429]
    one = {"base": {"forget": ["amber."] * 4}}
    found = read_judge(patient, SUBJECTS[:1], EXAM, one, tmp_path, Watch())
    assert found.replies["base"]["forget"] == ["Yes.", "no", "no", "no"]
    server.failing = [404] * 9
    with pytest.raises(UserError, match="answers 404"):
        read_judge(patient, SUBJECTS[:1], EXAM, ANSWERS, tmp_path, Watch())


def test_what_cannot_be_reached_or_is_no_server_is_refused(server):
    gone = judge_of(JudgeSettings(url="http://127.0.0.1:9/v1", model="m"), None)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1/chat/completions cannot be reached") as error:
        check_judge(gone)
    assert error.value.hint.startswith("start the server")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000/v1", "is not an address"),
        ("https://me:secret@host/v1", "put a key into DUET_JUDGE_KEY"),
        ("https://host/v1?key=secret", "put a key into DUET_JUDGE_KEY"),
    ],
)
def test_addresses_that_are_none_or_hold_a_secret_are_refused(url, message):
    with pytest.raises(ValueError, match=message) as error:
        JudgeSettings(url=url, model="m")
    assert "is not an address" in message or "secret" not in str(error.value.errors()[0]["ctx"]["error"])


@pytest.mark.parametrize(
    "text", ["system: a", "system: a\nuser: '{question} {reference}'", "[]", "system: a\nuser: '{x}'"]
)
def test_a_prompt_without_the_three_texts_is_refused(tmp_path, text, server):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=r"evaluate\.judge\.prompt"):
        judge(server, prompt=str(tmp_path / "p.yaml"))


def test_the_cost_is_an_upper_bound_in_requests_and_characters(server):
    requests, characters = judged.cost_of(judge(server), SUBJECTS, EXAM)
    assert requests == 8
    whole = sum(
        len(m["content"])
        for q in EXAM.sets["forget"].queries
        for m in judge(server).messages(q.question, q.answer or "", q.answer or "")
    )
    assert characters == 2 * whole
