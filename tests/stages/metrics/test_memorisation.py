"""Memorisation by hand, by brute force over prefixes, and against what a model really says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_model

from duet.stages.metrics.memorisation import exact_memorisation, extraction_strength
from duet.stages.models.token_scores import token_scores


@pytest.mark.parametrize(
    ("flags", "exact", "strength"),
    [
        ("1111", 1.0, 1.0),
        ("0111", 0.75, 0.75),
        ("1101", 0.75, 0.25),
        ("1110", 0.75, 0.0),  # the last token does not follow: nothing is extracted
        ("0000", 0.0, 0.0),
        ("1", 1.0, 1.0),
        ("0", 0.0, 0.0),
    ],
)
def test_by_hand(flags, exact, strength):
    array = np.array([flag == "1" for flag in flags])
    assert exact_memorisation(array) == exact
    assert extraction_strength(array) == strength


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_strength_is_the_smallest_prefix_whose_rest_follows(flags):
    smallest = next(k for k in range(len(flags) + 1) if all(flags[k:]))
    assert extraction_strength(np.array(flags)) == 1 - smallest / len(flags)


def test_strength_is_what_greedy_decoding_goes_on_with():
    model = tiny_model(tiny_config("llama", 20))
    rng = np.random.default_rng(0)
    prompt = [3, 4, 5]

    def greedy(ids: list[int], count: int) -> list[int]:
        with torch.no_grad():
            for _ in range(count):
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        return ids

    found = set()
    for changed in range(5):
        answer = greedy(prompt, 4)[3:]
        if changed:  # one token is another; from there on the answer is what the model says after it
            answer = [*answer[: changed - 1], int(rng.integers(6, 20))]
            answer = greedy([*prompt, *answer], 4 - len(answer))[3:]
        (scores,) = token_scores(model, [prompt], [answer], 0, 100)
        needed = next(k for k in range(5) if greedy([*prompt, *answer[:k]], 4 - k)[3:] == answer)
        assert extraction_strength(scores.is_top) == 1 - needed / 4
        found.add(needed)
    assert len(found) > 2
