"""A linear output head without [N, V] logits: its logits at K ids of each row, and the log-sum-exp over all ids.

Used by `duet.stages.student.head`, which knows models; here are only tensors. A head is a sum of parts,
logits_NV = sum_p input_p · weight_p^T: (hidden, W); with a bias also (1, bias as one column); with LoRA also
(scaling · A(dropout(hidden)), B). Always: sums are accumulated in float32 (float64 for float64), a gradient has the dtype of
its tensor, and no tensor of N x V or of N x K x D elements exists.

Shapes: N rows, K ids of each, V vocabulary, D width of a part, U distinct ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Parts = list[tuple[torch.Tensor, torch.Tensor]]  # (input_ND, weight_VD) of each
Tail = Callable[[torch.Tensor], torch.Tensor]  # applied to each logit after the sum

CHUNK_ENTRIES = 2**12  # rows of W that are copied at once where no kernel reads them in place
CHUNK_IDS = 2**12  # rows of dW that are float32 at once
BLOCK_ENTRIES = 2**23  # logits that exist at once in a pass over the vocabulary

# PyTorch computes <h[n], W[ids[n, k]]> for the gradient of an embedding bag's weights. A private op: `dots_chunked`
# stands in for it where it is missing, and tests hold one against the other.
_FUSED = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
_FUSED_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def gathered_logits(parts: Parts, ids_NK: torch.Tensor) -> torch.Tensor:
    """sum_p <input_p[n], weight_p[ids[n, k]]>, [N, K] in float32 (float64 for float64 parts), before any tail."""
    return reduce(torch.add, (_Dots.apply(*part, ids_NK) for part in parts))


class _Dots(torch.autograd.Function):
    """g[n, k] = <h[n], W[ids[n, k]]>. Computed in W's dtype, accumulated in float32, as are both gradients."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK)
        fused = _FUSED is not None and weight_VD.device.type == "cpu" and weight_VD.dtype in _FUSED_DTYPES
        return _wide((dots_fused if fused else dots_chunked)(hidden_ND.to(weight_VD.dtype), weight_VD, ids_NK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        hidden_ND, weight_VD, ids_NK = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = _bags(weight_VD, ids_NK.flatten(), grad_NK.flatten(), _starts(ids_NK)).to(hidden_ND.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _scattered(hidden_ND, weight_VD, ids_NK, grad_NK)
        return grad_hidden, grad_weight, None


def dots_fused(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """<h[n], W[ids[n, k]]>, [N, K] in the common dtype of both, without a copy of any row of W; CPU only."""
    bag_of_each = torch.arange(len(ids_NK)).repeat_interleave(ids_NK.shape[1])
    return _FUSED(hidden_ND, weight_VD, ids_NK.flatten(), _starts(ids_NK), bag_of_each, 0).view(ids_NK.shape)  # pyright: ignore


def dots_chunked(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """The same by public operations on any device, with CHUNK_ENTRIES rows of W copied at a time (K, if that is more)."""
    rows = max(1, CHUNK_ENTRIES // ids_NK.shape[1])
    with torch.autocast(hidden_ND.device.type, enabled=False):
        pairs = zip(hidden_ND.split(rows), ids_NK.split(rows), strict=True)
        return torch.cat([torch.bmm(weight_VD[ids], hidden[:, :, None])[..., 0] for hidden, ids in pairs])


def _starts(ids_NK: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, ids_NK.numel(), ids_NK.shape[1], device=ids_NK.device)


def _bags(table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Weighted sums of the table's rows, one bag from each of `starts` to the next; accumulated in float32."""
    return torch.embedding_bag(table, rows, starts, per_sample_weights=weights.to(table.dtype))[0]


def _scattered(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor, grad_NK: torch.Tensor
) -> torch.Tensor:
    """dW[v] = sum over all (n, k) with ids[n, k] = v of grad[n, k] h[n]: zero but for U rows, each summed in float32.

    The entries are sorted by id, so that each id that occurs is one bag.
    """
    grad_weight = torch.zeros_like(weight_VD)
    # stable: the order of each sum, and so its bits, are always the same
    ids, order = ids_NK.flatten().sort(stable=True)
    rows, grads, table = order // ids_NK.shape[1], grad_NK.flatten()[order], _wide(hidden_ND)
    ids_U, counts_U = torch.unique_consecutive(ids, return_counts=True)
    ends_U = counts_U.cumsum(0)
    for first in range(0, len(ids_U), CHUNK_IDS):
        cut = slice(first, first + CHUNK_IDS)
        starts = ends_U[cut] - counts_U[cut]
        span = slice(int(starts[0]), int(ends_U[cut][-1]))
        grad_weight[ids_U[cut]] = _bags(table, rows[span], grads[span], starts - starts[0]).to(weight_VD.dtype)
    return grad_weight


def logsumexp(
    parts: Parts, tail: Tail, ids_NK: torch.Tensor | None = None, logits_NK: torch.Tensor | None = None
) -> torch.Tensor:
    """log sum_v exp(tail(logit[n, v])) over the whole vocabulary, [N] in float32 (float64 for float64 parts).

    The vocabulary is taken in blocks, and each block's logits are computed again for the gradient, so that [N, V] never
    exists. Products are computed in autocast's dtype, else each in its weight's; a product in bfloat16 is rounded to 8 bits.
    `logits_NK` are what `gathered_logits` gives at `ids_NK`, and are taken there in place of the products: probabilities that
    are computed of both would else sum to more than 1 over the ids.
    """
    inputs, weights = zip(*parts, strict=True)
    if ids_NK is None or logits_NK is None:
        ids_NK, logits_NK = torch.empty((2, len(inputs[0]), 0), device=inputs[0].device).unbind()
    dtype = autocast_dtype(inputs[0].device.type)
    return _LogSumExp.apply(tail, dtype, _first_of_equals(ids_NK.long()), logits_NK, *inputs, *weights)


class _LogSumExp(torch.autograd.Function):
    """`logsumexp` of p inputs, then p weights. The gradient of a logit is exp(logit - logsumexp) that of the result."""

    @staticmethod
    def forward(
        ctx: Any, tail: Tail, dtype: torch.dtype | None, ids: torch.Tensor, known: torch.Tensor, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.tail, ctx.dtype = tail, dtype
        inputs, weights = _halves(tensors)
        total_N = _wide(inputs[0]).new_full((len(inputs[0]),), -torch.inf)
        for cut in _blocks(inputs[0], weights[0]):
            logits = _block_logits(inputs, [weight[cut] for weight in weights], dtype)
            total_N = torch.logaddexp(total_N, tail(_with_known(logits, cut, ids, known)).logsumexp(-1))
        ctx.save_for_backward(total_N, ids, known, *tensors)
        return total_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        total_N, ids, known, *tensors = ctx.saved_tensors
        (inputs, weights), (inputs_wanted, weights_wanted) = _halves(tensors), _halves(ctx.needs_input_grad[4:])
        known = _leaf(known, ctx.needs_input_grad[3])
        leaves = [_leaf(_wide(values), wanted) for values, wanted in zip(inputs, inputs_wanted, strict=True)]
        grad_weights = [
            torch.empty_like(weight) if wanted else None for weight, wanted in zip(weights, weights_wanted, strict=True)
        ]
        for cut in _blocks(inputs[0], weights[0]):
            cuts = [_leaf(weight[cut], wanted) for weight, wanted in zip(weights, weights_wanted, strict=True)]
            with torch.enable_grad():
                logits = ctx.tail(_with_known(_block_logits(leaves, cuts, ctx.dtype), cut, ids, known))
            logits.backward((logits.detach() - total_N[:, None]).exp_().mul_(grad_N[:, None]))  # adds to leaves' grad
            for grad, weight in zip(grad_weights, cuts, strict=True):
                if grad is not None and weight.grad is not None:
                    grad[cut] = weight.grad
        grad_inputs = [
            None if leaf.grad is None else leaf.grad.to(values.dtype)
            for leaf, values in zip(leaves, inputs, strict=True)
        ]
        return None, None, None, known.grad, *grad_inputs, *grad_weights


def _first_of_equals(ids_NK: torch.Tensor) -> torch.Tensor:
    """The ids, with -1 for each that stands at its position a second time."""
    ids, order = ids_NK.sort(dim=-1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return ids_NK.masked_fill(again.scatter(1, order, again), -1)


def _with_known(logits: torch.Tensor, cut: slice, ids_NK: torch.Tensor, known_NK: torch.Tensor) -> torch.Tensor:
    """A block's logits, changed in place at those of the ids that lie in it."""
    at_N, at_K = ((ids_NK >= cut.start) & (ids_NK < cut.stop)).nonzero(as_tuple=True)
    return logits.index_put_((at_N, ids_NK[at_N, at_K] - cut.start), known_NK[at_N, at_K].to(logits.dtype))


def largest(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row before any tail, float32 [N], and its id, int64 [N]; the first of equals."""
    inputs, weights = zip(*parts, strict=True)
    best_N = _wide(inputs[0]).new_full((len(inputs[0]),), -torch.inf)
    ids_N = torch.zeros(len(best_N), dtype=torch.int64, device=best_N.device)
    dtype = autocast_dtype(best_N.device.type)
    for cut in _blocks(inputs[0], weights[0]):
        values_N, found_N = _block_logits(inputs, [weight[cut] for weight in weights], dtype).max(-1)
        ids_N = torch.where(values_N > best_N, found_N + cut.start, ids_N)
        best_N = torch.maximum(values_N, best_N)
    return best_N, ids_N


def _block_logits(inputs: Any, weights: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """sum_p input_p · weight_p^T in float32 or wider, each product in `dtype` or its weight's own."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        products = (
            _wide(linear(values.to(dtype or weight.dtype), weight.to(dtype or weight.dtype)))
            for values, weight in zip(inputs, weights, strict=True)
        )
        return reduce(torch.add, products)


def _blocks(input_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    """The vocabulary cut so that a block's logits of all rows are at most BLOCK_ENTRIES."""
    size = max(1, BLOCK_ENTRIES // len(input_ND))
    for first in range(0, len(weight_VD), size):
        yield slice(first, first + size)


def _halves(values: Any) -> tuple[Any, Any]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def _leaf(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    return tensor.detach().requires_grad_(wanted)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes products in here, None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
