"""How much a model can read: the length of its context, the width of its vocabulary, and rows that exceed them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.stages.models.directory import text_config


def check_length(prompt_ids: Sequence[int], new_tokens: int, context: int, row_id: str, who: str) -> None:
    """Refuse a prompt that, with the tokens to come, does not fit the model's context: nothing is ever truncated."""
    if len(prompt_ids) + new_tokens > context:
        raise UserError(
            f"row {row_id!r}: the {who}'s prompt has {len(prompt_ids)} tokens and {new_tokens} are to follow, "
            f"the model's context is {context}",
            "shorten the prefix or the question, leave the row out, or take a model with a longer context",
        )


def check_ids_within(ids: Any, width: int, row_id: str, who: str) -> None:
    """Refuse a row with a token for which the head and embeddings of `who` ("the teacher") have no row."""
    largest = int(np.max(ids, initial=0))
    if largest >= width:
        raise UserError(
            f"row {row_id!r} has the id {largest}, and {who} has a head of {width} rows",
            "that token was added to the tokenizer and not to the model: keep it out of questions, prefix and chat template, "
            "or give the model a row for it (transformers' resize_token_embeddings) and save it",
        )


# What configs call the longest input, in the order in which they are asked.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
NO_LIMIT = sys.maxsize  # context of a model whose config names none: recurrent ones, and those with ALiBi


def context_length(config: Any) -> int:
    """Tokens that the model can read, from its config; NO_LIMIT where that names no limit.

    With `longrope` (Phi-3 and 4) or `dynamic` rotary frequencies no more than what it was trained on before it was stretched:
    beyond that the frequencies, and so the logits, depend on the longest row of a batch and on the engine.
    """
    config = text_config(config)
    found = next(filter(None, (getattr(config, key, None) for key in _CONTEXT_KEYS)), NO_LIMIT)
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") in ("longrope", "dynamic") and original:
        found = min(found, original)
    if rope.get("rope_type") == "yarn" and original:  # some configs give the length before it is stretched
        found = max(found, original * rope.get("factor", 1))
    return int(found)


def vocab_width(config: Any) -> int:
    """Rows of the output head, padding included."""
    return int(text_config(config).vocab_size)
