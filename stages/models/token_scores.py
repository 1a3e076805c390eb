"""How likely a model finds given answers: per answer token its log-probability, whether it is the most likely, and how the
model's own distribution lies there.

Stage three and the membership attacks read answers in this way, without generating. Sequences are right-padded, which a causal
model never sees from a real token; `alignment.py` says which row of the output predicts which token. What must always hold: the
numbers of an answer do not depend on what else is in the batch, but for rounding.

Shapes: B batch, T time, N supervised positions of the batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from duet.stages.models.alignment import AlignedBatch, align, supervised_positions
from duet.stages.models.batching import cut_by_length

MAX_PADDING = 0.05  # share of all tokens that are read
LOWEST = -700.0  # nats per token; a little below, e to the power of it leaves float64: such weights have diverged
BLOCK_LOGITS = 2**24  # logits of one block that is normalised in float32: 64 MiB, and a few times that in passing


@dataclass(frozen=True)
class TokenScores:
    """What a model makes of one answer, token by token; all arrays have the answer's length."""

    logprob: np.ndarray  # float64, natural log of the token's probability after all before it
    is_top: np.ndarray  # bool, no id of the vocabulary has a higher logit
    mean: np.ndarray  # float64, mean of the log-probability under the model's distribution: minus its entropy
    std: np.ndarray  # float64, standard deviation of the same


def token_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    max_tokens: int,
) -> list[np.ndarray]:
    """Natural-log probability of each answer token after its prompt and the answer's tokens before it, float64.

    Arguments as of `token_scores`.
    """
    return [scores.logprob for scores in token_scores(model, prompts, answers, pad_id, max_tokens)]


@torch.inference_mode()
def token_scores(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    max_tokens: int,
) -> list[TokenScores]:
    """One TokenScores per pair of a prompt and an answer, in their order.

    `model` is a causal language model of transformers, in evaluation mode; it is read on its own device and in its own dtype,
    and its logits are normalised in float32 over the whole head. `pad_id` is any id of its vocabulary. A forward pass reads at
    most `max_tokens` tokens, padding included, and one pair at least; pairs of like length go together. Prompts and answers
    have one token at least, else ValueError; nothing is cut to the model's context, which the caller checks.
    """
    lengths = np.array([supervised_positions(len(p), len(a)).stop for p, a in zip(prompts, answers, strict=True)])
    found: dict[int, TokenScores] = {}
    for rows in cut_by_length(lengths, MAX_PADDING, max_tokens) if len(lengths) else []:
        chosen = [answers[row] for row in rows]
        batch = align([prompts[row] for row in rows], chosen, pad_id).to(model.device)
        columns = batch_scores(model, batch, chosen)
        ends = np.cumsum([len(answer) for answer in chosen])[:-1]
        parts = zip(*(np.split(column, ends) for column in columns), strict=True)
        found |= {int(row): TokenScores(*part) for row, part in zip(rows, parts, strict=True)}
    return [found[row] for row in range(len(lengths))]


def batch_scores(model: Any, batch: AlignedBatch, answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The columns of TokenScores for all answer tokens of a batch on the model's device, [N] each, in its order."""
    return _scores(*_logits_at(model, batch), np.concatenate([np.asarray(answer) for answer in answers]))


def _logits_at(model: Any, batch: AlignedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, U, V] at the U positions that are supervised in any sequence, and where in it the N rows lie (b, u).

    Answers stand at the end of their sequences, so the head is left out over what is prompt in all of them.
    """
    keep_U, column_N = torch.unique(batch.position_N, return_inverse=True)
    takes = inspect.signature(model.forward).parameters
    more = {"logits_to_keep": keep_U} if "logits_to_keep" in takes else {}
    out = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False, **more)
    return out.logits, batch.batch_index_N, column_N if more else batch.position_N


def _scores(
    logits_BUV: torch.Tensor, batch_index_N: torch.Tensor, column_N: torch.Tensor, tokens: np.ndarray
) -> list[np.ndarray]:
    """The columns of TokenScores for the N rows, block by block in float32."""
    token_N = torch.from_numpy(tokens.astype(np.int64)).to(logits_BUV.device)
    columns: list[list[np.ndarray]] = []
    for at in torch.arange(len(token_N), device=token_N.device).split(max(1, BLOCK_LOGITS // logits_BUV.shape[-1])):
        logits_NV = logits_BUV[batch_index_N[at], column_N[at]].float()
        own_N1 = token_N[at, None]
        is_top_N = (logits_NV.gather(1, own_N1) >= logits_NV.amax(dim=1, keepdim=True)).squeeze(1)
        logprobs_NV = logits_NV.log_softmax(dim=1)
        logprob_N = logprobs_NV.gather(1, own_N1).squeeze(1)
        probs_NV = logprobs_NV.exp()
        logprobs_NV.masked_fill_(probs_NV == 0, 0.0)  # 0 * log 0 is 0, where a model rules an id out with -inf, too
        mean_N = (probs_NV * logprobs_NV).sum(dim=1)
        std_N = (probs_NV * (logprobs_NV - mean_N[:, None]).square()).sum(dim=1).sqrt()
        block = (logprob_N.double(), is_top_N, mean_N.double(), std_N.double())
        columns.append([column.cpu().numpy() for column in block])
    return [np.concatenate(parts) for parts in zip(*columns, strict=True)]
