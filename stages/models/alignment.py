"""Which row of a model's output belongs to which response token. The only module that does this arithmetic.

Row t of a model's output predicts token t+1. With a prompt of length L and response tokens r_0..r_{P-1}, the row that
predicts r_j is L-1+j, for the teacher with its prompt and for the student with its own, and the model must be fed
`prompt ⊕ r_0..r_{P-2}`: the last response token is predicted, never read.

Shapes: B batch, T time, N supervised positions of the batch, P positions of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


def supervised_positions(prompt_length: int, num_positions: int) -> range:
    """Positions in the model's sequence whose output rows predict r_0..r_{P-1}."""
    if prompt_length < 1 or num_positions < 1:
        raise ValueError(f"prompt of {prompt_length} tokens with {num_positions} positions: both must be at least 1")
    return range(prompt_length - 1, prompt_length - 1 + num_positions)


def input_ids(prompt_ids: Sequence[int] | np.ndarray, response_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """What the model reads, int64 [L + P - 1]: the prompt and all response tokens but the last."""
    return np.concatenate([np.asarray(prompt_ids), np.asarray(response_ids)[:-1]]).astype(np.int64)


@dataclass(frozen=True)
class AlignedBatch:
    """A right-padded batch and the coordinates of its N supervised positions, row by row, position by position."""

    input_ids_BT: torch.Tensor  # int64
    attention_mask_BT: torch.Tensor  # int64, 0 on padding
    batch_index_N: torch.Tensor  # int64, which sequence
    position_N: torch.Tensor  # int64, which position in it

    def to(self, device: torch.device) -> AlignedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> AlignedBatch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AlignedBatch:
        return AlignedBatch(*(change(getattr(self, name)) for name in self.__dataclass_fields__))


def shared(batch: AlignedBatch, sequence_B: np.ndarray) -> AlignedBatch:
    """Sequences of one number, which must read the same, as one of the batch; numbers lie between 0 and the last, ascending.

    The supervised positions stay as many and in their order.
    """
    _, firsts = np.unique(sequence_B, return_index=True)
    if len(firsts) == len(sequence_B):
        return batch
    kept = torch.from_numpy(firsts)
    number_B = torch.from_numpy(sequence_B)
    return AlignedBatch(
        batch.input_ids_BT[kept], batch.attention_mask_BT[kept], number_B[batch.batch_index_N], batch.position_N
    )


def align(
    prompts: Sequence[Sequence[int] | np.ndarray], responses: Sequence[Sequence[int] | np.ndarray], pad_id: int
) -> AlignedBatch:
    """Batch the sequences with padding on the right, where causal attention never looks from a real position."""
    sequences = [input_ids(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    shape = (len(sequences), max(map(len, sequences)))
    ids_BT, mask_BT = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = sequence
        mask_BT[row, : len(sequence)] = 1
    positions = [supervised_positions(len(p), len(r)) for p, r in zip(prompts, responses, strict=True)]
    batch_index_N = np.repeat(np.arange(len(sequences)), [len(p) for p in positions])
    position_N = np.concatenate([np.asarray(p) for p in positions])
    return AlignedBatch(*map(torch.from_numpy, (ids_BT, mask_BT, batch_index_N, position_N)))
