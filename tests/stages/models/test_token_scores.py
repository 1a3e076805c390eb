"""Likelihoods in batches against one plain forward pass per pair, on tiny models of several architectures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model

from duet.stages.models import token_scores as likelihood
from duet.stages.models.token_scores import token_logprobs, token_scores

VOCAB = 60
PAD = 0


def pairs(count: int = 9) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, 1 + 3 * number % 11).tolist() for number in range(count)]
    return prompts, [rng.integers(3, VOCAB, 1 + 5 * number % 7).tolist() for number in range(count)]


def plainly(model, prompt: list[int], answer: list[int]) -> list[list[float]]:
    """Per answer token: log-probability, is it the most likely, mean and deviation of log-probabilities; one pass, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    rows = []
    for number, token in enumerate(answer):
        logprobs = torch.log_softmax(logits[len(prompt) + number - 1], dim=0)
        probs = logprobs.exp()
        mean = float((probs * logprobs).sum())
        deviation = float((probs * (logprobs - mean) ** 2).sum() ** 0.5)
        rows.append([float(logprobs[token]), float(logprobs.argmax() == token), mean, deviation])
    return rows


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox", "mistral", "cohere"])
def test_batches_score_as_single_rows_do(name, monkeypatch):
    model = tiny_model(tiny_config(name, VOCAB))
    prompts, answers = pairs()
    with torch.no_grad():  # one answer that is the most likely, so that `is_top` is seen to be both
        answers[3] = model.generate(torch.tensor([prompts[3]]), max_new_tokens=4, do_sample=False)[0].tolist()[-4:]
    monkeypatch.setattr(likelihood, "BLOCK_LOGITS", 3 * VOCAB)  # blocks end within answers
    found = token_scores(model, prompts, answers, PAD, max_tokens=40)
    for prompt, answer, scores in zip(prompts, answers, found, strict=True):
        columns = np.stack([scores.logprob, scores.is_top, scores.mean, scores.std], axis=1)
        assert columns == pytest.approx(np.array(plainly(model, prompt, answer)), abs=2e-5)
    assert found[3].is_top.all()
    assert not all(scores.is_top.all() for scores in found)
    again = token_logprobs(model, prompts, answers, PAD, max_tokens=1)  # one pair a pass
    assert np.concatenate(again) == pytest.approx(np.concatenate([s.logprob for s in found]), abs=2e-5)


def test_ids_that_a_model_rules_out_do_not_make_nan():
    model = tiny_model(tiny_config("phi", VOCAB))  # a head with a bias
    with torch.no_grad():
        model.lm_head.bias[7] = -torch.inf
    (scores,) = token_scores(model, [[3, 4]], [[5, 7]], PAD, 10)
    assert np.isfinite([*scores.mean, *scores.std, scores.logprob[0]]).all()
    assert scores.logprob[1] == -np.inf


def test_nothing_to_score_and_nothing_to_score_with():
    model = tiny_model(tiny_config("llama", VOCAB))
    assert token_scores(model, [], [], PAD, 10) == []
    with pytest.raises(ValueError, match="at least 1"):
        token_scores(model, [[3], [4]], [[5], []], PAD, 10)
