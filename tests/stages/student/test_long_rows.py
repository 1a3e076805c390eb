"""The memory of a step on a long row: beside the activations it does not grow with the length."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duet.stages.models.alignment import align
from duet.stages.student import gather
from duet.stages.student.head import Forward, losses_at
from duet.stages.student.losses import LOSSES, TopK, loss_of
from duet.stages.student.passes import Pass

VOCAB, K, SHORT, LONG = 8192, 5, 100, 500


class Live(TorchDispatchMode):
    """Bytes of all tensors that were made and still exist, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def long_pass(length: int) -> Pass:
    """A document of which every position is learned."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (length + 1,), generator=draw).tolist()
    values_NK = torch.randn(length, K, generator=draw).sort(descending=True)[0]
    teacher = TopK(values_NK, torch.full((length,), 12.0))
    zeros_N = torch.zeros(length, dtype=torch.int64)
    top_NK = torch.randint(3, VOCAB, (length, K), generator=draw)
    return Pass(align([ids[:1]], [ids[1:]], 0), top_NK, teacher, torch.ones(length), zeros_N, zeros_N == 0)


def peak(model: Any, step: Callable[[], torch.Tensor]) -> int:
    model.zero_grad(set_to_none=True)
    with Live() as live:
        step().backward()
    return live.peak


@pytest.mark.parametrize("name", ["huber_raw", "forward_kl_tail"])
def test_head_and_loss_hold_no_more_of_a_longer_row_than_hidden_states(name, monkeypatch):
    monkeypatch.setattr(gather, "BLOCK_ENTRIES", 2**16)
    model = tiny_model(tiny_config("llama", VOCAB, max_position_embeddings=1024)).train()
    forward = Forward(model, LOSSES[name].needs_logsumexp).train()
    assert forward.try_head().gathered
    beside = []
    for length in (SHORT, LONG):
        one = long_pass(length)

        def whole(one: Pass = one) -> torch.Tensor:
            return losses_at(one, forward, loss_of(name), nullcontext())[0].mean()

        def activations(one: Pass = one) -> torch.Tensor:
            ids_BT, mask_BT = one.batch.input_ids_BT, one.batch.attention_mask_BT
            hidden_BTD = model.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
            return hidden_BTD[one.batch.batch_index_N, one.batch.position_N].sum()

        beside.append(peak(model, whole) - peak(model, activations))
    width = model.config.hidden_size
    of_rows = 16 * 4 * (width + K) * (LONG - SHORT)  # some copies of hidden states and of the teacher's values
    assert abs(beside[1] - beside[0]) < of_rows
    assert of_rows < 0.1 * 4 * VOCAB * (LONG - SHORT), "logits over the vocabulary would show"
