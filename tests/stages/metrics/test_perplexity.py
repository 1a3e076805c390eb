"""Perplexity: by hand, against the library's loss, in windows; the files it reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import LAB_SMALL, write_jsonl

from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, Subject
from duet.stages.exam.given_texts import not_finite, scores_of
from duet.stages.exam.reading import read_all
from duet.stages.metrics.perplexity import perplexity, windows
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

TEXTS = ["The lamp was lit at nine.", "Nobody came to the harbour that evening, and the boats lay still.", "Rain."]


def test_perplexity_weighs_by_tokens():
    losses, tokens = np.array([2.0, 12.0]), np.array([2, 4])
    score = perplexity(losses, tokens, seed=3)
    assert (score.value, score.n) == (pytest.approx(math.exp(14 / 6)), 2)
    assert score.ci95 == pytest.approx((math.exp(1), math.exp(3))), "either document twice"


def test_windows_cover_a_document_and_predict_each_token_once():
    ids = list(range(10))
    assert windows(ids, [99], 5) == [([99], [0, 1, 2, 3]), ([99], [4, 5, 6, 7]), ([99], [8, 9])]
    assert windows(ids, [], 4) == [([0], [1, 2, 3]), ([4], [5, 6, 7]), ([8], [9])]
    assert windows([7], [], 4) == []
    assert windows([7], [99], 4) == [([99], [7])]


def test_a_document_of_which_nothing_is_predicted_does_not_count():
    readings = {"neutral": {"losses": [0.0, 12.0], "tokens": [0, 4]}}
    exam = Exam({}, "t", PromptSettings(), EvaluateSettings(), "cpu")
    score = scores_of(readings, exam)["neutral.perplexity"]
    assert (score.value, score.n, score.ci95) == (math.exp(3), 1, (math.exp(3), math.exp(3)))
    assert scores_of({"neutral": {"losses": [0.0], "tokens": [0]}}, exam) == {}
    assert not_finite(readings) == 0
    assert not_finite({"neutral": {"losses": [None, 8000.0, 3.0], "tokens": [3, 10, 1]}}) == 2


def test_a_model_reads_as_the_librarys_loss_says(tmp_path):
    settings = EvaluateSettings(neutral_text=str(tmp_path / "a.jsonl"), likelihood=False)
    exam = Exam({}, "t", PromptSettings(), settings, "cpu")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    subjects = [Subject("base", LAB_SMALL, "", "base"), Subject("teacher", LAB_SMALL, "You have forgotten.", "base")]
    _, readings = read_all(subjects, exam, tmp_path, tmp_path, Watch())

    model, tokenizer = load_model(LAB_SMALL), load_tokenizer(LAB_SMALL)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(
            [tokenizer(text)["input_ids"]]
        )  # with the beginning-of-sequence token, if the tokenizer has it
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    base = scores_of(readings["base"], exam)["neutral.perplexity"]
    assert base.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (base.n, sum(readings["base"]["neutral"]["tokens"])) == (3, count)
    assert base.ci95[0] < base.value < base.ci95[1]
    teacher = scores_of(readings["teacher"], exam)["neutral.perplexity"]
    assert teacher.value != base.value
