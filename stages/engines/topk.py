"""What engines do with a row of logits: the k largest, at the same price for any vocabulary, a draw, and ids by many draws.

Shapes: N rows, V vocabulary, K kept ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ROWS = 32  # at once: what is computed stays near the processor, and a GPU holds no second copy of all logits
BLOCK = 64
LARGE_VOCABULARY = 16_384  # from here on, to look at blocks first is quicker than torch.topk: 2x to 4x, on a CPU


def top_k(
    logits_NV: torch.Tensor, k: int, num_ids: int, logsumexp: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids (int32) and logits (float32) of the k largest of the first `num_ids` columns, descending, and the log-sum-exp.

    Columns from `num_ids` on are head padding: never among the k, but part of the sum, as of the model's own softmax.
    """
    ids, values, sums = [], [], []
    for part_NV in map(torch.Tensor.float, logits_NV.split(ROWS)):
        values_NK, ids_NK = _largest(part_NV[:, :num_ids], k)
        ids.append(ids_NK.int())
        values.append(values_NK)
        if logsumexp:
            sums.append(part_NV.logsumexp(-1))
    return torch.cat(ids), torch.cat(values), torch.cat(sums) if logsumexp else None


def drawn(logits_NV: torch.Tensor, temperature: float, seeds: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
    """One id per row from softmax(logits / temperature), int64 [N], by the Gumbel-max trick (Gumbel 1954).

    What is drawn depends on the row's logits, its seed and its step alone: not on its company, nor on the engine.
    """
    draws = (
        np.random.default_rng(of).standard_exponential(logits_NV.shape[1]) for of in zip(seeds, steps, strict=True)
    )
    noise_NV = torch.from_numpy(np.log(np.stack(list(draws)))).to(logits_NV.device)
    return (logits_NV.double() / temperature - noise_NV).argmax(-1)


def drawn_ids(
    logits_NV: torch.Tensor, k: int, num_ids: int, seeds: Sequence[int], steps: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (int32), their logits (float32) and numbers of draws (int32), [N, K], by logit, descending.

    k - 1 ids are drawn from softmax over the first `num_ids` columns, with replacement; what is left of the k slots gets the
    likeliest of the others, with 0 draws, so that the likeliest of all is always there. A draw divided by k - 1 is an unbiased
    estimate of an id's probability (arXiv 2503.16870). What is drawn depends on the row's logits, its seed and step alone.
    """
    found = []
    for first in range(0, len(logits_NV), ROWS):
        part_NV = logits_NV[first : first + ROWS, :num_ids].float()
        keys = zip(seeds[first : first + ROWS], steps[first : first + ROWS], strict=True)
        uniform = np.stack(
            [np.random.default_rng([*key, 1]).random(k - 1) for key in keys]
        )  # not the stream of `drawn`
        sums_NV = part_NV.double().softmax(-1).cumsum(-1)
        at = torch.from_numpy(uniform).to(sums_NV.device) * sums_NV[:, -1:]
        drawn_N = torch.searchsorted(sums_NV, at, right=True).clamp(max=part_NV.shape[1] - 1)
        draws_NV = torch.zeros_like(part_NV, dtype=torch.int32)
        draws_NV.scatter_add_(1, drawn_N, torch.ones_like(drawn_N, dtype=torch.int32))
        ids_NK, values_NK = _with_likeliest(part_NV, draws_NV > 0, k)
        found.append((ids_NK.int(), values_NK, draws_NV.gather(1, ids_NK)))
    ids, values, draws = (torch.cat(column) for column in zip(*found, strict=True))
    return ids, values, draws


def named_ids(
    logits_NV: torch.Tensor, k: int, num_ids: int, named: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int32) and their logits (float32), [N, K], descending: those named for each row, fewer than k, and the likeliest."""
    found = []
    for first in range(0, len(logits_NV), ROWS):
        part_NV = logits_NV[first : first + ROWS, :num_ids].float()
        named_NV = torch.zeros_like(part_NV, dtype=torch.bool)
        for row, ids in enumerate(named[first : first + ROWS]):
            named_NV[row, torch.tensor(list(ids), dtype=torch.long)] = True
        found.append(_with_likeliest(part_NV, named_NV, k))
    ids, values = (torch.cat(column) for column in zip(*found, strict=True))
    return ids.int(), values


def _with_likeliest(logits_NV: torch.Tensor, marked_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int64) of the marked ones, fewer than k, and of the likeliest others up to k, with their logits, descending."""
    _, ids_NK = _largest(logits_NV.masked_fill(marked_NV, torch.inf), k)
    order_NK = logits_NV.gather(1, ids_NK).argsort(dim=-1, descending=True, stable=True)
    ids_NK = ids_NK.gather(1, order_NK)
    return ids_NK, logits_NV.gather(1, ids_NK)


def order_ties(ids_NK: np.ndarray, logits_NK: np.ndarray, draws_NK: np.ndarray | None = None) -> None:
    """Order equal logits by id, in place: 16-bit heads have many, and engines should not differ in them."""
    tied = np.flatnonzero((logits_NK[:, 1:] == logits_NK[:, :-1]).any(axis=1))
    if len(tied):
        order = np.lexsort((ids_NK[tied], -logits_NK[tied]), axis=1)
        for column in (ids_NK,) if draws_NK is None else (ids_NK, draws_NK):
            column[tied] = np.take_along_axis(column[tied], order, axis=1)


def _largest(logits_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.topk`. Of a large vocabulary, only the k blocks with the largest maxima are searched.

    That is exact: an id among the k largest lies in a block whose maximum is at least its logit, and fewer than k blocks
    can have a larger maximum unless k larger logits exist.
    """
    num_blocks = logits_NV.shape[1] // BLOCK
    if logits_NV.shape[1] < LARGE_VOCABULARY or k > num_blocks // 4:
        return logits_NV.topk(k, dim=-1)
    whole = num_blocks * BLOCK
    blocks_NMB = logits_NV[:, :whole].unflatten(1, (num_blocks, BLOCK))
    chosen_NK = blocks_NMB.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = blocks_NMB.gather(1, chosen_NK[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    ids = (chosen_NK[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits_NV.device)).flatten(1)
    rest = torch.arange(whole, logits_NV.shape[1], device=logits_NV.device)  # fewer than a block
    candidates = torch.cat([candidates, logits_NV[:, whole:]], dim=1)
    ids = torch.cat([ids, rest.expand(len(ids), -1)], dim=1)
    values_NK, at_NK = candidates.topk(k, dim=-1)
    return values_NK, ids.gather(1, at_NK)
