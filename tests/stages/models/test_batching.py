"""Sequences of like length together: little padding, and the fewest groups."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from duet.stages.models.batching import cut_by_length


def padded_tokens(groups, lengths: np.ndarray) -> int:
    return sum(len(group) * lengths[group].max() for group in groups)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.sampled_from([0.0, 0.05, 0.2, 1.0]))
def test_padding_stays_below_the_bound_with_the_fewest_passes(lengths, max_padding):
    lengths = np.array(lengths)
    groups = cut_by_length(lengths, max_padding, 10**6)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))

    def fits(tokens: int) -> bool:
        return tokens - lengths.sum() <= max_padding * tokens + 1e-9

    assert fits(padded_tokens(groups, lengths))
    ascending = np.sort(lengths)
    for count in range(1, len(groups)):  # no way with fewer
        for cuts in itertools.combinations(range(1, len(lengths)), count - 1):
            assert not fits(sum(len(part) * part.max() for part in np.split(ascending, cuts)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 400))
def test_no_pass_has_more_tokens_than_allowed_but_for_single_rows(lengths, pass_tokens):
    lengths = np.array(lengths)
    groups = cut_by_length(lengths, 0.05, pass_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group].max() <= pass_tokens
