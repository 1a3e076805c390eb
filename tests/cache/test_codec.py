"""Ids of any vocabulary and logits of any dtype come back as they went in, or with the error that is stated."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_rows

from duet.cache.codec import Layout, encode, widened
from duet.cache.errors import UserError
from duet.cache.packed_ids import join_ids, join_tokens, split_ids, split_tokens, token_high_offsets
from duet.cache.record import offsets_of

WIDTHS = (2, 65_536, 65_537, 128_256, 131_072, 131_073, 151_936, 152_064, 262_144, 2**20)


@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_the_width_of_ids_follows_the_vocabulary(vocab_size):
    layout = Layout(64, vocab_size)
    assert 2 ** (16 + layout.high_bits) >= vocab_size
    assert layout.high_bits == 0 or 2 ** (15 + layout.high_bits) < vocab_size
    ids = np.array([[0, vocab_size - 1] * 32], np.int32)
    low, high = split_ids(ids, layout.high_bits)
    assert (0 if high is None else high.shape[1]) == layout.high_bytes == 8 * layout.high_bits
    assert np.array_equal(join_ids(low, high, layout.high_bits), ids)


@given(st.data())
def test_ids_and_tokens_come_back(data):
    vocab_size = data.draw(st.sampled_from(WIDTHS))
    high_bits = Layout(1, vocab_size).high_bits
    ids = data.draw(
        hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.integers(0, vocab_size - 1))
    )
    assert np.array_equal(join_ids(*split_ids(ids, high_bits), high_bits), ids)
    counts = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    tokens = data.draw(hnp.arrays(np.int32, sum(counts), elements=st.integers(0, vocab_size - 1)))
    offsets = offsets_of(counts)
    low, high = split_tokens(tokens, offsets, high_bits)
    assert len(high) == token_high_offsets(offsets, high_bits)[-1]
    assert np.array_equal(join_tokens(low, high, offsets, high_bits), tokens)
    for row, count in enumerate(counts):  # a row's bytes are its own: they can be read without the others'
        alone = slice(offsets[row], offsets[row + 1])
        part = slice(*token_high_offsets(offsets, high_bits)[row : row + 2])
        assert np.array_equal(join_tokens(low[alone], high[part], offsets_of([count]), high_bits), tokens[alone])


def with_logits(logits: np.ndarray):
    rows = make_rows(range(len(logits)), positions=1, top_k=logits.shape[1], logsumexp=False)
    return type(rows)(**{**rows.__dict__, "topk_logits_NK": logits})


FLOATS = {width: st.floats(allow_nan=False, allow_infinity=False, width=width) for width in (16, 32)}


@given(st.data(), st.sampled_from([16, 32]), st.sampled_from([np.float16, np.float32]))
def test_lossless_values_are_bit_for_bit(data, width, dtype):
    """Whatever float32 or float16 holds; what float16 holds is kept in it."""
    width = 16 if dtype == np.float16 else width
    logits = data.draw(hnp.arrays(dtype, (3, 4), elements=FLOATS[width]))
    logits = -np.sort(-logits, axis=1)
    block, error = encode(with_logits(logits), Layout(4, 100), "lossless")
    assert error == 0
    assert np.array_equal(block.topk_logits(), logits.astype(np.float32))
    if width == 16:
        assert block.value_dtype == "float16"


def test_bf16_logits_are_exact_in_float16_and_tiny_ones_are_noticed():
    """bf16 has 8 bits of significand, float16 has 11, but its smallest number is 6e-8."""
    rng = np.random.default_rng(0)
    logits = -np.sort(-rng.normal(size=(500, 8)).astype(np.float32) * 10, axis=1)
    bf16 = (logits.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert encode(with_logits(bf16), Layout(8, 100), "lossless")[0].value_dtype == "float16"
    bf16[7, 3:] = [1e-9] * 5
    bf16[7, :3] = 1
    block, error = encode(with_logits(bf16), Layout(8, 100), "lossless")
    assert (block.value_dtype, error) == ("float32", 0.0)
    assert np.array_equal(block.topk_logits(), bf16)


def test_every_float16_is_widened_as_numpy_does():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert len(finite) == 2**16 - 2**11
    assert np.array_equal(widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize(("values", "bound"), [("float16", 2e-2), ("linear16", 1e-3)])
def test_lossy_values_state_their_error(values, bound):
    rng = np.random.default_rng(0)
    logits = -np.sort(-rng.normal(size=(200, 16)).astype(np.float32) * 10, axis=1)
    block, error = encode(with_logits(logits), Layout(16, 100), values)
    measured = np.abs(block.topk_logits().astype(np.float64) - logits).max()
    assert 0 < error < bound
    assert measured == pytest.approx(error, rel=1e-6)
    assert (np.diff(block.topk_logits(), axis=1) <= 0).all()
    flat = np.full((1, 16), 2.5, np.float32)
    assert np.array_equal(encode(with_logits(flat), Layout(16, 100), values)[0].topk_logits(), flat)


def test_logits_beyond_float16_are_refused_where_it_was_asked_for():
    with pytest.raises(UserError, match="beyond float16"):
        encode(with_logits(np.array([[7e4, 1, 0, -1]], np.float32)), Layout(4, 100), "float16")


def test_padded_blocks_say_what_is_padding():
    rows = make_rows(range(5), positions=None)
    padded = encode(rows, Layout(4, 100), "lossless")[0].padded()
    assert padded["topk_ids"].shape == (5, 3, 4)
    assert padded["mask"].sum(axis=1).tolist() == [1, 2, 3, 1, 2]
    assert np.array_equal(padded["topk_logits"][padded["mask"]], rows.topk_logits_NK)
    assert not padded["topk_ids"][~padded["mask"]].any()
