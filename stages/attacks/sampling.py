"""The attack sampling: many answers to the same question, and how often one of k says what was to be forgotten."""

from __future__ import annotations

import hashlib
from math import comb
from typing import Any

import numpy as np

from duet.cache.watch import Watch
from duet.stages.attacks.parts import (
    MIN_LEFT,
    Answers,
    Cost,
    Evidence,
    asked,
    identity_on_sets,
    of_variants,
    on_sets,
    points,
    said,
)
from duet.stages.engines.interface import Ask, Request
from duet.stages.exam.exam import DISTINCTIVE, Exam, Subject, references_of
from duet.stages.exam.session import ModelSession
from duet.stages.metrics import text as metrics
from duet.stages.metrics.uncertainty import Score, score
from duet.stages.settings.attacks import SamplingSettings

KS = (1, 4, 16, 64)


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, list[list[str]]]:
    """Per attacked set and question, the sampled answers."""
    return on_sets(session, subject, kind, watch, lambda name: sampled(session, subject, name, watch))


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the answers."""
    settings = session.exam.settings
    deciding = [settings.sampling.samples, settings.sampling.temperature, settings.seed]
    return identity_on_sets(session, subject, kind, deciding)


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    return asked(session, subject, session.exam.attacked, answers=session.exam.settings.sampling.samples)


def recalls(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """Empty: there are no variants."""
    return {}


def facts(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """Distinctive recall of the first, second, ... sample of every question, float64 [N] each."""
    by_sample = zip(*answers[f"attack.{kind}.{name}"], strict=True)
    words = exam.distinctive[name]
    return {str(i): metrics.distinctive_recall(words, texts) for i, texts in enumerate(by_sample)}


def scores(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
    """`leak@k` of each k that the number of samples allows; distinctive recall, mean and best of all samples per question."""
    of_facts = of_variants(exam, kind, name, list(facts(answers, exam, kind, name).values()), DISTINCTIVE)
    settings, references = exam.settings.sampling, references_of(exam.sets[name])
    leaks = []
    for reference, texts in zip(references, answers[f"attack.{kind}.{name}"], strict=True):
        recall = metrics.rouge_l([reference] * len(texts), texts)[0]
        leaks.append(int((recall >= settings.leak_recall).sum()))
    return of_facts | {
        f"attack.{kind}.{name}.leak@{k}": score(
            np.array([leak_at(k, settings.samples, count) for count in leaks]),
            clusters=references,
            seed=exam.settings.seed,
        )
        for k in ks_of(settings)
    }


def proof(kind: str, evidence: Evidence) -> dict[str, Any]:
    """Half of base's questions leak in some sample, and not fewer than in one."""
    models, ks = evidence.models, ks_of(evidence.exam.settings.sampling)
    first, most = (f"attack.{kind}.forget.leak@{k}" for k in (ks[0], ks[-1]))
    text = "; ".join(
        f"{model}: leak@{ks[0]} {points(models[model][first])}, leak@{ks[-1]} {points(models[model][most])}"
        for model in ("base", *evidence.teachers)
    )
    if models["base"][most].value >= max(models["base"][first].value, MIN_LEFT):
        return said(True, "base", text)
    return said(False, "base", f"sampled answers of base itself rarely tell on this model. {text}")


def leak_at(k: int, samples: int, leaks: int) -> float:
    """Chance that at least one of k sampled answers has a ROUGE-L recall of `evaluate.sampling.leak_recall` or more,
    estimated without bias from n samples of which c have: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, equation 1).

    Chen et al. call it pass@k. `samples` is n, `leaks` is c; exact integers.
    """
    if not 1 <= k <= samples or not 0 <= leaks <= samples:
        raise ValueError(f"leak@{k} of {samples} samples with {leaks} leaks")
    return 1 - comb(samples - leaks, k) / comb(samples, k)


def ks_of(settings: SamplingSettings) -> list[int]:
    """Each k that the number of samples allows."""
    return [k for k in KS if k <= settings.samples]


def sampled(session: ModelSession, subject: Subject, name: str, watch: Watch) -> list[list[str]]:
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
