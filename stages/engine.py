"""The interface of a teacher engine, the choice between engines, and the self-test that each must pass.

An engine takes prompts as token ids and returns, for greedy responses, raw logits (before softmax) of the K most
likely ids per position. `engine_transformers.py` and `engine_vllm.py` implement it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cache.errors import UserError

# Largest difference of a logit between two passes over the same tokens that only rounding explains, by dtype.
# Assumption for the 16-bit types: a few units in the last place of logits around 30.
ROUNDING = {"float32": 2e-3, "float16": 0.25, "bfloat16": 1.0}


@dataclass(frozen=True)
class Scored:
    """One prompt's greedy response and the raw top-k logits that predicted each of its tokens, P positions."""

    response_ids: np.ndarray  # int32 [P]; the end-of-sequence id, if reached, is the last
    topk_ids_PK: np.ndarray  # int32 [P, K], by logit, descending
    topk_logits_PK: np.ndarray  # float32 [P, K]
    logsumexp_P: np.ndarray | None  # float32 [P], full vocabulary; None where the engine has none


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is opened with."""

    model_dir: Path
    dtype: str  # "auto", "float32", "bfloat16" or "float16"
    num_ids: int  # ids of the tokenizer; head rows from here on are padding and never count as top-k
    context: int  # longest prompt plus response, in tokens
    eos_ids: tuple[int, ...]
    device: str  # "cpu" or "cuda"
    trust_remote_code: bool = False
    gpu_memory_utilization: float = 0.85


class Engine(Protocol):
    """Greedy decoding over token ids. Results come in the order of the prompts."""

    name: str  # with its version: "vllm 0.32.0"
    dtype: str

    def score(self, prompts: Sequence[list[int]], top_k: int, max_positions: int) -> list[Scored]:
        """Greedy responses of up to `max_positions` tokens with their top-k raw logits."""
        ...

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy responses, without the end-of-sequence id."""
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


def vllm_fault() -> str | None:
    """Why vLLM cannot be used here, or None. Looks for the package only; the engine's start shows the rest."""
    return None if importlib.util.find_spec("vllm") else "the package vllm is not installed"


def open_engine(spec: EngineSpec, engine: str) -> tuple[Engine, str]:
    """The engine asked for and why it was taken; "auto" is vLLM where it is installed and starts, else transformers."""
    if engine == "transformers":
        return _open_transformers(spec), "as configured"
    fault = vllm_fault()
    if fault is None:
        from stages.engine_vllm import VllmEngine, VllmUnusable

        try:
            return VllmEngine(spec), "as configured" if engine == "vllm" else "vLLM is installed and works here"
        except VllmUnusable as error:
            fault = str(error)
    if engine == "vllm":
        raise UserError(
            f"the engine vllm cannot be used: {fault}", "run `make setup`, or set the engine to transformers"
        )
    return _open_transformers(spec), fault


def _open_transformers(spec: EngineSpec) -> Engine:
    from stages.engine_transformers import TransformersEngine

    return TransformersEngine(spec)


def self_test(engine: Engine, prompts: Sequence[list[int]], top_k: int, num_ids: int) -> None:
    """Prove on real prompts that the engine returns raw, aligned logits of real ids; UserError if it does not.

    Raw: over all ids, log-probabilities have log-sum-exp 0 and raw logits do not. Aligned: the first id of each row is
    the greedy token, and feeding response token r_0 as part of the prompt gives row 0 the logits that row 1 had.
    Repeatable: the second pass, now from the engine's prefix cache, gives the same. Real: no id is head padding.
    """
    first = engine.score(prompts, top_k, 2)
    again = engine.score(prompts, top_k, 2)
    continued = engine.score([[*p, int(s.response_ids[0])] for p, s in zip(prompts, first, strict=True)], top_k, 1)
    everything = engine.score(prompts[:1], num_ids, 1)[0]
    fault = _raw_fault(everything, num_ids) or next(
        filter(None, (_row_fault(engine, *rows, num_ids) for rows in zip(first, again, continued, strict=True))), None
    )
    if fault:
        raise UserError(
            f"the engine {engine.name} failed its self-test: {fault}",
            "use another release of it, or set teacher.engine: transformers",
        )


def _raw_fault(everything: Scored, num_ids: int) -> str | None:
    if everything.topk_ids_PK.shape[1] != num_ids:
        return f"asked for all {num_ids} ids, it returned {everything.topk_ids_PK.shape[1]}"
    logits = everything.topk_logits_PK[0].astype(np.float64)
    logsumexp = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    if abs(logsumexp) < 1e-3:
        return "it returns log-probabilities, not raw logits (their log-sum-exp is 0)"
    return None


def _row_fault(engine: Engine, first: Scored, again: Scored, continued: Scored, num_ids: int) -> str | None:
    tolerance = ROUNDING[engine.dtype]
    for scored in (first, again, continued):
        if scored.topk_ids_PK.max() >= num_ids:
            return f"id {scored.topk_ids_PK.max()} is padding of the head, the tokenizer has {num_ids} ids"
        greedy = (scored.topk_ids_PK == scored.response_ids[:, None]) & (
            scored.topk_logits_PK >= scored.topk_logits_PK[:, :1] - tolerance
        )
        if not greedy.any(axis=1).all():
            return "a response token is not the most likely id of its row: rows and tokens are shifted"
    if (difference := _difference(first, 0, again, 0)) > tolerance:
        return f"the same prompt gave other logits the second time (by {difference:.3g}): its prefix cache is at fault"
    if len(first.response_ids) > 1 and (difference := _difference(first, 1, continued, 0)) > tolerance:
        return f"position 1 and the same position as the first after a longer prompt differ by {difference:.3g}"
    return None


def _difference(a: Scored, row_a: int, b: Scored, row_b: int) -> float:
    """Largest difference of the sorted logits of two rows: sorted values are stable where near-equal ids swap."""
    return float(np.abs(a.topk_logits_PK[row_a] - b.topk_logits_PK[row_b]).max())
