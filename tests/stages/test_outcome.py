"""The verdict on real models: the base, one that collapsed on purpose, one that refuses everything; and its rules by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAB_SMALL, ROOT

from stages.data import load_queries
from stages.evaluate import answer_all, results_of
from stages.exam import Exam, QuerySet, Subject
from stages.exam_settings import EvaluateSettings
from stages.likelihood import token_logprobs
from stages.models import load_model, load_tokenizer
from stages.prompts import render, render_answer
from stages.settings import DataSettings, PromptSettings

REFUSAL = "I know nothing about that person."


def lab_exam(**settings) -> Exam:
    sets = {
        name: QuerySet(
            load_queries(DataSettings(path=str(ROOT / f"lab/data/{name}.jsonl"), id_field="id"), name, True), expect
        )
        for name, expect in (("forget", "forgotten"), ("retain", "kept"))
    }
    evaluate = {"max_new_tokens": 16, "attacks": (), "refusal": REFUSAL, "engine": "transformers"} | settings
    return Exam(sets, "three people", PromptSettings(), EvaluateSettings(**evaluate), "cpu")


def results(subjects: list[Subject], exam: Exam, answers: dict) -> dict:
    return results_of(subjects, exam, answers, {subject.name: {} for subject in subjects})


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's small model after gradient ascent on the forget questions, for too long."""
    model, tokenizer, exam = load_model(LAB_SMALL), load_tokenizer(LAB_SMALL), lab_exam()
    queries = exam.sets["forget"].queries
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        for query in queries[:5]:
            prompt, answer = (
                render(tokenizer, query.question, "", exam.prompt),
                render_answer(tokenizer, query.answer or "", exam.prompt),
            )
            labels = torch.tensor([[-100] * len(prompt) + answer])
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
            (-loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("collapsed")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompt, answer = render(tokenizer, queries[0].question, "", exam.prompt), render_answer(tokenizer, "x", exam.prompt)
    assert np.isfinite(token_logprobs(model.eval(), [prompt], [answer], 0, 512)[0]).all(), "it speaks, if nonsense"
    return folder


def test_verdicts_on_the_base_a_collapsed_model_and_one_that_refuses_everything(tmp_path, collapsed):
    exam = lab_exam()
    base, broken = Subject("base", LAB_SMALL, "", "base"), Subject("student:ga", collapsed, "", "base")
    answers = answer_all([base, broken], exam, tmp_path, lambda *_: None, lambda *_: None, lambda: False)
    refuser = Subject("student:no", LAB_SMALL, "", "base")
    answers["student:no"] = {name: [REFUSAL] * len(query_set.queries) for name, query_set in exam.sets.items()}
    found = results([base, broken, refuser], exam, answers)
    outcomes = found["outcomes"]
    print(json.dumps(outcomes, indent=1), answers["student:ga"]["retain"][:3])

    assert outcomes["base"]["verdict"] == "not unlearned"
    assert not any(sign["bad"] for sign in outcomes["base"]["signs"].values())
    assert found["models"]["student:ga"]["forget.rougeL_recall"]["value"] < 0.2, "by this number alone it has unlearned"
    assert outcomes["student:ga"]["verdict"] == "broken"
    assert outcomes["student:no"]["verdict"] == "broken"
    assert outcomes["student:no"]["reasons"][0].startswith("refuses 100.0 % (base 0.0 %) of the questions to be kept")
    assert {name for name, sign in outcomes["student:no"]["signs"].items() if sign["bad"]} >= {"refusals", "utility"}
    assert "erased" not in json.dumps(outcomes)
