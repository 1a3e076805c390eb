"""Vocabulary ids as they are stored: 16 low bits each, and packed high bits.

A vocabulary of V ids needs h = max(0, bits(V-1) - 16) high bits per id. The low 16 bits of id j are entry j of a uint16 array;
its high bits are bits j*h … j*h+h-1 (least significant first) of a byte array. Ids of a position share ceil(K*h/8) bytes,
tokens of a row ceil(S*h/8).

Shapes: R rows, S tokens, K kept ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duet.cache.record import counts_of, offsets_of


def split_ids(ids: np.ndarray, high_bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(uint16 [..., n], uint8 [..., ceil(n*h/8)] or None where h is 0) of int32 ids [..., n]."""
    low = ids.astype(np.uint16)
    if high_bits == 0:
        return low, None
    if high_bits == 1:
        return low, np.packbits(ids > 0xFFFF, axis=-1, bitorder="little")
    bits = np.stack([(ids >> (16 + bit)) & 1 for bit in range(high_bits)], axis=-1).astype(np.uint8)
    return low, np.packbits(bits.reshape(*ids.shape[:-1], -1), axis=-1, bitorder="little")


def join_ids(low: np.ndarray, high: np.ndarray | None, high_bits: int) -> np.ndarray:
    """int32 ids from what `split_ids` gave."""
    ids = low.astype(np.int32)
    if high is None or high_bits == 0:
        return ids
    bits = np.unpackbits(high, axis=-1, count=low.shape[-1] * high_bits, bitorder="little")
    bits = bits.reshape(*low.shape, high_bits)
    for bit in range(high_bits):
        ids |= bits[..., bit].astype(np.int32) << (16 + bit)
    return ids


def split_tokens(tokens_S: np.ndarray, offsets: np.ndarray, high_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 [S], uint8 bytes of all rows): like `split_ids`, each row's high bits filled up to whole bytes."""
    low = tokens_S.astype(np.uint16)
    place, num_bits = _bit_offsets(offsets, high_bits)
    bits = np.zeros(num_bits, np.uint8)
    for bit in range(high_bits):
        bits[place + bit] = (tokens_S >> (16 + bit)) & 1
    return low, np.packbits(bits, bitorder="little")


def join_tokens(low: np.ndarray, high: np.ndarray, offsets: np.ndarray, high_bits: int) -> np.ndarray:
    """int32 [S] from what `split_tokens` gave."""
    tokens = low.astype(np.int32)
    if high_bits == 0 or not high.any():
        return tokens
    place, _ = _bit_offsets(offsets, high_bits)
    bits = np.unpackbits(high, bitorder="little").astype(np.int32)
    for bit in range(high_bits):
        tokens |= bits[place + bit] << (16 + bit)
    return tokens


def token_high_offsets(offsets: np.ndarray, high_bits: int) -> np.ndarray:
    """int64 [R+1]: where each row's bytes of high bits begin."""
    return offsets_of(-(-counts_of(offsets) * high_bits // 8))


def _bit_offsets(offsets: np.ndarray, high_bits: int) -> tuple[np.ndarray, int]:
    """For every token, the number of its first high bit; and how many bits there are."""
    starts = token_high_offsets(offsets, high_bits) * 8
    first = starts[:-1] - offsets[:-1] * high_bits
    counts: Sequence[int] | np.ndarray = counts_of(offsets)
    return np.repeat(first, counts) + np.arange(offsets[-1]) * high_bits, int(starts[-1])
