"""The interface of a teacher engine, the choice between engines, and the self-test that each must pass.

An engine takes prompts as token ids, as a stream, and returns for each the raw logits (before softmax) of the K most
likely ids at every position of a response: one that it makes, or one that is given. `engine_transformers.py` and
`engine_vllm.py` implement it.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache.errors import UserError

# Largest difference of a logit between two passes over the same tokens that only rounding explains, by dtype.
# Assumption for the 16-bit types: a few units in the last place of logits around 30.
ROUNDING = {"float32": 2e-3, "float16": 0.25, "bfloat16": 1.0}


@dataclass(frozen=True)
class Request:
    """One prompt. `key` comes back with what was found."""

    key: int
    prompt_ids: Sequence[int]
    given_ids: Sequence[int] | None = None  # the response to score; None: the engine makes one
    seed: int | None = None  # of a sampled response


@dataclass(frozen=True)
class Ask:
    """What is wanted of every request of a stream."""

    top_k: int
    max_positions: int  # longest response that the engine makes
    logsumexp: bool = False
    temperature: float | None = None  # responses are sampled at it; None: greedy


@dataclass(frozen=True)
class Scored:
    """One prompt's response and the raw top-k logits that predicted each of its tokens, P positions."""

    response_ids: np.ndarray  # int32 [P]; the end-of-sequence id, if reached, is the last
    topk_ids_PK: np.ndarray  # int32 [P, K], by logit, descending
    topk_logits_PK: np.ndarray  # float32 [P, K]
    logsumexp_P: np.ndarray | None  # float32 [P], full vocabulary; None where it was not asked for


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
    batch_size: int = 64  # prompts per forward pass of transformers; vLLM makes its own batches
    gpu_memory_utilization: float = 0.85
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    quantization: str | None = None
    share_prefix: bool = True  # compute what prompts begin with in common once; False only to measure what that saves


@dataclass
class Usage:
    """Prompt tokens that an engine was given so far, and how many of them it had computed before."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)

    def since(self, before: Usage) -> Usage:
        return Usage(self.prompt_tokens - before.prompt_tokens, self.cached_tokens - before.cached_tokens)


class Engine(ABC):
    """One loaded model. `name` has the version ("vllm 0.32.0"), `route` says how logits come out of it."""

    name: str
    route: str
    dtype: str
    usage: Usage

    @abstractmethod
    def stream(self, requests: Iterable[Request], ask: Ask) -> Generator[tuple[int, Scored], None, None]:
        """(key, result) of every request, in the order in which they are finished.

        Requests are drawn as there is room for them, so that memory stays bounded and the engine busy.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy responses, without the end-of-sequence id, in the order of the prompts."""

    @abstractmethod
    def close(self) -> None:
        """Give the model's memory back."""

    def score(self, prompts: Sequence[list[int]], top_k: int, max_positions: int) -> list[Scored]:
        """Greedy responses of up to `max_positions` tokens with their top-k, in the order of the prompts."""
        return self.score_all([Request(number, ids) for number, ids in enumerate(prompts)], Ask(top_k, max_positions))

    def score_all(self, requests: Sequence[Request], ask: Ask) -> list[Scored]:
        """`stream`, in the order of the requests."""
        found = dict(self.stream(requests, ask))
        return [found[request.key] for request in requests]


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


def _refuse_not_finite(scored: Scored, dtype: str, model: str) -> None:
    wrong = scored.topk_logits_PK[~np.isfinite(scored.topk_logits_PK)]
    if len(wrong) == 0:
        return
    way = (
        "float16 overflows above 65504: set dtype to bfloat16 or float32"
        if dtype == "float16"
        else "its weights are damaged, or overflow in this dtype: look for NaN in them, or set dtype: float32"
    )
    raise UserError(f"the model {model} gives logits that are not finite ({wrong[0]}) in {dtype}", way)


def self_test(engine: Engine, requests: Sequence[Request], ask: Ask, num_ids: int, model: str) -> None:
    """Prove on real prompts that the engine returns raw, aligned logits of real ids; UserError if it does not.

    Finite: every kept logit is a number; if not, `model` is at fault and not the engine.
    Raw: over all ids, log-probabilities have log-sum-exp 0 and raw logits do not; and the log-sum-exp that it returns is
    that of the logits. Aligned: a greedy token is the first id of its row, a given response comes back as it was given,
    and feeding response token r_0 as part of the prompt gives row 0 the logits that row 1 had. Repeatable: the second pass,
    now from the engine's prefix cache, gives the same. Real: no id is head padding.
    """
    ask = replace(ask, max_positions=2)
    first, again = engine.score_all(requests, ask), engine.score_all(requests, ask)
    longer = [Request(r.key, [*r.prompt_ids, int(s.response_ids[0])]) for r, s in zip(requests, first, strict=True)]
    continued = engine.score_all(longer, replace(ask, max_positions=1, temperature=None))
    everything = engine.score_all([Request(0, requests[0].prompt_ids)], Ask(num_ids, 1, logsumexp=ask.logsumexp))[0]
    for scored in (*first, *again, *continued):
        _refuse_not_finite(scored, engine.dtype, model)
    rows = zip(requests, first, again, continued, strict=True)
    fault = (
        _raw_fault(everything, num_ids)
        or next(filter(None, (_row_fault(engine, ask, *row, num_ids) for row in rows)), None)
        or _alone_fault(engine, first[0], everything, ask.top_k)
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
    # Rows of head padding count in the model's softmax and are not among the ids, so it may be larger.
    if everything.logsumexp_P is not None and everything.logsumexp_P[0] < logsumexp - 1e-3:
        return f"its log-sum-exp is {everything.logsumexp_P[0]:.6g}, that of its logits {logsumexp:.6g}"
    return None


def _alone_fault(engine: Engine, together: Scored, alone: Scored, top_k: int) -> str | None:
    difference = float(np.abs(together.topk_logits_PK[0] - alone.topk_logits_PK[0, :top_k]).max())
    if difference > ROUNDING[engine.dtype]:
        return f"a prompt has other logits among others than alone (by {difference:.3g})"
    return None


def _row_fault(
    engine: Engine, ask: Ask, request: Request, first: Scored, again: Scored, continued: Scored, num_ids: int
) -> str | None:
    tolerance = ROUNDING[engine.dtype]
    given = request.given_ids
    if given is not None and first.response_ids.tolist() != list(given):
        return f"the given response {list(given)} came back as {first.response_ids.tolist()}"
    for scored in (first, again, continued):
        if scored.topk_ids_PK.max() >= num_ids:
            return f"id {scored.topk_ids_PK.max()} is padding of the head, the tokenizer has {num_ids} ids"
    greedy = (continued,) if given is not None or ask.temperature else (first, again, continued)
    for scored in greedy:
        is_first = (scored.topk_ids_PK == scored.response_ids[:, None]) & (
            scored.topk_logits_PK >= scored.topk_logits_PK[:, :1] - tolerance
        )
        if not is_first.any(axis=1).all():
            return "a response token is not the most likely id of its row: rows and tokens are shifted"
    if (difference := _difference(first, 0, again, 0)) > tolerance:
        return f"the same prompt gave other logits the second time (by {difference:.3g}): its prefix cache is at fault"
    if len(first.response_ids) > 1 and (difference := _difference(first, 1, continued, 0)) > tolerance:
        return f"position 1 and the same position as the first after a longer prompt differ by {difference:.3g}"
    return None


def _difference(a: Scored, row_a: int, b: Scored, row_b: int) -> float:
    """Largest difference of the sorted logits of two rows: sorted values are stable where near-equal ids swap."""
    return float(np.abs(a.topk_logits_PK[row_a] - b.topk_logits_PK[row_b]).max())
