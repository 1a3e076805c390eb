"""Rows as other programs read them: a record batch with a row per query, in the columns of docs/exchange.md.

Logits are float32, whatever the store keeps: float16 and the decoded values of linear16 are exact in it, so what comes back is
bit for bit what a reader of the store gets.

Shapes: R rows, S tokens of all rows, N positions of all rows, K kept ids.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from duet.cache.codec import Block
from duet.cache.manifest import Manifest
from duet.cache.record import SUBSETS, Rows, counts_of, offsets_of

NUMBERS = pa.list_(pa.int32())


def schema(manifest: Manifest) -> pa.Schema:
    """The columns; `logsumexp` and `draws` only where the store has them."""
    columns = {
        "row_id": pa.string(),
        "subset": pa.string(),
        "prompt": NUMBERS,
        "response": NUMBERS,
        "position": NUMBERS,
        "ids": pa.list_(NUMBERS),
        "logits": pa.list_(pa.list_(pa.float32())),
    }
    if manifest.logsumexp:
        columns["logsumexp"] = pa.list_(pa.float32())
    if manifest.layout.drawn:
        columns["draws"] = pa.list_(NUMBERS)
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def batch_of(block: Block, columns: pa.Schema) -> pa.RecordBatch:
    """The rows of a block in these columns."""
    at_N, is_prompt_S = places(block.token_offsets, block.position_offsets)
    offsets, top_k = block.position_offsets, block.layout.top_k
    prompt_R = counts_of(block.token_offsets) - counts_of(offsets)
    position_N = np.arange(offsets[-1]) + np.repeat(prompt_R - 1 - offsets[:-1], counts_of(offsets))
    found = {
        "row_id": block.row_ids,
        "subset": names_of(block.subsets),
        "prompt": lists(block.token_offsets - offsets, block.tokens_S[is_prompt_S]),
        "response": lists(offsets, block.tokens_S[at_N]),
        "position": lists(offsets, position_N.astype(np.int32)),
        "ids": lists(offsets, equal_lists(block.topk_ids(), top_k)),
        "logits": lists(offsets, equal_lists(block.topk_logits(), top_k)),
    }
    if "logsumexp" in columns.names:
        found["logsumexp"] = lists(offsets, block.columns["logsumexp"])
    if "draws" in columns.names:
        found["draws"] = lists(offsets, equal_lists(block.columns["draws"].astype(np.int32), top_k))
    return pa.RecordBatch.from_arrays([found[name].cast(columns.field(name).type) for name in found], schema=columns)


def rows_of(batch: pa.RecordBatch, top_k: int) -> Rows:
    """What `batch_of` wrote."""
    prompt, response = batch.column("prompt"), batch.column("response")
    position_offsets = offsets_of(response.value_lengths().to_numpy())
    token_offsets = position_offsets + offsets_of(prompt.value_lengths().to_numpy())
    has_sums, is_drawn = ("logsumexp" in batch.schema.names, "draws" in batch.schema.names)
    return Rows(
        row_ids=batch.column("row_id").to_pylist(),
        subsets=subsets_of(batch.column("subset")),
        token_offsets=token_offsets,
        tokens_S=joined(token_offsets, position_offsets, flat(prompt), flat(response)),
        position_offsets=position_offsets,
        topk_ids_NK=flat(batch.column("ids").flatten()).reshape(-1, top_k),
        topk_logits_NK=flat(batch.column("logits").flatten()).reshape(-1, top_k),
        logsumexp_N=flat(batch.column("logsumexp")) if has_sums else None,
        draws_NK=flat(batch.column("draws").flatten()).reshape(-1, top_k) if is_drawn else None,
    )


def places(token_offsets: np.ndarray, position_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the response's tokens lie among all, int64 [N], and which tokens are of a prompt, bool [S]."""
    counts = counts_of(position_offsets)
    at_N = np.arange(position_offsets[-1]) + np.repeat(token_offsets[1:] - position_offsets[1:], counts)
    is_prompt_S = np.ones(token_offsets[-1], bool)
    is_prompt_S[at_N] = False
    return at_N, is_prompt_S


def joined(
    token_offsets: np.ndarray, position_offsets: np.ndarray, prompts: np.ndarray, responses: np.ndarray
) -> np.ndarray:
    """int32 [S]: each row's prompt and then its response."""
    at_N, is_prompt_S = places(token_offsets, position_offsets)
    tokens_S = np.empty(len(is_prompt_S), np.int32)
    tokens_S[at_N], tokens_S[is_prompt_S] = responses, prompts
    return tokens_S


def names_of(subsets: np.ndarray) -> pa.Array:
    return pa.array(SUBSETS, pa.string()).take(pa.array(subsets))


def subsets_of(names: pa.Array) -> np.ndarray:
    return np.array([SUBSETS.index(name) for name in names.to_pylist()], np.uint8)


def lists(offsets: np.ndarray, values: np.ndarray | pa.Array) -> pa.ListArray:
    values = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def equal_lists(values: np.ndarray, width: int) -> pa.ListArray:
    """Lists of `width` values each."""
    return lists(np.arange(0, values.size + 1, width), np.ascontiguousarray(values).reshape(-1))


def flat(column: pa.ListArray) -> np.ndarray:
    """All values of a column of lists, one list after the other."""
    return column.flatten().to_numpy()
