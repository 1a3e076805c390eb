"""Activation patching: against a two-layer model computed by hand, and on architectures of transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import noisy, tiny_config, tiny_model

from duet.stages.metrics.depth import unlearning_depth
from duet.stages.models.patching import Marked, patched_logprobs

VOCAB, PAD = 60, 0


class Rotation(torch.nn.Module):
    """A layer that adds a fixed vector to every position."""

    def __init__(self, added: list[float]) -> None:
        super().__init__()
        self.added = torch.nn.Parameter(torch.tensor(added))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD + self.added


class TwoLayers(torch.nn.Module):
    """Width 2, two ids: every embedding is 0, so the logits are the sum of what both layers add."""

    def __init__(self, first: list[float], second: list[float]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Rotation(first), Rotation(second)])
        self.config = SimpleNamespace(
            num_hidden_layers=2, get_text_config=lambda decoder: SimpleNamespace(num_hidden_layers=2)
        )
        self.device = torch.device("cpu")

    def get_decoder(self) -> torch.nn.Module:
        return self

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep=None):
        hidden = torch.zeros(*input_ids.shape, 2)
        for layer in self.layers:
            hidden = layer(hidden)
        kept = hidden if logits_to_keep is None else hidden[:, logits_to_keep]
        return SimpleNamespace(logits=kept)


def test_two_layers_by_hand():
    base, student, never_knew = (
        TwoLayers([0.0, 2.0], [0.0, 1.0]),
        TwoLayers([0.0, 2.0], [3.0, 0.0]),  # suppressed: its first layer still knows, its second hides
        TwoLayers([0.0, 0.0], [0.0, 0.0]),
    )
    given = Marked([[0, 0]], [[1, 1]], [np.array([True, False])])

    def logprob(one: float) -> float:  # of id 1 with logits (0, one)
        return one - math.log(1 + math.exp(one))

    whole, with_student = patched_logprobs(base, student, given, PAD, 100)
    _, with_control = patched_logprobs(base, never_knew, given, PAD, 100)
    assert whole == pytest.approx([logprob(3)])
    assert with_student[:, 0] == pytest.approx([logprob(3), logprob(-1)])  # after its second layer: (3, 2)
    assert with_control[:, 0] == pytest.approx([logprob(1), logprob(0)])
    lost_by_control = [logprob(3) - logprob(1), logprob(3) - logprob(0)]
    # The first layer loses nothing, the second more than the control's, which counts as all of it.
    by_hand = lost_by_control[1] / sum(lost_by_control)
    found = unlearning_depth(whole - with_student, whole - with_control)
    assert found == pytest.approx([by_hand], abs=1e-6)
    assert by_hand == pytest.approx(0.7089, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox", "cohere"])
def test_each_layer_is_the_sources_at_the_marked_positions_alone(name):
    base, other = tiny_model(tiny_config(name, VOCAB)), noisy(tiny_model(tiny_config(name, VOCAB)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, size).tolist() for size in (4, 9, 2)]
    answers = [rng.integers(3, VOCAB, size).tolist() for size in (3, 2, 5)]
    marks = [np.array([0, 1, 1], bool), np.array([1, 0], bool), np.array([0, 0, 0, 1, 0], bool)]
    given = Marked(prompts, answers, marks)
    whole, same = patched_logprobs(base, base, given, PAD, 1000)
    assert (same == whole).all()  # a model's own states change nothing, the last layer's included
    _, patched = patched_logprobs(base, other, given, PAD, 1000)
    assert np.abs(patched - whole).min(axis=1).max() > 1e-3
    again_whole, again = patched_logprobs(base, other, given, PAD, 1)  # one answer a pass
    assert again_whole == pytest.approx(whole, abs=2e-5)
    assert again == pytest.approx(patched, abs=2e-5)


def test_after_the_last_layer_all_is_the_sources_where_norm_and_head_are_the_same():
    base, other = tiny_model(tiny_config("llama", VOCAB)), tiny_model(tiny_config("llama", VOCAB))
    with torch.no_grad():
        for weight in other.model.layers.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    given = Marked([[5, 6, 7]], [[8, 9]], [np.array([True, True])])
    _, patched = patched_logprobs(base, other, given, PAD, 100)
    own, _ = patched_logprobs(other, other, given, PAD, 100)
    assert patched[-1] == pytest.approx(own, abs=1e-5)
