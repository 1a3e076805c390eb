"""How the attack relearn trains a copy: cross-entropy of the answers, AdamW at a constant rate, all weights or adapters.

Shapes: B batch, T time, N supervised positions of a batch, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from duet.stages.models.alignment import align

MAX_GRAD_NORM = 1.0
# Adapters want about ten times the rate of full training (Schulman et al. 2025, "LoRA Without Regret"), on all linear layers.
LORA_LR_FACTOR = 10.0


class Teaching:
    """A model in training on pairs of prompt ids and answer ids, each of its steps on the next `batch_size` pairs."""

    def __init__(
        self, model: Any, pairs: Sequence[tuple[list[int], list[int]]], lr: float, batch_size: int, seed: int
    ) -> None:
        self.model, self._pairs, self._size = model, pairs, min(batch_size, len(pairs))
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=lr, weight_decay=0.0)
        self._rng = np.random.default_rng(seed)
        self._waiting: list[int] = []
        self.done = 0

    def step(self) -> float:
        """One optimizer step on the next pairs, each epoch in an order of its own; the loss, in nats per token.

        The model stays in evaluation mode: no dropout, so that a model's answers differ by what it learned alone.
        """
        while len(self._waiting) < self._size:
            self._waiting += self._rng.permutation(len(self._pairs)).tolist()
        chosen, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        prompts, answers = zip(*(self._pairs[i] for i in chosen), strict=True)
        batch = align(prompts, answers, pad_id=0).to(next(self.model.parameters()).device)
        logits_BTV = self.model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).logits
        logits_NV = logits_BTV[batch.batch_index_N, batch.position_N]
        token_N = torch.tensor([i for answer in answers for i in answer], device=logits_NV.device)
        loss = torch.nn.functional.cross_entropy(logits_NV.float(), token_N)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        self._optimizer.step()
        self.done += 1
        return loss.item()


def add_adapters(model: Any, rank: int, seed: int) -> Any:
    """The model with adapters of this rank on all linear layers but the head, in place, which alone are trained.

    Drawn by the seed; before the first step it answers as it did (LoRA, arXiv 2106.09685: B starts at 0).
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(config, model).eval()
