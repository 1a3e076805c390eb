"""Activation patching: what a model says of answers when one of its layers' outputs comes from another model.

Both models read the same ids. Of each answer some tokens are marked; at the positions that predict them, one layer's output
in the `target` is replaced by that of the `source`, and all later layers go on from there. A model patched with itself says
what it says anyway.

Shapes: B batch, T time, N marked positions of a batch, D width, L layers, Q answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from duet.stages.models.alignment import AlignedBatch, align, supervised_positions
from duet.stages.models.batching import cut_by_length
from duet.stages.models.layers import decoder_layers
from duet.stages.models.token_scores import MAX_PADDING, batch_scores


@dataclass(frozen=True)
class Marked:
    """Answers behind their prompts, as ids, and which of the answers' tokens count: one at least of each."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    marks: Sequence[np.ndarray]  # bool, one per token of the answer


@torch.inference_mode()
def patched_logprobs(
    target: Any, source: Any, given: Marked, pad_id: int, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean natural-log probability of each answer's marked tokens: of `target` as it is, float64 [Q], and with each layer's
    output from `source` in turn, float64 [L, Q].

    The models are on one device, in evaluation mode, and of one shape. A pass reads at most `max_tokens` tokens with padding,
    and one answer at least.
    """
    layers = decoder_layers(target)
    pairs = zip(given.prompts, given.answers, strict=True)
    lengths = np.array([supervised_positions(len(p), len(a)).stop for p, a in pairs])
    whole_Q, patched_LQ = np.empty(len(lengths)), np.empty((len(layers), len(lengths)))
    for rows in cut_by_length(lengths, MAX_PADDING, max_tokens):
        answers, marks = [given.answers[row] for row in rows], [given.marks[row] for row in rows]
        batch = align([given.prompts[row] for row in rows], answers, pad_id).to(target.device)
        whole_Q[rows] = _means(batch_scores(target, batch, answers)[0], marks)
        at = _marked_positions(batch, marks)
        for number, states_ND in enumerate(layer_states(source, batch, at)):
            with _replaced(layers[number], at, states_ND):
                patched_LQ[number, rows] = _means(batch_scores(target, batch, answers)[0], marks)
    return whole_Q, patched_LQ


Positions = tuple[
    torch.Tensor, torch.Tensor
]  # of the N marked tokens: which sequence, and the position that predicts it


def layer_states(model: Any, batch: AlignedBatch, at: Positions) -> list[torch.Tensor]:
    """Each layer's own output at N positions, L tensors [N, D]: the last one's before the final norm."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: found.append(_hidden(output)[at].clone()))
        for layer in decoder_layers(model)
    ]
    try:
        model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _replaced(layer: torch.nn.Module, at: Positions, states_ND: torch.Tensor) -> Iterator[None]:
    """While this lasts, the layer's output has these states at these positions."""

    def replace(module: Any, inputs: Any, output: Any) -> Any:
        hidden_BTD = _hidden(output).clone()
        hidden_BTD[at] = states_ND.to(hidden_BTD)
        return hidden_BTD if isinstance(output, torch.Tensor) else (hidden_BTD, *output[1:])

    hook = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states [B, T, D] in what a layer returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _marked_positions(batch: AlignedBatch, marks: Sequence[np.ndarray]) -> Positions:
    chosen = torch.from_numpy(np.concatenate(marks)).to(batch.position_N.device)
    return batch.batch_index_N[chosen], batch.position_N[chosen]


def _means(logprob_N: np.ndarray, marks: Sequence[np.ndarray]) -> list[float]:
    """Of each answer the mean over its marked tokens."""
    ends = np.cumsum([len(of_answer) for of_answer in marks])[:-1]
    parts = np.split(logprob_N, ends)
    return [float(of_answer[marked].mean()) for of_answer, marked in zip(parts, marks, strict=True)]
