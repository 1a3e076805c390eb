"""Rows in the layout that arcee's DistillKit reads as a captured data set: log-probabilities and packed ids at every token.

Its collator stacks rows, so all are as long as the store's longest. Its mask is `labels >= 0` at the position whose logits are
compared, so labels stand there and not at the token that is predicted. Positions that are not supervised hold zeros. What it
has no column for (ids of rows, subsets, log-sum-exps) lies in a second batch beside it.

Shapes: R rows, T tokens of the longest row, N positions of all rows, K kept ids, U bytes of K packed ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from duet.cache.codec import Block, widened
from duet.cache.exchange_rows import equal_lists, flat, lists, names_of, subsets_of
from duet.cache.record import Rows, counts_of, offsets_of

NOT_SUPERVISED = -100
BYTES = pa.list_(pa.list_(pa.uint8()))
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", pa.list_(pa.int64())),
        ("compressed_logprobs", BYTES),
        ("bytepacked_indices", BYTES),
    ]
)
BESIDE = pa.schema([("row_id", pa.string()), ("subset", pa.string()), ("logsumexp", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class Grid:
    """The size of every row of an export, and how its logits are kept in the store."""

    longest: int  # T
    top_k: int
    vocab_size: int
    value_dtype: str

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def rows_at_once(self) -> int:
        """Rows that have some 4,096 tokens together."""
        return max(1, 4096 // self.longest)

    @property
    def cells_at_once(self) -> int:
        """Tokens of these rows, all filled up."""
        return self.rows_at_once * self.longest


def config_text(grid: Grid) -> str:
    """`compression_config.yaml`, which is also DistillKit's `teacher.logprob_compressor`."""
    return (
        f"d: {grid.vocab_size}\nk: {grid.top_k}\nexact_k: {grid.top_k}\nexact_dtype: float32\npolynomial_terms: null\n"
        "term_dtype: float32\nresidual_bins: []\ndelta_encoding: false\nerror_diffusion: false\n"
    )


def batches_of(block: Block, grid: Grid) -> tuple[pa.RecordBatch, pa.RecordBatch, float]:
    """A block's rows, what goes beside them, and the largest error of a logit that comes back by `rows_of`."""
    offsets = block.position_offsets
    length_R = counts_of(block.token_offsets)
    shape = (len(block), grid.longest)
    cells = shape[0] * shape[1]
    is_token = np.arange(grid.longest) < length_R[:, None]
    input_ids = np.zeros(shape, np.uint64)
    input_ids[is_token] = block.tokens_S
    first_R = length_R - counts_of(offsets) - 1  # the last token of the prompt predicts the first of the response
    at_N = np.arange(offsets[-1]) + np.repeat(
        np.arange(len(block)) * grid.longest + first_R - offsets[:-1], counts_of(offsets)
    )
    labels = np.full(cells, NOT_SUPERVISED, np.int64)
    labels[at_N] = input_ids.reshape(-1)[at_N]
    logits_NK, sums_N = block.topk_logits(), block.columns["logsumexp"]
    logprobs = np.zeros((cells, grid.top_k), np.float32)
    logprobs[at_N] = logits_NK - sums_N[:, None]
    packed_NU = pack(block.topk_ids(), grid.id_bits)
    packed = np.zeros((cells, packed_NU.shape[1]), np.uint8)
    packed[at_N] = packed_NU
    ends = np.arange(0, cells + 1, grid.longest)
    arrays = [
        equal_lists(input_ids, grid.longest),
        equal_lists(is_token.astype(np.int8), grid.longest),
        equal_lists(labels, grid.longest),
        lists(ends, equal_lists(logprobs.astype("<f4").view(np.uint8), 4 * grid.top_k)),
        lists(ends, equal_lists(packed, packed.shape[1])),
    ]
    beside = [block.row_ids, names_of(block.subsets), lists(offsets, sums_N)]
    error = float(np.abs(restored(logprobs[at_N], sums_N, grid.value_dtype) - logits_NK).max())
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA), pa.RecordBatch.from_arrays(beside, schema=BESIDE), error


def rows_of(batch: pa.RecordBatch, beside: pa.RecordBatch, grid: Grid) -> Rows:
    """What `batches_of` wrote, with logits that are off by at most its error."""
    at_N = np.flatnonzero(flat(batch.column("labels")) != NOT_SUPERVISED)
    position_offsets = offsets_of(beside.column("logsumexp").value_lengths().to_numpy())
    is_token = flat(batch.column("attention_mask")) == 1
    token_offsets = offsets_of(is_token.reshape(-1, grid.longest).sum(axis=1))
    sums_N = flat(beside.column("logsumexp"))
    logprobs = flat(batch.column("compressed_logprobs").flatten()).view("<f4").reshape(-1, grid.top_k)
    packed = flat(batch.column("bytepacked_indices").flatten()).reshape(len(logprobs), -1)
    return Rows(
        row_ids=beside.column("row_id").to_pylist(),
        subsets=subsets_of(beside.column("subset")),
        token_offsets=token_offsets,
        tokens_S=flat(batch.column("input_ids"))[is_token].astype(np.int32),
        position_offsets=position_offsets,
        topk_ids_NK=unpack(packed[at_N], grid.id_bits, grid.top_k),
        topk_logits_NK=restored(logprobs[at_N], sums_N, grid.value_dtype),
        logsumexp_N=sums_N,
    )


def restored(logprobs_NK: np.ndarray, sums_N: np.ndarray, value_dtype: str) -> np.ndarray:
    """float32 logits of log-probabilities; of a float16 store the nearest float16, which takes the rounding away again."""
    logits = logprobs_NK + sums_N[:, None]
    return widened(logits.astype(np.float16)) if value_dtype == "float16" else logits


def pack(ids_NK: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, U]: `bits` per id, the most significant first, id after id, the last byte filled up with zeros."""
    found = np.unpackbits(ids_NK.astype(">u4").view(np.uint8).reshape(*ids_NK.shape, 4), axis=-1)[..., -bits:]
    return np.packbits(found.reshape(len(ids_NK), -1), axis=-1)


def unpack(packed_NU: np.ndarray, bits: int, top_k: int) -> np.ndarray:
    """int32 [N, K] of what `pack` made."""
    wide = np.zeros((len(packed_NU), top_k, 32), np.uint8)
    wide[..., -bits:] = np.unpackbits(packed_NU, axis=-1, count=top_k * bits).reshape(len(packed_NU), top_k, bits)
    return np.packbits(wide, axis=-1).view(">u4")[..., 0].astype(np.int32)
