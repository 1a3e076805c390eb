"""One model directory under examination: prompts rendered with its tokenizer, its engine opened when first needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from duet.cache.errors import UserError
from duet.cache.files import sha256_json
from duet.cache.watch import Watch
from duet.stages.engines.choose import open_engine
from duet.stages.engines.interface import Engine, EngineSpec
from duet.stages.exam.exam import Exam, Subject, Task
from duet.stages.models.directory import load_config
from duet.stages.models.identity import weights_sha256
from duet.stages.models.limits import check_length, context_length, vocab_width
from duet.stages.models.tokenizers import tokenizer_sha256
from duet.stages.questions.prompts import Prompt
from duet.stages.questions.proof import prove


def left_of(task: str) -> str:
    """Where the references of a task are kept of whose answers a beginning was given: what is left of each."""
    return f"left.{task}"


class ModelSession:
    """One model directory: prompts rendered with its tokenizer, its engine opened when first needed."""

    def __init__(self, model_dir: Path, exam: Exam, asked: Sequence[tuple[Subject, Mapping[str, Task]]]) -> None:
        self.exam = exam
        self.model_dir = model_dir
        self.config = load_config(model_dir, exam.trust_remote_code)
        self.renderer = exam.renderer(model_dir)
        self.tokenizer = self.renderer.tokenizer
        prove(
            self.renderer,
            exam.queries,
            {
                f"{subject.name}, its prefix for {name}": subject.prefix_of(name)
                for subject, _ in asked
                for name in exam.sets
            },
        )
        self.num_ids = min(max(self.tokenizer.get_vocab().values()) + 1, vocab_width(self.config))
        self._tasks = {subject.name: tasks for subject, tasks in asked}
        self._prompts = {subject.name: self._render(subject) for subject, _ in asked}
        self._engine: Engine | None = None

    def _render(self, subject: Subject) -> dict[str, list[list[int]]]:
        prompts, most = {}, self.exam.settings.max_new_tokens
        for name, task in self._tasks[subject.name].items():
            renderer = self.renderer.in_form(task.form) if task.form else self.renderer
            prompts[name] = [renderer.prompt(prompt) for prompt in task.prompts]
            for number, ids in enumerate(prompts[name]):
                check_length(ids, most, context_length(self.config), f"{name}/{number}", subject.name)
        return prompts

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self.model_dir)

    def tasks(self, subject: Subject) -> list[str]:
        return list(self._prompts[subject.name])

    def prompts(self, subject: Subject, task: str) -> list[list[int]]:
        """Token ids of a task's prompts, in query order."""
        return self._prompts[subject.name][task]

    def answers(self, name: str) -> list[list[int]]:
        """Token ids of a set's reference answers, without the end of the turn."""
        return [self.renderer.answer(Prompt.plain(q), q.answer or "").own for q in self.exam.sets[name].queries]

    def full_answers(self, name: str) -> list[list[int]]:
        """The same as a model is to give them: with the end of the turn."""
        return [self.renderer.answer(Prompt.plain(q), q.answer or "").ids for q in self.exam.sets[name].queries]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def identity(
        self, subject: Subject, anywhere: bool = False, tasks: Collection[str] | None = None, more: object = None
    ) -> str:
        """Hash of everything that decides the subject's answers to these tasks (default: all), and of `more`.

        `anywhere` leaves out what only rounds otherwise.
        """
        deciding = {"max_new_tokens", "dtype"} if anywhere else {"max_new_tokens", "engine", "dtype"}
        prompts = self._prompts[subject.name]
        return sha256_json(
            [
                self._weights_sha256,
                tokenizer_sha256(self.tokenizer),
                sorted(self.renderer.stop_ids),
                prompts if tasks is None else {task: prompts[task] for task in tasks},
                self.exam.settings.model_dump(include=deciding),
                *([] if anywhere else [self.exam.device]),
                *([] if more is None else [more]),
            ]
        )

    def ask(
        self,
        subject: Subject,
        watch: Watch,
        tasks: Collection[str] | None = None,
    ) -> dict[str, list[str]]:
        """Greedy answers per task (default: all), and under `left_of` a task what is left of its references."""
        prompts = self._prompts[subject.name]
        prompts = prompts if tasks is None else {task: prompts[task] for task in tasks}
        flat = [ids for rows in prompts.values() for ids in rows]
        engine = self.engine(watch)
        by_index: dict[int, str] = {}
        watch.pause(subject.name)
        for number, ids in engine.answers(flat, self.exam.settings.max_new_tokens):
            watch.pause(subject.name)
            by_index[number] = self.tokenizer.decode(ids, skip_special_tokens=True)
            watch.on_progress(subject.name, len(by_index), len(flat))
        texts = [by_index[i] for i in range(len(flat))]
        result, start = {}, 0
        for task, rows in prompts.items():
            asked = self._tasks[subject.name][task]
            result[task] = [asked.ends(text) for text in texts[start : start + len(rows)]]
            start += len(rows)
            if any(prompt.opening_tokens for prompt in asked.prompts):
                result[left_of(task)] = [self._left(prompt) for prompt in asked.prompts]
        return result

    def _left(self, prompt: Prompt) -> str:
        """What is left of the reference after the tokens of it that the answer was made to begin with."""
        given = len(self.renderer.opening(prompt)) if prompt.opening_tokens else 0
        return self.text(self.renderer.answer(prompt, prompt.query.answer or "").own[given:])

    def first_top_k(self, subject: Subject, task: str, top_k: int, watch: Watch) -> tuple[np.ndarray, np.ndarray]:
        """Of each prompt of a task, the K most likely first ids of the response and their raw logits, [N, K] each."""
        if top_k > self.num_ids:
            raise UserError(
                f"teacher.top_k is {top_k}, the vocabulary has {self.num_ids} ids",
                f"set teacher.top_k to at most {self.num_ids}",
            )
        scored = self.engine(watch).score(self._prompts[subject.name][task], top_k, 1)
        return np.stack([row.topk_ids_PK[0] for row in scored]), np.stack([row.topk_logits_PK[0] for row in scored])

    def engine(self, watch: Watch) -> Engine:
        """The model's engine, opened at the first call."""
        if self._engine is None:
            quick = self.exam.settings.engine == "auto" and self.exam.device == "cpu"
            opened, reason = open_engine(self.spec(), "transformers" if quick else self.exam.settings.engine)
            watch.on_engine(opened.name, "on a CPU it starts sooner than vLLM" if quick else reason)
            self._engine = opened
        return self._engine

    def spec(self) -> EngineSpec:
        """What an engine for this model and all its prompts is opened with."""
        exam = self.exam
        longest = max(len(ids) for tasks in self._prompts.values() for rows in tasks.values() for ids in rows)
        return EngineSpec(
            model_dir=self.model_dir,
            dtype=exam.settings.dtype,
            num_ids=self.num_ids,
            context=longest + exam.settings.max_new_tokens,
            eos_ids=tuple(self.renderer.stop_ids),
            device=exam.device,
            trust_remote_code=exam.trust_remote_code,
            batch_size=exam.settings.batch_size,
        )

    def close(self) -> None:
        """Give the engine's memory back; a later question opens it again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
