"""The real lm-evaluation-harness on a task file of ours, and its scores against a plain reading of the same answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from support import LAB_SMALL, ROOT, write_jsonl

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.evaluate.harness import ask_harness
from duet.stages.exam.exam import Exam, Subject
from duet.stages.models.loading import load_model
from duet.stages.models.token_scores import token_logprobs
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings, HarnessTask

pytest.importorskip("lm_eval")
SUBJECT = Subject("base", LAB_SMALL, "", "base")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Questions with the right answer among those to three other questions of the same kind."""
    asked = [json.loads(line) for line in (ROOT / "lab/data/retain.jsonl").read_text().splitlines()][:20]
    choices = sorted({row["answer"] for row in asked})
    return [
        {
            "question": row["question"],
            "choices": choices,
            "answer": (choices.index(row["answer"]) + i % 2) % len(choices),
        }
        for i, row in enumerate(asked)
    ]  # every other row has a wrong key, so that the accuracy is neither 0 nor 1


@pytest.fixture(scope="module")
def exam(tmp_path_factory, rows):
    tasks = tmp_path_factory.mktemp("tasks")
    content = {
        "task": "lab_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_jsonl(tasks / "rows.jsonl", rows))}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "lab_choice.yaml").write_text(yaml.safe_dump(content))

    def make(prompt_format: str = "plain", **task) -> Exam:
        settings = EvaluateSettings(
            lm_eval=(HarnessTask(**{"task": "lab_choice", "num_fewshot": 0} | task),), lm_eval_dir=str(tasks)
        )
        return Exam({}, "x", PromptSettings(format=prompt_format, prefix_placement="text"), settings, "cpu")

    return make


def ask(exam, tmp_path, *subjects):
    return ask_harness(subjects or (SUBJECT,), exam, tmp_path / "kept", Watch())


def test_the_harness_scores_as_a_plain_reading_does(exam, tmp_path, rows):
    (score,) = ask(exam(), tmp_path)["base"].values()
    model, tokenizer = load_model(LAB_SMALL), load_tokenizer(LAB_SMALL)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    right = []
    for row in rows:  # the harness puts a blank between text and choice
        answers = [ids(f"{row['question']} {choice}")[len(ids(row["question"])) :] for choice in row["choices"]]
        sums = [found.sum() for found in token_logprobs(model, [ids(row["question"])] * len(answers), answers, 0, 4096)]
        right.append(int(np.argmax(sums)) == row["answer"])
    assert 0 < np.mean(right) < 1
    assert score["value"] == pytest.approx(np.mean(right))
    assert score["n"] == len(rows)
    reach = 1.96 * np.std(right, ddof=1) / np.sqrt(len(rows))
    assert score["ci95"] == pytest.approx([np.mean(right) - reach, np.mean(right) + reach])


def test_few_shot_counts_and_limits_are_in_the_names_and_kept_scores_are_not_asked_again(exam, tmp_path, monkeypatch):
    asked = exam("chat", num_fewshot=2, limit=5)
    found = ask(asked, tmp_path)
    assert found["base"]["lm_eval.lab_choice/2.acc"]["n"] == 5
    monkeypatch.setattr("duet.stages.exam.reading.load_model", None)  # who loads a model now, fails
    assert ask(asked, tmp_path) == found
    with pytest.raises(TypeError):  # a teacher's prefix makes another subject
        ask(asked, tmp_path, Subject("base", LAB_SMALL, "You have forgotten everything.", "base"))


def test_an_unknown_task_is_told(exam, tmp_path):
    with pytest.raises(UserError, match="no task 'lab_chocie'"):
        ask(exam(task="lab_chocie"), tmp_path)
