"""One query's row in the store, and the checks that every row passes before it is written.

Shapes: P supervised positions, K kept ids, T prompt tokens. `topk_logits_PK[j]` are the teacher's raw logits (before
softmax, no temperature) for the token at response position j, so row j predicts `response_ids[j]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache.errors import UserError

SUBSETS = ("forget", "retain")


@dataclass(frozen=True)
class Record:
    """What one query contributes: the student's prompt, the teacher's response and its top-k at each position."""

    row_id: str
    subset: str  # "forget" or "retain"
    prompt_ids: np.ndarray  # int32 [T], the student's prompt: no prefix in it
    response_ids: np.ndarray  # int32 [P]
    topk_ids_PK: np.ndarray  # int32 [P, K], by logit, descending
    topk_logits_PK: np.ndarray  # float32 [P, K]
    logsumexp_P: np.ndarray | None  # float32 [P] over the full vocabulary, nats; None where the engine has none


def check_record(record: Record, top_k: int, max_positions: int, vocab_size: int) -> None:
    """Refuse, naming the row, what would train a student on garbage: wrong shapes, bad ids, unsorted or non-finite logits."""
    reason = _fault(record, top_k, max_positions, vocab_size)
    if reason:
        raise UserError(
            f"row {record.row_id!r} cannot be stored: {reason}",
            "the engine returned something other than raw top-k logits; check the model's weights and the engine's version",
        )


def _fault(record: Record, top_k: int, max_positions: int, vocab_size: int) -> str | None:
    positions = len(record.response_ids)
    ids, logits = record.topk_ids_PK, record.topk_logits_PK
    if record.subset not in SUBSETS:
        return f"subset {record.subset!r}, expected one of {', '.join(SUBSETS)}"
    if not 1 <= positions <= max_positions:
        return f"{positions} positions, expected 1 to {max_positions}"
    if ids.shape != (positions, top_k) or logits.shape != (positions, top_k):
        return f"top-k shapes {ids.shape} and {logits.shape}, expected {(positions, top_k)}"
    if len(record.prompt_ids) == 0:
        return "the prompt is empty"
    for name, values in (("top-k", ids), ("prompt", record.prompt_ids), ("response", record.response_ids)):
        if values.min() < 0 or values.max() >= vocab_size:
            return f"a {name} id outside 0..{vocab_size - 1}"
    if not np.isfinite(logits).all():
        return "a logit that is NaN or infinite"
    if (np.diff(logits, axis=1) > 0).any():
        return "logits not sorted in descending order"
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        return "a top-k id that occurs twice at one position"
    return _logsumexp_fault(record.logsumexp_P, logits)


def _logsumexp_fault(logsumexp_P: np.ndarray | None, logits_PK: np.ndarray) -> str | None:
    if logsumexp_P is None:
        return None
    if logsumexp_P.shape != logits_PK.shape[:1] or not np.isfinite(logsumexp_P).all():
        return "log-sum-exp of the wrong shape, NaN or infinite"
    if (logsumexp_P < logits_PK[:, 0] - 1e-3).any():
        return "log-sum-exp below the largest logit"
    return None
