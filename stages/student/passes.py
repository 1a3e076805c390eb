"""The forward passes of a step: a batch of the store, aligned, sorted by length and cut so that little of it is padding.

How a batch is cut changes speed and memory, not the step: the gradient is the sum over all its supervised positions.

Shapes: B batch, T time, N supervised positions of a pass, K kept ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from duet.cache.record import SUBSETS, counts_of, offsets_of, prompt_and_response
from duet.stages.models.alignment import AlignedBatch, align, shared
from duet.stages.models.batching import cut_by_length
from duet.stages.settings.student import TrainSettings
from duet.stages.student.losses import TopK, position_weights
from duet.stages.student.targets import Targets

FORGET, RETAIN, BROAD = range(len(SUBSETS))


@dataclass(frozen=True)
class Pass:
    """One forward pass: the student's aligned rows, and the teacher's logits at each supervised position."""

    batch: AlignedBatch
    topk_ids_NK: torch.Tensor  # int64
    teacher: TopK
    weight_N: torch.Tensor  # float32, weight of each position in the loss
    subset_N: torch.Tensor  # int64, index into SUBSETS
    is_first_N: torch.Tensor  # bool, the first position of its row: of a query, once for each teacher of a mix
    answer_id_N: torch.Tensor | None = None  # int64, the response's token; None where no cross-entropy is wanted
    answer_weight_N: torch.Tensor | None = None  # float32, of the cross-entropy beside the loss

    def to(self, device: torch.device) -> Pass:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Pass:
        """The same pass in pinned memory, from which a GPU copies while the CPU goes on."""
        return self._map(torch.Tensor.pin_memory)

    def without_weight(self) -> Pass:
        """The same pass with weights of 0, for a process that has none left while others still have some."""
        return replace(self, weight_N=torch.zeros_like(self.weight_N))

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.batch.attention_mask_BT.sum())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Pass:
        def of(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            return value and type(value)(*(of(getattr(value, name)) for name in value.__dataclass_fields__))

        return of(self)


def passes_of(rows: Targets, settings: TrainSettings, pad_id: int) -> list[Pass]:
    """All rows of a batch, in as few passes as `max_padding` and `pass_tokens` allow; none for no rows."""
    if len(rows.subsets) == 0:
        return []
    by_sequence = np.argsort(rows.sequence_R, kind="stable")
    firsts = offsets_of(np.bincount(rows.sequence_R))
    # The last response token is predicted, never read.
    lengths = counts_of(rows.token_offsets)[by_sequence[firsts[:-1]]] - 1
    subset_weights = [getattr(settings, f"{subset}_weight") for subset in SUBSETS]
    top_k = slice(settings.top_k)
    passes = []
    for sequences in cut_by_length(lengths, settings.max_padding, settings.pass_tokens):
        group = np.concatenate([by_sequence[firsts[number] : firsts[number + 1]] for number in sequences])
        sequence_B = np.repeat(np.arange(len(sequences)), counts_of(firsts)[sequences])
        both = [prompt_and_response(rows, int(row)) for row in group]
        counts = counts_of(rows.position_offsets)[group]
        index_N = np.concatenate([np.arange(count) for count in counts])
        at_N = np.repeat(rows.position_offsets[group], counts) + index_N
        subset_N = torch.from_numpy(np.repeat(rows.subsets[group].astype(np.int64), counts))
        batch = align([prompt for prompt, _ in both], [response for _, response in both], pad_id)
        teacher_weight_N = torch.from_numpy(np.repeat(rows.weight_R[group], counts))
        answers = {}
        if settings.answer_weight:
            answers["answer_id_N"] = torch.from_numpy(np.concatenate([response for _, response in both])).long()
            answers["answer_weight_N"] = settings.answer_weight * (subset_N == RETAIN)
        passes.append(
            Pass(
                batch=shared(batch, sequence_B),
                topk_ids_NK=torch.from_numpy(rows.topk_ids_NK[at_N, top_k]).long(),
                teacher=TopK(
                    torch.from_numpy(rows.topk_logits_NK[at_N, top_k]),
                    None if rows.logsumexp_N is None else torch.from_numpy(rows.logsumexp_N[at_N]),
                    None if rows.mask_NK is None else torch.from_numpy(rows.mask_NK[at_N, top_k]),
                    None if rows.share_NK is None else torch.from_numpy(rows.share_NK[at_N, top_k]),
                ),
                weight_N=position_weights(subset_N, torch.from_numpy(index_N), subset_weights, settings.position_decay)
                * teacher_weight_N,
                subset_N=subset_N,
                is_first_N=torch.from_numpy(index_N == 0),
                **answers,
            )
        )
    return passes
