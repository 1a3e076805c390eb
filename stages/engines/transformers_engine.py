"""Teacher engine on plain transformers: the reference, and what runs where vLLM does not.

Where prompts share what they begin with (`batches.py`), its keys and values are computed for one row and repeated for each
batch.

Shapes: B batch, T time, P positions, K kept ids, V rows of the head.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from duet.cache.errors import UserError
from duet.stages.engines.batches import PASS_TOKENS, by_beginning, filled, of_one_length, padded
from duet.stages.engines.collected import Collected
from duet.stages.engines.interface import Ask, Engine, EngineSpec, Request, Scored, Usage
from duet.stages.engines.topk import drawn
from duet.stages.models.directory import text_config
from duet.stages.models.loading import load_model

WINDOW_BATCHES = 16  # batches of requests that are sorted at a time
KEEP_ALL = (
    0.9  # share of rows that go on: with more, those that have ended cost less than to copy the cache of the others
)
BLOCK_LOGITS = 2**26  # of given responses that are read in one pass: 256 MiB in float32
BLOCK_TOKENS = 2**11  # of each of them: its mask grows with these times all that is before them


@dataclass(frozen=True)
class _Batch:
    """Prompts that are decoded together; all begin with the same `begins_with` tokens."""

    rows: np.ndarray  # int64 [B], the number of each one's request
    prompts: Sequence[Sequence[int]]
    begins_with: int


Choose = Callable[[torch.Tensor, int, np.ndarray], torch.Tensor]  # (logits_BV, position, requests) -> tokens_B
Collect = Callable[
    [np.ndarray, np.ndarray, torch.Tensor, torch.Tensor], None
]  # (requests, their positions, tokens_N, the logits_NV that predicted them)


@dataclass(frozen=True)
class _Beginning:
    """What some prompts begin with, computed for one row."""

    ids: tuple[int, ...]
    cache: Cache


@dataclass
class _SoFar:
    """What rows have read, and what their next tokens need."""

    mask_BT: torch.Tensor  # int64, 0 where a row is padded
    position_B1: torch.Tensor  # int64, of each row's last token
    cache: Cache

    def keep(self, live: np.ndarray) -> torch.Tensor:
        """Leave the other rows out; the numbers of those that stay."""
        left = torch.from_numpy(np.flatnonzero(live)).to(self.mask_BT.device)
        self.mask_BT, self.position_B1 = self.mask_BT[left], self.position_B1[left]
        self.cache.batch_select_indices(left)
        return left


class TransformersEngine(Engine):
    """Batches of left-padded prompts behind the keys and values of what they begin with, decoded step by step."""

    def __init__(self, spec: EngineSpec, model: Any | None = None) -> None:
        """`model`: one that is loaded and on the device already, which may have other weights than the directory."""
        self.name = f"transformers {transformers.__version__}"
        self.route = "forward"
        if spec.quantization or spec.tensor_parallel * spec.pipeline_parallel > 1:
            raise UserError(
                "teacher.quantization, tensor_parallel and pipeline_parallel are vLLM's; this engine is transformers",
                "leave them out, or set teacher.engine: vllm",
            )
        self._spec = spec
        given = model is not None
        self._model: Any = (
            model if given else load_model(spec.model_dir, spec.dtype, spec.trust_remote_code).to(spec.device)
        )
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.usage = Usage()
        self._takes = set(inspect.signature(self._model.forward).parameters)
        # Keys and values only: what recurrent layers remember can neither be repeated nor left out row by row.
        layers = DynamicCache(config=self._model.config).layers
        self._only_attention = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        self._beginning: _Beginning | None = None

    def stream(self, requests: Iterable[Request], ask: Ask) -> Generator[tuple[int, Scored], None, None]:
        waiting = iter(requests)
        while window := list(islice(waiting, WINDOW_BATCHES * self._spec.batch_size)):
            for given in (False, True):
                if requests_of_kind := [request for request in window if (request.given_ids is not None) == given]:
                    yield from self._scored(requests_of_kind, ask, given)

    def _scored(self, window: Sequence[Request], ask: Ask, given: bool) -> Iterator[tuple[int, Scored]]:
        """All responses of these requests, which are given, or all made here."""
        prompts, responses = [r.prompt_ids for r in window], [r.given_ids or () for r in window]
        choose = _chooser(window, ask, self._spec.num_ids)
        for batch in self._batches(prompts, 2, responses) if given else self._batches(prompts, ask.max_positions):
            collected = Collected(ask, self._spec.num_ids, window)
            if given:
                self._read(batch, [responses[row] for row in batch.rows], collected)
            else:
                self._decode(batch, ask.max_positions, choose, collected)
            yield from ((window[row].key, scored) for row, scored in collected.results())

    def answers(
        self, prompts: Sequence[list[int]], max_new_tokens: int
    ) -> Generator[tuple[int, list[int]], None, None]:
        greedy = _chooser([], Ask(1, max_new_tokens), self._spec.num_ids)
        for batch in self._batches(prompts, max_new_tokens):
            found: dict[int, list[int]] = {row: [] for row in batch.rows.tolist()}

            def collect(
                rows: np.ndarray,
                _: np.ndarray,
                tokens_B: torch.Tensor,
                __: torch.Tensor,
                found: dict[int, list[int]] = found,
            ) -> None:
                for row, token in zip(rows.tolist(), tokens_B.tolist(), strict=True):
                    if token not in self._spec.eos_ids:
                        found[row].append(token)

            self._decode(batch, max_new_tokens, greedy, collect)
            yield from found.items()

    def close(self) -> None:
        del self._model, self._beginning
        if self._spec.device == "cuda":
            torch.cuda.empty_cache()

    def _batches(
        self, prompts: Sequence[Sequence[int]], steps: int, given: Sequence[Sequence[int]] | None = None
    ) -> Iterator[_Batch]:
        """Batches that cover all prompts, for that number of forward passes each.

        In each pass but the first a row gets one token more, or else all that it gets is `given`.
        """
        price, most_rows = steps * PASS_TOKENS, self._spec.batch_size
        lengths = np.array([len(prompt) for prompt in prompts])
        added = np.full(len(prompts), steps) if given is None else np.array([len(response) for response in given])
        share = self._spec.share_prefix and self._only_attention
        for shared, group in by_beginning(prompts, price) if share else [(0, np.arange(len(prompts)))]:
            own, new = lengths[group] - shared, added[group]
            if self._can_pad(shared + int(own.max() + new.max())):  # as wide as a batch of them may be
                batches = filled(own + new, shared, most_rows, price)
            else:
                batches = of_one_length(own, shared + int(new.max()), most_rows)
            for rows in batches:
                yield _Batch(group[rows], [prompts[row] for row in group[rows]], shared)

    def _can_pad(self, longest: int) -> bool:
        """Padding stands between what is shared and the rest, so a model must take each token's position as it is told.

        A sliding window counts tokens, padding too: there rows are padded only while everything fits in the window.
        """
        window = getattr(text_config(self._model.config), "sliding_window", None)
        return "position_ids" in self._takes and (window is None or longest < window)

    @torch.inference_mode()
    def _decode(self, batch: _Batch, most: int, choose: Choose, collect: Collect) -> None:
        """Decode until each row has `most` tokens or an end; every step is handed to `collect`.

        Rows that have ended are left out of the steps that follow, if the cache allows it and there are many.
        """
        rows, live = batch.rows, np.ones(len(batch.rows), bool)
        logits_BV, so_far = self._begin(batch)
        for step in range(most):
            tokens_B = choose(logits_BV, step, rows)
            at = torch.from_numpy(np.flatnonzero(live)).to(self._spec.device)
            collect(rows[live], np.full(live.sum(), step), tokens_B[at], logits_BV[at])
            live &= ~np.isin(tokens_B.cpu().numpy(), self._spec.eos_ids)
            if not live.any() or step + 1 == most:
                return
            if live.mean() < KEEP_ALL and self._only_attention:
                left = so_far.keep(live)
                rows, tokens_B, live = rows[live], tokens_B[left], live[live]
            logits_BV = self._go_on(so_far, tokens_B[:, None])[:, -1]

    @torch.inference_mode()
    def _read(self, batch: _Batch, responses: Sequence[Sequence[int]], collect: Collect) -> None:
        """The logits before every token of given responses, block by block of BLOCK_LOGITS at most."""
        rows, lengths, done = batch.rows, np.array([len(response) for response in responses]), 1
        tokens_BP = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, response in enumerate(responses):
            tokens_BP[row, : len(response)] = torch.tensor(list(response))
        tokens_BP = tokens_BP.to(self._spec.device)
        logits_BV, so_far = self._begin(batch)
        collect(rows, np.zeros_like(rows), tokens_BP[:, 0], logits_BV)
        while (live := lengths > done).any():
            if not live.all() and self._only_attention:
                left = so_far.keep(live)
                rows, lengths, tokens_BP = rows[live], lengths[live], tokens_BP[left]
            most = max(1, BLOCK_LOGITS // logits_BV.shape[1] // len(rows))
            width = min(int(lengths.max()) - done, BLOCK_TOKENS, most)
            logits_BTV = self._go_on(so_far, tokens_BP[:, done - 1 : done - 1 + width])
            row_N, step_N = np.nonzero(done + np.arange(width) < lengths[:, None])
            collect(rows[row_N], done + step_N, tokens_BP[row_N, done + step_N], logits_BTV[row_N, step_N])
            done += width

    def _begin(self, batch: _Batch) -> tuple[torch.Tensor, _SoFar]:
        """Read the prompts: the logits after each, raw, [B, V]."""
        device, prompts, shared = self._spec.device, batch.prompts, batch.begins_with
        cache = self._cache_of(prompts[0][:shared], len(prompts))
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.cached_tokens += shared * len(prompts)
        ids_BT, mask_BT = padded([prompt[shared:] for prompt in prompts])
        mask_BT = torch.cat([torch.ones(len(prompts), shared, dtype=torch.long), mask_BT], dim=1).to(device)
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        logits_BTV, cache = self._forward(ids_BT.to(device), mask_BT, position_BT, cache, 1)
        return logits_BTV[:, -1], _SoFar(mask_BT, position_BT[:, -1:], cache)

    def _go_on(self, so_far: _SoFar, ids_BT: torch.Tensor) -> torch.Tensor:
        """Read these next tokens of all rows: the logits after each of them, raw, [B, T, V]."""
        width = ids_BT.shape[1]
        so_far.mask_BT = torch.cat([so_far.mask_BT, so_far.mask_BT.new_ones(len(ids_BT), width)], dim=1)
        position_BT = so_far.position_B1 + torch.arange(1, width + 1, device=ids_BT.device)
        so_far.position_B1 = position_BT[:, -1:]
        logits_BTV, so_far.cache = self._forward(ids_BT, so_far.mask_BT, position_BT, so_far.cache, width)
        return logits_BTV

    def _forward(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, position_BT: torch.Tensor, cache: Cache, keep: int
    ) -> tuple[torch.Tensor, Cache]:
        """Logits after the last `keep` tokens of each row, raw, [B, keep, V], and the cache with these tokens in it."""
        known = {"attention_mask": mask_BT, "position_ids": position_BT, "logits_to_keep": keep}
        known = {name: value for name, value in known.items() if name in self._takes}
        out = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, **known)
        if not isinstance(out.past_key_values, Cache):
            raise UserError(
                f"{type(self._model).__name__} keeps no keys and values: the transformers engine cannot decode it",
                "set teacher.engine: vllm, if vLLM knows this architecture",
            )
        return out.logits[:, -keep:], out.past_key_values

    def _cache_of(self, ids: Sequence[int], num_rows: int) -> Cache:
        """The keys and values of what prompts begin with, for that number of rows; of nothing, an empty cache."""
        if not ids:
            return DynamicCache(config=self._model.config)
        if self._beginning is None or self._beginning.ids != tuple(ids):
            self._beginning = None  # its memory first
            ids_BT = torch.tensor([list(ids)], device=self._spec.device)
            position_BT = torch.arange(len(ids), device=self._spec.device)[None]
            empty = DynamicCache(config=self._model.config)
            _, cache = self._forward(ids_BT, torch.ones_like(ids_BT), position_BT, empty, 1)
            self._beginning = _Beginning(tuple(ids), cache)
        cache = copy.deepcopy(self._beginning.cache)
        cache.batch_repeat_interleave(num_rows)
        return cache


def _chooser(window: Sequence[Request], ask: Ask, num_ids: int) -> Choose:
    """How the next token of each row comes about: a sampled one, or the most likely one."""

    def sampled(logits_BV: torch.Tensor, step: int, rows: np.ndarray) -> torch.Tensor:
        seeds = [window[row].seed or 0 for row in rows]
        return drawn(logits_BV[:, :num_ids], ask.temperature or 1, seeds, [step] * len(rows))

    def greedy(logits_BV: torch.Tensor, step: int, rows: np.ndarray) -> torch.Tensor:
        return logits_BV[:, :num_ids].argmax(-1)

    return sampled if ask.temperature else greedy
