"""The rows of a store as plain arrays, and the checks that every row passes before it is written.

Rows are columnar: the positions of all rows lie one after the other ("packed"), offsets say where each row's begin.

Shapes: R rows, S tokens of all rows, N supervised positions of all rows, K kept ids. A row with a prompt of T tokens and P
positions has T+P tokens: its prompt, then its response. `topk_logits_NK[j]` are the teacher's raw logits (before softmax,
no temperature) for the response token of position j.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet.cache.errors import UserError

SUBSETS = ("forget", "retain", "broad")  # in the order in which their rows lie
MAIN_SUBSETS = SUBSETS[:2]  # of every store; broad rows are named only where there are some
CHECKED_LOGITS = 2**15  # at once


@dataclass(frozen=True)
class Rows:
    """R queries with the teacher's top-k at each of their positions."""

    row_ids: Sequence[str]  # R
    subsets: np.ndarray  # uint8 [R], index into SUBSETS
    token_offsets: np.ndarray  # int64 [R+1]
    tokens_S: np.ndarray  # int32, the student's prompt (no prefix in it) ⊕ the response, row by row
    position_offsets: np.ndarray  # int64 [R+1]
    topk_ids_NK: np.ndarray  # int32, by logit, descending
    topk_logits_NK: np.ndarray  # float32 or float16
    logsumexp_N: np.ndarray | None = None  # float32, over the full vocabulary, nats; None where the engine has none
    draws_NK: np.ndarray | None = None  # integers, how often each id was drawn; None where ids are the likeliest

    def __len__(self) -> int:
        return len(self.subsets)

    def __getitem__(self, rows: slice) -> Rows:
        """Consecutive rows, as views."""
        first, end, _ = rows.indices(len(self))
        token_offsets, tokens = cut(self.token_offsets, first, end)
        position_offsets, positions = cut(self.position_offsets, first, end)
        return Rows(
            row_ids=self.row_ids[first:end],
            subsets=self.subsets[first:end],
            token_offsets=token_offsets,
            tokens_S=self.tokens_S[tokens],
            position_offsets=position_offsets,
            topk_ids_NK=self.topk_ids_NK[positions],
            topk_logits_NK=self.topk_logits_NK[positions],
            logsumexp_N=None if self.logsumexp_N is None else self.logsumexp_N[positions],
            draws_NK=None if self.draws_NK is None else self.draws_NK[positions],
        )


def subset_counts(subsets: Iterable[str]) -> dict[str, int]:
    """Rows of each subset, as plans and manifests name them, of rows of these subsets."""
    found = Counter(subsets)
    return {subset: found[subset] for subset in SUBSETS if subset in MAIN_SUBSETS or found[subset]}


def prompt_and_response(rows: Any, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of one row's prompt and response, of `Rows` or of a `Block`."""
    first, end = rows.token_offsets[row], rows.token_offsets[row + 1]
    split = end - (rows.position_offsets[row + 1] - rows.position_offsets[row])
    return rows.tokens_S[first:split], rows.tokens_S[split:end]


def offsets_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [len+1]: 0 and the running sum."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def counts_of(offsets: np.ndarray) -> np.ndarray:
    """What `offsets_of` made the offsets of."""
    return offsets[1:] - offsets[:-1]


def cut(offsets: np.ndarray, first: int, end: int) -> tuple[np.ndarray, slice]:
    """Offsets of rows `first` to `end`-1 alone, and where what they point to lies."""
    part = offsets[first : max(first, end) + 1]
    return part - part[0], slice(int(part[0]), int(part[-1]))


def join_offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Offsets of all rows of the parts, one after the other."""
    return offsets_of(np.concatenate([counts_of(part) for part in parts]))


def concat_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order. All have a log-sum-exp, or none; and all were drawn, or none."""
    if len(parts) == 1:
        return parts[0]
    sums = [part.logsumexp_N for part in parts if part.logsumexp_N is not None]
    if sums and len(sums) != len(parts):
        raise ValueError("some rows have a log-sum-exp and some have none")
    draws = [part.draws_NK for part in parts if part.draws_NK is not None]
    if draws and len(draws) != len(parts):
        raise ValueError("the ids of some rows were drawn, and those of some were not")
    return Rows(
        row_ids=[row_id for part in parts for row_id in part.row_ids],
        subsets=np.concatenate([part.subsets for part in parts]),
        token_offsets=join_offsets([part.token_offsets for part in parts]),
        tokens_S=np.concatenate([part.tokens_S for part in parts]),
        position_offsets=join_offsets([part.position_offsets for part in parts]),
        topk_ids_NK=np.concatenate([part.topk_ids_NK for part in parts]),
        topk_logits_NK=np.concatenate([part.topk_logits_NK for part in parts]),
        logsumexp_N=np.concatenate(sums) if sums else None,
        draws_NK=np.concatenate(draws) if draws else None,
    )


def check_rows(rows: Rows, top_k: int, max_positions: int, vocab_size: int) -> None:
    """Refuse, naming the row, what would train a student on garbage: wrong shapes, bad ids, unsorted or non-finite logits."""
    fault = _fault(rows, top_k, max_positions, vocab_size)
    if fault:
        raise _refusal(rows, *fault)


def _refusal(rows: Rows, row: int, reason: str) -> UserError:
    return UserError(
        f"row {rows.row_ids[row]!r} cannot be stored: {reason}",
        "the engine returned something other than raw top-k logits; check the model's weights and the engine's version",
    )


def _fault(rows: Rows, top_k: int, max_positions: int, vocab_size: int) -> tuple[int, str] | None:
    """(row, reason) of the first thing that is wrong, or None."""
    positions = counts_of(rows.position_offsets)
    tokens = counts_of(rows.token_offsets)
    num_positions = int(positions.sum())
    if rows.topk_ids_NK.shape != (num_positions, top_k) or rows.topk_logits_NK.shape != (num_positions, top_k):
        found = f"{rows.topk_ids_NK.shape} and {rows.topk_logits_NK.shape}"
        return 0, f"top-k shapes {found} of its batch, expected {(num_positions, top_k)}"
    if len(rows.tokens_S) != tokens.sum() or not len(rows.row_ids) == len(rows.subsets) == len(positions) == len(
        tokens
    ):
        return 0, "its batch has columns of different lengths"
    for wrong_R, reason in (
        (rows.subsets >= len(SUBSETS), f"its subset is none of {', '.join(SUBSETS)}"),
        ((positions < 1) | (positions > max_positions), f"its positions are not 1 to {max_positions}"),
        (tokens <= positions, "the prompt is empty"),
    ):
        if wrong_R.any():
            return int(wrong_R.argmax()), reason
    if rows.tokens_S.min() < 0 or rows.tokens_S.max() >= vocab_size:
        wrong = int(((rows.tokens_S < 0) | (rows.tokens_S >= vocab_size)).argmax())
        return _row_of(rows.token_offsets, wrong), f"a token id outside 0..{vocab_size - 1}"
    fault = _topk_fault(rows, vocab_size) or _logsumexp_fault(rows) or _draws_fault(rows)
    return fault and (_row_of(rows.position_offsets, fault[0]), fault[1])


def _row_of(offsets: np.ndarray, index: int) -> int:
    return int(np.searchsorted(offsets, index, side="right")) - 1


def _topk_fault(rows: Rows, vocab_size: int) -> tuple[int, str] | None:
    """(position, reason), looking at so many positions at once that what is computed stays in the processor's cache."""
    size = max(1, CHECKED_LOGITS // rows.topk_ids_NK.shape[1])
    for first in range(0, len(rows.topk_ids_NK), size):
        ids, logits = rows.topk_ids_NK[first : first + size], rows.topk_logits_NK[first : first + size]
        keys = np.ravel(_order_keys(logits))
        falls = keys[1:] <= keys[:-1]
        falls[logits.shape[1] - 1 :: logits.shape[1]] = True  # from one position to the next
        ends = logits[:, :: max(1, logits.shape[1] - 1)]  # of what is sorted, these are the largest and the smallest
        if ids.view(np.uint32).max() < vocab_size and falls.all() and np.isfinite(ends).all():
            continue
        for wrong, reason in (
            (ids.view(np.uint32) >= vocab_size, f"a top-k id outside 0..{vocab_size - 1}"),  # a negative id is large
            (~np.isfinite(logits), "a logit that is NaN or infinite"),
            (logits[:, 1:] > logits[:, :-1], "logits not sorted in descending order"),
        ):
            if wrong.any():
                return first + int(wrong.any(axis=1).argmax()), reason
    return None


def _order_keys(logits: np.ndarray) -> np.ndarray:
    """What compares like the logits, and fast: float16 as int16, -0 just below +0, NaN beyond the infinities."""
    if logits.dtype != np.float16:
        return logits
    bits = logits.view(np.int16)
    keys = bits >> 15
    keys &= 0x7FFF
    keys ^= bits
    return keys


def check_distinct(rows: Rows) -> None:
    """Refuse, naming the row, an id that occurs twice at one position. For where rows are made: it costs a sort."""
    ids = np.sort(rows.topk_ids_NK, axis=1)
    repeated = np.flatnonzero((ids[:, 1:] == ids[:, :-1]).any(axis=1))
    if len(repeated):
        raise _refusal(
            rows, _row_of(rows.position_offsets, int(repeated[0])), "a top-k id occurs twice at one position"
        )


def check_draws(rows: Rows, drawn: bool) -> None:
    """Refuse rows whose ids were drawn where the store's were not, and the other way round."""
    if (rows.draws_NK is not None) != drawn:
        raise _refusal(rows, 0, f"it comes {'without' if drawn else 'with'} the number of draws of its ids")


def _logsumexp_fault(rows: Rows) -> tuple[int, str] | None:
    if rows.logsumexp_N is None:
        return None
    if rows.logsumexp_N.shape != rows.topk_logits_NK.shape[:1]:
        return 0, "log-sum-exp of the wrong shape"
    wrong = ~np.isfinite(rows.logsumexp_N) | (rows.logsumexp_N < rows.topk_logits_NK[:, 0].astype(np.float32) - 1e-3)
    return (int(wrong.argmax()), "log-sum-exp NaN, infinite or below the largest logit") if wrong.any() else None


def _draws_fault(rows: Rows) -> tuple[int, str] | None:
    """One slot is kept for the likeliest id, so that a position has K-1 draws."""
    if rows.draws_NK is None:
        return None
    if rows.draws_NK.shape != rows.topk_ids_NK.shape:
        return 0, "numbers of draws of the wrong shape"
    draws = rows.topk_ids_NK.shape[1] - 1
    wrong = (rows.draws_NK.sum(axis=1, dtype=np.int64) != draws) | (rows.draws_NK < 0).any(axis=1)
    return (int(wrong.argmax()), f"its ids were not drawn {draws} times") if wrong.any() else None
