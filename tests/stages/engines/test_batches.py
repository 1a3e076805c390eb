"""Which prompts are decoded together: every one once, what they share is the same in all, and nothing cheaper exists."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from duet.stages.engines.batches import by_beginning, filled, of_one_length
from duet.stages.models.batching import BATCH_TOKENS, rows_that_fit

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=20)
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=9)


@settings(max_examples=200)
@given(PROMPTS, st.integers(0, 40))
def test_each_prompt_is_in_one_group_and_begins_as_the_group_does(prompts, price):
    groups = by_beginning(prompts, price)
    assert sorted(np.concatenate([rows for _, rows in groups]).tolist()) == list(range(len(prompts)))
    for shared, rows in groups:
        assert len({tuple(prompts[row][:shared]) for row in rows}) == 1
        assert all(shared < len(prompts[row]) for row in rows)


def test_questions_behind_texts_share_each_text_and_others_stay_together():
    """Two attack texts before 40 questions each, 40 bare questions that begin alike in nothing, and a chat's head before all
    of another 40: four groups, and no bare question on its own."""
    text, other, head = [[100 + n] * 50 for n in range(3)]
    bare = [[number, 7, 8] for number in range(40)]
    prompts = [*bare, *([*text, *q] for q in bare), *([*other, *q] for q in bare), *([*head, *q] for q in bare)]
    groups = {shared: [] for shared in (0, 50)}
    for shared, rows in by_beginning(prompts, 64 * 16):
        groups[shared].append(sorted(rows.tolist()))
    assert groups[0] == [list(range(40))]
    assert sorted(groups[50]) == [list(range(start, start + 40)) for start in (40, 80, 120)]


def test_nothing_is_shared_that_saves_less_than_a_batch_costs():
    prompts = [[5] * 20 + [number] for number in range(10)]
    assert [shared for shared, _ in by_beginning(prompts, 20 * 9)] == [0]
    assert [shared for shared, _ in by_beginning(prompts, 20 * 9 - 1)] == [20]
    assert [shared for shared, _ in by_beginning([[5] * 20] * 10, 0)] == [19], "the last token is each one's own"


def test_prompts_that_each_begin_with_the_one_before():
    """The deepest tree there is."""
    prompts = [[1] * length for length in range(1, 3001)]
    assert sum(len(rows) for _, rows in by_beginning(prompts, 64)) == 3000


@settings(max_examples=200)
@given(LENGTHS, st.integers(0, 50), st.integers(1, 4))
def test_no_other_batches_of_like_length_cost_less(lengths, price, most_rows):
    batches = filled(np.array(lengths), 0, most_rows, price)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= most_rows
    ascending = sorted(lengths)

    @cache
    def least(end: int) -> int:
        if end == 0:
            return 0
        sizes = range(1, min(end, most_rows) + 1)
        return min(least(end - size) + size * ascending[end - 1] + price for size in sizes)

    cost = sum(len(rows) * max(lengths[row] for row in rows) + price for rows in batches)
    assert cost == least(len(lengths))


@given(LENGTHS, st.integers(1, 4))
def test_rows_that_cannot_be_padded_are_with_their_like(lengths, most_rows):
    batches = of_one_length(np.array(lengths), 5, most_rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) <= most_rows
        assert len({lengths[row] for row in rows}) == 1


def test_long_prompts_make_small_batches():
    assert rows_that_fit(BATCH_TOKENS + 1, 64) == 1
    long = BATCH_TOKENS // 8
    lengths = np.array([10] * 100 + [long - 20] * 24)
    assert sorted(map(len, filled(lengths, 20, 100, 64))) == [8, 8, 8, 100]
    assert sorted(map(len, of_one_length(lengths, 20, 100))) == [8, 8, 8, 100]
