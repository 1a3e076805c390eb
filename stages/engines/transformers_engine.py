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
from duet.stages.engines.batches import PASS_TOKENS, by_beginning, filled, of_one_length
from duet.stages.engines.interface import Ask, Engine, EngineSpec, Request, Scored, Usage
from duet.stages.engines.topk import drawn, top_k
from duet.stages.models.directory import text_config
from duet.stages.models.loading import load_model

WINDOW_BATCHES = 16  # batches of requests that are sorted at a time


@dataclass(frozen=True)
class _Batch:
    """Prompts that are decoded together; all begin with the same `begins_with` tokens."""

    rows: np.ndarray  # int64 [B], the number of each one's request
    prompts: Sequence[Sequence[int]]
    begins_with: int


Choose = Callable[[torch.Tensor, int, np.ndarray], torch.Tensor]  # (logits_BV, position, requests) -> tokens_B


@dataclass(frozen=True)
class _Beginning:
    """What some prompts begin with, computed for one row."""

    ids: tuple[int, ...]
    cache: Cache


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
        choose = _chooser(window, ask, self._spec.num_ids)
        most = np.array([ask.max_positions if r.given_ids is None else len(r.given_ids) for r in window])
        ends = () if given else self._spec.eos_ids
        for batch in self._batches([r.prompt_ids for r in window], int(most.max())):
            collected = _Collected(ask, self._spec.num_ids)
            self._decode(batch, most[batch.rows], choose, ends, collected)
            yield from ((window[row].key, scored) for row, scored in collected.results())

    def answers(self, prompts: Sequence[list[int]], max_new_tokens: int) -> Generator[tuple[int, list[int]], None, None]:
        greedy = _chooser([], Ask(1, max_new_tokens), self._spec.num_ids)
        for batch in self._batches(prompts, max_new_tokens):
            found: dict[int, list[int]] = {row: [] for row in batch.rows.tolist()}

            def collect(
                rows: np.ndarray, tokens_B: torch.Tensor, _: torch.Tensor, found: dict[int, list[int]] = found
            ) -> None:
                for row, token in zip(rows.tolist(), tokens_B.tolist(), strict=True):
                    if token not in self._spec.eos_ids:
                        found[row].append(token)

            self._decode(batch, np.full(len(found), max_new_tokens), greedy, self._spec.eos_ids, collect)
            yield from found.items()

    def close(self) -> None:
        del self._model, self._beginning
        if self._spec.device == "cuda":
            torch.cuda.empty_cache()

    def _batches(self, prompts: Sequence[Sequence[int]], steps: int) -> Iterator[_Batch]:
        """Batches that cover all prompts, each for up to that number of forward passes."""
        price, most_rows = steps * PASS_TOKENS, self._spec.batch_size
        share = self._spec.share_prefix and self._only_attention
        for shared, group in by_beginning(prompts, price) if share else [(0, np.arange(len(prompts)))]:
            lengths = np.array([len(prompts[row]) for row in group]) - shared
            if self._can_pad(shared + int(lengths.max()) + steps):
                batches = filled(lengths, shared + steps, most_rows, price)
            else:
                batches = of_one_length(lengths, shared + steps, most_rows)
            for rows in batches:
                yield _Batch(group[rows], [prompts[row] for row in group[rows]], shared)

    def _can_pad(self, longest: int) -> bool:
        """Padding stands between what is shared and the rest, so a model must take each token's position as it is told.

        A sliding window counts tokens, padding too: there rows are padded only while everything fits in the window.
        """
        window = getattr(text_config(self._model.config), "sliding_window", None)
        return "position_ids" in self._takes and (window is None or longest < window)

    @torch.inference_mode()
    def _decode(
        self,
        batch: _Batch,
        most: np.ndarray,
        choose: Choose,
        ends: Sequence[int],
        collect: Callable[[np.ndarray, torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Decode until each row has its most tokens or one of `ends`; every step is handed to `collect`.

        Rows that have ended are left out of the steps that follow, if the cache allows it.
        """
        device, rows, prompts, begins_with = self._spec.device, batch.rows, batch.prompts, batch.begins_with
        cache = self._cache_of(prompts[0][:begins_with], len(prompts))
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.cached_tokens += begins_with * len(prompts)
        ids_BT, mask_BT = _padded([prompt[begins_with:] for prompt in prompts])
        mask_BT = torch.cat([torch.ones(len(prompts), begins_with, dtype=torch.long), mask_BT], dim=1).to(device)
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, begins_with:]
        ids_BT, step = ids_BT.to(device), 0
        live = np.ones(len(rows), bool)
        while True:
            logits_BV, cache = self._forward(ids_BT, mask_BT, position_BT, cache)
            tokens_B = choose(logits_BV, step, rows)
            at = torch.from_numpy(np.flatnonzero(live)).to(device)
            collect(rows[live], tokens_B[at], logits_BV[at])
            step += 1
            live &= (step < most) & ~np.isin(tokens_B.cpu().numpy(), ends)
            if not live.any():
                return
            if not live.all() and self._only_attention:
                left = torch.from_numpy(np.flatnonzero(live)).to(device)
                rows, most, tokens_B = rows[live], most[live], tokens_B[left]
                mask_BT, position_BT = mask_BT[left], position_BT[left]
                cache.batch_select_indices(left)
                live = np.ones(len(rows), bool)
            ids_BT, position_BT = tokens_B[:, None], position_BT[:, -1:] + 1
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)

    def _forward(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, position_BT: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """Logits after the last token of each row, raw, [B, V], and the cache with these tokens in it."""
        known = {"attention_mask": mask_BT, "position_ids": position_BT, "logits_to_keep": 1}
        known = {name: value for name, value in known.items() if name in self._takes}
        out = self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, **known)
        if not isinstance(out.past_key_values, Cache):
            raise UserError(
                f"{type(self._model).__name__} keeps no keys and values: the transformers engine cannot decode it",
                "set teacher.engine: vllm, if vLLM knows this architecture",
            )
        return out.logits[:, -1], out.past_key_values

    def _cache_of(self, ids: Sequence[int], num_rows: int) -> Cache:
        """The keys and values of what prompts begin with, for that number of rows; of nothing, an empty cache."""
        if not ids:
            return DynamicCache(config=self._model.config)
        if self._beginning is None or self._beginning.ids != tuple(ids):
            self._beginning = None  # its memory first
            ids_BT = torch.tensor([list(ids)], device=self._spec.device)
            position_BT = torch.arange(len(ids), device=self._spec.device)[None]
            empty = DynamicCache(config=self._model.config)
            _, cache = self._forward(ids_BT, torch.ones_like(ids_BT), position_BT, empty)
            self._beginning = _Beginning(tuple(ids), cache)
        cache = copy.deepcopy(self._beginning.cache)
        cache.batch_repeat_interleave(num_rows)
        return cache


class _Collected:
    """Top-k of every step, until the rows of a batch are asked for."""

    def __init__(self, ask: Ask, num_ids: int) -> None:
        self._ask, self._num_ids = ask, num_ids
        self._steps: list[list[np.ndarray]] = []  # rows, tokens, ids, logits and, if asked for, log-sum-exps

    def __call__(self, rows: np.ndarray, tokens_B: torch.Tensor, logits_BV: torch.Tensor) -> None:
        ids, values, sums = top_k(logits_BV, self._ask.top_k, self._num_ids, self._ask.logsumexp)
        found = (tokens_B.int(), ids, values) if sums is None else (tokens_B.int(), ids, values, sums)
        self._steps.append([rows, *(tensor.cpu().numpy() for tensor in found)])

    def results(self) -> Iterator[tuple[int, Scored]]:
        """(row, its response), in the order of the rows: step by step to row by row."""
        rows, *columns = (np.concatenate(column) for column in zip(*self._steps, strict=True))
        order = np.argsort(rows, kind="stable")
        starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
        for at in np.split(order, starts[1:]):
            tokens, ids, values, *sums = (column[at] for column in columns)
            yield int(rows[at[0]]), Scored(tokens, ids, values, sums[0] if sums else None)


def _chooser(window: Sequence[Request], ask: Ask, num_ids: int) -> Choose:
    """How the next token of each row comes about: the given one, a sampled one, or the most likely one."""

    def given(logits_BV: torch.Tensor, step: int, rows: np.ndarray) -> torch.Tensor:
        given_ids = [window[row].given_ids or () for row in rows]
        return torch.tensor([ids[min(step, len(ids) - 1)] for ids in given_ids], device=logits_BV.device)

    def sampled(logits_BV: torch.Tensor, step: int, rows: np.ndarray) -> torch.Tensor:
        seeds = [window[row].seed or 0 for row in rows]
        return drawn(logits_BV[:, :num_ids], ask.temperature or 1, seeds, [step] * len(rows))

    def greedy(logits_BV: torch.Tensor, step: int, rows: np.ndarray) -> torch.Tensor:
        return logits_BV[:, :num_ids].argmax(-1)

    if window and window[0].given_ids is not None:
        return given
    if ask.temperature:
        return sampled
    return greedy


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, int64 [B, T], with padding on the left, so that the last column is every row's last token."""
    width = max(map(len, rows))
    ids_BT, mask_BT = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, ids in enumerate(rows):
        ids_BT[row, width - len(ids) :] = torch.tensor(list(ids))
        mask_BT[row, width - len(ids) :] = 1
    return ids_BT, mask_BT
