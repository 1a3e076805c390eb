"""What runs inside vLLM's workers, through its own two doors: a worker extension and a logits processor.

`Capture` has the sampler hand out what `topk.py` finds in the head's raw logits, instead of what vLLM would look for;
`ChosenTokens` has vLLM "sample" a response that is given, or that we draw. Both are named to vLLM as text and loaded by it, in
this process or in another; neither changes a file or a class of vLLM's, and the self-test proves what they do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from duet.stages.engines.topk import drawn, top_k

GIVEN, SEED, TEMPERATURE = "given_ids", "seed", "temperature"  # keys in a request's extra_args


class Capture:
    """Methods that vLLM adds to its worker class; called through `LLM.collective_rpc`."""

    model_runner: Any  # the worker's
    _duet_hooks: tuple[Any, ...] = ()

    def duet_capture(self, k: int, num_ids: int, logsumexp: bool) -> bool:
        """Hook the sampler: every row that wants logprobs gets the k largest raw logits, and the log-sum-exp as the last.

        Before the sampler runs: logits are as the head (and its soft-cap) left them. With `k` 0 the hook is taken away.
        False where this release's sampler cannot be hooked; vLLM then does what it always does.
        """
        sampler = getattr(self.model_runner, "sampler", None)
        if not isinstance(sampler, torch.nn.Module):
            return False
        for hook in self._duet_hooks:
            hook.remove()
        self._duet_hooks = ()
        if k == 0:
            return True
        found: list[LogprobsTensors] = []

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found.clear()
            metadata, logits_NV = kwargs["sampling_metadata"], kwargs["logits"]
            wanted = metadata.max_num_logprobs is not None
            rows = top_k(logits_NV, k, num_ids, logsumexp) if wanted else None
            logits_NV[:, num_ids:] = -torch.inf  # head padding is not a token and must not be sampled
            if rows is None:
                return None
            ids_NK, values_NK, sums_N = rows
            if sums_N is not None:
                ids_NK = torch.nn.functional.pad(ids_NK, (0, 1), value=-1)
                values_NK = torch.cat([values_NK, sums_N[:, None]], dim=1)
            found.append(LogprobsTensors(ids_NK, values_NK, ids_NK[:, 0]))  # nobody reads the sampled tokens' ranks
            return args, {**kwargs, "sampling_metadata": dataclasses.replace(metadata, max_num_logprobs=None)}

        def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if found:
                output.logprobs_tensors = found.pop()

        self._duet_hooks = (
            sampler.register_forward_pre_hook(before, with_kwargs=True),
            sampler.register_forward_hook(after),
        )
        return True


class ChosenTokens(LogitsProcessor):
    """Forces one token at each position of a request that asks for it: the given token, or one that Duet sampled.

    What is captured is the model's own: logits are looked at, or copied by vLLM, before they are processed. vLLM's own draws
    need a generator per request, which fails on a CPU where a long prompt is computed in parts.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[dict[str, Any], list[int]]] = {}  # row of the batch: what to choose, tokens so far

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        rows = self._rows
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, _, tokens in batch_update.added:
            rows.pop(row, None)
            if params.extra_args and params.extra_args.keys() & {GIVEN, SEED}:
                rows[row] = params.extra_args, tokens
        for source, target, direction in batch_update.moved:
            moved, replaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        given = [
            (row, how[GIVEN][len(done)])
            for row, (how, done) in self._rows.items()
            if len(done) < len(how.get(GIVEN, ()))
        ]
        sampled = [(row, how, len(done)) for row, (how, done) in self._rows.items() if SEED in how]
        if given:
            rows, tokens = (torch.tensor(column, device=logits.device) for column in zip(*given, strict=True))
            _leave(logits, rows, tokens)
        if sampled:
            rows, ways, steps = zip(*sampled, strict=True)
            at = torch.tensor(rows, device=logits.device)
            seeds = [how[SEED] for how in ways]
            _leave(logits, at, drawn(logits[at], ways[0][TEMPERATURE], seeds, steps))
        return logits


def _leave(logits_NV: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> None:
    """Take every id but one away from these rows."""
    logits_NV[rows] = -torch.inf
    logits_NV[rows, tokens] = 0
