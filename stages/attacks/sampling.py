"""The attack sampling: many answers to the same question, and how often one of k tells what was to be forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import comb

import numpy as np

from duet.cache.watch import Watch
from duet.stages.engines.interface import Ask, Request
from duet.stages.exam.exam import Subject
from duet.stages.exam.session import ModelSession
from duet.stages.settings.attacks import SamplingSettings

KS = (1, 4, 16, 64)


def leak_at(k: int, samples: int, leaks: int) -> float:
    """Chance that at least one of k sampled answers has a ROUGE-L recall of `evaluate.sampling.leak_recall` or more,
    estimated without bias from n samples of which c have: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, equation 1).

    Chen et al. call it pass@k. `samples` is n, `leaks` is c; exact integers.
    """
    if not 1 <= k <= samples or not 0 <= leaks <= samples:
        raise ValueError(f"leak@{k} of {samples} samples with {leaks} leaks")
    return 1 - comb(samples - leaks, k) / comb(samples, k)


def ks_of(settings: SamplingSettings) -> list[int]:
    """The k that so many samples allow."""
    return [k for k in KS if k <= settings.samples]


def sampled(
    session: ModelSession,
    subject: Subject,
    name: str,
    watch: Watch,
) -> list[list[str]]:
    """Of each question of a set, `sampling.samples` answers, each drawn with a seed of its own.

    One call of the engine per question: the samples share all of its prompt, which the engine then computes once.
    """
    settings = session.exam.settings
    ask = Ask(top_k=1, max_positions=settings.max_new_tokens, temperature=settings.sampling.temperature)
    engine, prompts = session.engine(watch), session.prompts(subject, name)
    stops = set(session.spec().eos_ids)
    found = []
    for number, ids in enumerate(prompts):
        watch.pause(f"{subject.name}, sampling,")
        requests = [Request(i, ids, seed=_seed(settings.seed, number, i)) for i in range(settings.sampling.samples)]
        scored = engine.score_all(requests, ask)
        found.append([session.text([i for i in one.response_ids.tolist() if i not in stops]) for one in scored])
        watch.on_progress(f"{subject.name}, sampling", number + 1, len(prompts))
    return found


def _seed(*numbers: int) -> int:
    """A seed that differs for each question and sample, and is the same for all models."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()[:4])


def leaks_per_question(recalls: Sequence[np.ndarray], threshold: float) -> list[int]:
    """Of each question's samples, how many reach the threshold."""
    return [int((recall >= threshold).sum()) for recall in recalls]
