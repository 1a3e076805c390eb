"""The interface of a teacher engine.

An engine takes prompts as token ids, as a stream, and returns for each the raw logits (before softmax) of the K most
likely ids at every position of a response: one that it makes, or one that is given. `transformers_engine.py` and
`vllm_engine.py` implement it; `choose.py` opens one of them, and `self_test.py` holds the test that each must pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Request:
    """One prompt. `key` comes back with what was found."""

    key: int
    prompt_ids: Sequence[int]
    given_ids: Sequence[int] | None = None  # the response to score; None: the engine makes one
    seed: int | None = None  # of a sampled response, and of sampled ids
    named_ids: Sequence[Sequence[int]] = ()  # that are kept at each position, or at all where it is one list


@dataclass(frozen=True)
class Ask:
    """What is wanted of every request of a stream."""

    top_k: int  # ids kept at a position
    max_positions: int  # longest response that the engine makes
    logsumexp: bool = False
    temperature: float | None = None  # responses are sampled at it; None: greedy
    ids: str = (
        "top_k"  # or "sampled" by top_k - 1 draws, or "given" by the request; the likeliest others fill what is left
    )


@dataclass(frozen=True)
class Scored:
    """One prompt's response and the raw top-k logits that predicted each of its tokens, P positions."""

    response_ids: np.ndarray  # int32 [P]; the end-of-sequence id, if reached, is the last
    topk_ids_PK: np.ndarray  # int32 [P, K], by logit, descending
    topk_logits_PK: np.ndarray  # float32 [P, K]
    logsumexp_P: np.ndarray | None  # float32 [P], full vocabulary; None where it was not asked for
    draws_PK: np.ndarray | None = None  # int32 [P, K], how often each id was drawn; None where ids were not drawn


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
    batch_size: int = 256  # most prompts that transformers decodes together; vLLM makes its own batches
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
    def answers(
        self, prompts: Sequence[list[int]], max_new_tokens: int
    ) -> Generator[tuple[int, list[int]], None, None]:
        """(number of the prompt, greedy response without the end-of-sequence id), in the order in which they are finished."""

    @abstractmethod
    def close(self) -> None:
        """Give the model's memory back."""

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """`answers`, in the order of the prompts."""
        found = dict(self.answers(prompts, max_new_tokens))
        return [found[number] for number in range(len(prompts))]

    def score(self, prompts: Sequence[list[int]], top_k: int, max_positions: int) -> list[Scored]:
        """Greedy responses of up to `max_positions` tokens with their top-k, in the order of the prompts."""
        return self.score_all([Request(number, ids) for number, ids in enumerate(prompts)], Ask(top_k, max_positions))

    def score_all(self, requests: Sequence[Request], ask: Ask) -> list[Scored]:
        """`stream`, in the order of the requests."""
        found = dict(self.stream(requests, ask))
        return [found[request.key] for request in requests]
