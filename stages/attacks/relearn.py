"""The attack relearn: a copy is fine-tuned on a few pairs; does it then answer the other questions that were forgotten?

What was erased would have to be taught again, question by question; what was only hidden comes back after a few steps on other
questions, or on harmless text (Hu et al. 2024, arXiv 2406.13356). What must always hold: no question is asked that the copy was
trained on, nor one with the same answer.

Shapes: B batch, T time, N supervised positions of a batch, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, Subject
from duet.stages.exam.session import ModelSession
from duet.stages.models.alignment import align
from duet.stages.models.loading import load_model
from duet.stages.settings.attacks import RelearnSettings

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class RelearnSet:
    """What a copy is trained on, and which questions of the attacked set it is asked then."""

    name: str  # "forget 5", "benign"
    source: str  # the set that the pairs are of
    pairs: tuple[int, ...]  # numbers of its queries
    asked: tuple[int, ...]  # numbers of queries of the attacked set


def relearn_sets(exam: Exam, name: str) -> tuple[list[RelearnSet], dict[str, str]]:
    """The lessons on an attacked set, and of those that its data do not allow, why.

    Drawn by the seed, the same for all models; a lesson on more pairs has those of the smaller ones too.
    """
    settings, queries = exam.settings.relearn, exam.sets[name].queries
    order = np.random.default_rng(exam.settings.seed).permutation(len(queries)).tolist()
    found, skipped = [], {}
    for count in settings.pairs:
        pairs = tuple(order[:count])
        told = {queries[i].answer for i in pairs}
        asked = tuple(i for i, query in enumerate(queries) if i not in pairs and query.answer not in told)
        if len(order) < count or not asked:
            skipped[f"{name} {count}"] = (
                f"of {len(queries)} questions, {count} to train on leave none with another answer"
            )
        else:
            found.append(RelearnSet(f"{name} {count}", name, pairs, asked))
    source = next((other for other, s in exam.sets.items() if s.expect == "kept"), None)
    kept = len(exam.sets[source].queries) if source else 0
    title = "benign" if name == "forget" else f"{name}, benign"
    if kept >= settings.benign > 0 and source:
        drawn = np.random.default_rng(exam.settings.seed).permutation(kept)[: settings.benign]
        found.append(RelearnSet(title, source, tuple(drawn.tolist()), tuple(range(len(queries)))))
    elif settings.benign:
        skipped[title] = f"{settings.benign} pairs to be kept are wanted, there are {kept}"
    return found, skipped


def steps_of(settings: RelearnSettings) -> tuple[int, ...]:
    """The steps after which is asked, 0 (before any) first."""
    return (0, *settings.steps)


def relearned(
    session: ModelSession,
    subject: Subject,
    name: str,
    watch: Watch,
) -> dict[str, list[list[str]]]:
    """Per lesson and number of steps, the copy's greedy answers to the lesson's questions, in its order.

    Asked and trained as the subject is asked: behind its prefix, where it has one.
    """
    found = {}
    taught = relearn_sets(session.exam, name)[0]
    for number, lesson in enumerate(taught):
        found[lesson.name] = _lesson(session, subject, name, lesson, watch)
        watch.on_progress(f"{subject.name}, relearn", number + 1, len(taught))
    return found


def _lesson(session: ModelSession, subject: Subject, name: str, lesson: RelearnSet, watch: Watch) -> list[list[str]]:
    from duet.stages.engines.transformers_engine import TransformersEngine

    exam, spec = session.exam, session.spec()
    model = load_model(spec.model_dir, "float32", spec.trust_remote_code).to(spec.device)
    all_prompts, all_answers = session.prompts(subject, lesson.source), session.full_answers(lesson.source)
    pairs = [(all_prompts[i], all_answers[i]) for i in lesson.pairs]
    asked = [session.prompts(subject, name)[i] for i in lesson.asked]
    teach, told = Teaching(model, pairs, exam.settings.relearn, exam.settings.seed), []
    for steps in steps_of(exam.settings.relearn):
        while teach.done < steps:
            watch.pause(f"{subject.name}, relearn,")
            teach.step()
        engine = TransformersEngine(spec, model)  # a new one: the last remembers what other weights made of the prompts
        told.append([session.text(ids) for ids in engine.generate(asked, exam.settings.max_new_tokens)])
    return told


class Teaching:
    """A model in training on pairs of prompt ids and answer ids: cross-entropy of the answers, AdamW, constant rate."""

    def __init__(
        self, model: Any, pairs: Sequence[tuple[list[int], list[int]]], settings: RelearnSettings, seed: int
    ) -> None:
        self._model, self._pairs, self._size = model, pairs, min(settings.batch_size, len(pairs))
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
        self._rng = np.random.default_rng(seed)
        self._waiting: list[int] = []
        self.done = 0

    def step(self) -> float:
        """One optimizer step on the next pairs, each epoch in an order of its own; the loss, in nats per token.

        The model stays in evaluation mode: no dropout, so that a model's answers differ by what it learned alone.
        """
        while len(self._waiting) < self._size:
            self._waiting += self._rng.permutation(len(self._pairs)).tolist()
        chosen, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        prompts, answers = zip(*(self._pairs[i] for i in chosen), strict=True)
        batch = align(prompts, answers, pad_id=0).to(next(self._model.parameters()).device)
        logits_BTV = self._model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).logits
        logits_NV = logits_BTV[batch.batch_index_N, batch.position_N]
        told_N = torch.tensor([i for answer in answers for i in answer], device=logits_NV.device)
        loss = torch.nn.functional.cross_entropy(logits_NV.float(), told_N)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self.done += 1
        return loss.item()
