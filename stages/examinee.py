"""One model directory under examination: prompts rendered with its tokenizer, its engine opened when first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import Interrupted, UserError
from cache.files import publish_json, read_json, sha256_json
from stages import knowmem
from stages.engine import Engine, EngineSpec, open_engine
from stages.exam import Exam, Subject, questions_of
from stages.models import (
    context_length,
    eos_ids,
    load_config,
    load_tokenizer,
    tokenizer_sha256,
    vocab_width,
    weights_sha256,
)
from stages.prompts import check_length, check_prompt_settings, render

CALL_BATCHES = 4  # per call of an engine, which makes its own batches: between calls a signal is heard


def recalled(path: Path, identity: str, ask: Callable[[], Any]) -> Any:
    """The answers that `path` holds under this identity; if it does not, those of `ask()`, which are then kept there."""
    if path.is_file() and (kept := read_json(path))["identity"] == identity:
        return kept["answers"]
    answers = ask()
    publish_json(path, {"identity": identity, "answers": answers})
    return answers


class Examinee:
    """One model directory: prompts rendered with its tokenizer, its engine opened when first needed."""

    def __init__(self, model_dir: Path, exam: Exam, subjects: Sequence[Subject]) -> None:
        self._exam = exam
        self._dir = model_dir
        self._config = load_config(model_dir, exam.trust_remote_code)
        self._tokenizer = load_tokenizer(model_dir, exam.trust_remote_code)
        check_prompt_settings(self._tokenizer, exam.prompt)
        self._num_ids = min(max(self._tokenizer.get_vocab().values()) + 1, vocab_width(self._config))
        self._weights_sha256 = weights_sha256(model_dir)
        self._prompts = {subject.name: self._render(subject) for subject in subjects}
        self._engine: Engine | None = None

    def _render(self, subject: Subject) -> dict[str, list[list[int]]]:
        exam = self._exam
        prompts = {
            task: [render(self._tokenizer, query.question, text, exam.prompt) for query, text in pairs]
            for task, pairs in questions_of(exam, subject).items()
        } | knowmem.prompts_of(self._tokenizer, exam, subject)
        for task, rows in prompts.items():
            for number, ids in enumerate(rows):
                check_length(
                    ids, exam.settings.max_new_tokens, context_length(self._config), f"{task}/{number}", subject.name
                )
        return prompts

    def identity(self, subject: Subject, anywhere: bool = False) -> str:
        """Hash of everything that decides the subject's answers; `anywhere` leaves out what only rounds otherwise."""
        deciding = {"max_new_tokens", "dtype"} if anywhere else {"max_new_tokens", "engine", "dtype"}
        return sha256_json(
            [
                self._weights_sha256,
                tokenizer_sha256(self._tokenizer),
                self._prompts[subject.name],
                self._exam.settings.model_dump(include=deciding),
                *([] if anywhere else [self._exam.device]),
            ]
        )

    def ask(
        self,
        subject: Subject,
        on_progress: Callable[[str, int, int], None],
        on_engine: Callable[[str, str], None],
        should_stop: Callable[[], bool],
    ) -> dict[str, list[str]]:
        prompts = self._prompts[subject.name]
        flat = [ids for rows in prompts.values() for ids in rows]
        self._engine = self._engine or self._open(on_engine)
        order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
        by_index: dict[int, str] = {}
        size = CALL_BATCHES * self._exam.settings.batch_size
        for first in range(0, len(order), size):
            if should_stop():
                raise Interrupted(f"{subject.name} begins again; what was asked before it is kept")
            chosen = order[first : first + size]
            outputs = self._engine.generate([flat[i] for i in chosen], self._exam.settings.max_new_tokens)
            for i, ids in zip(chosen, outputs, strict=True):
                by_index[i] = self._tokenizer.decode(ids, skip_special_tokens=True)
            on_progress(subject.name, len(by_index), len(flat))
        texts = [by_index[i] for i in range(len(flat))]
        result, start = {}, 0
        for task, rows in prompts.items():
            ends = knowmem.cut if task.startswith(knowmem.TASK) else str.strip
            result[task] = [ends(text) for text in texts[start : start + len(rows)]]
            start += len(rows)
        return result

    def first_top_k(
        self, subject: Subject, task: str, top_k: int, on_engine: Callable[[str, str], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each prompt of a task, the K most likely first ids of the response and their raw logits, [N, K] each."""
        if top_k > self._num_ids:
            raise UserError(
                f"teacher.top_k is {top_k}, the vocabulary has {self._num_ids} ids",
                f"set teacher.top_k to at most {self._num_ids}",
            )
        self._engine = self._engine or self._open(on_engine)
        scored = self._engine.score(self._prompts[subject.name][task], top_k, 1)
        return np.stack([row.topk_ids_PK[0] for row in scored]), np.stack([row.topk_logits_PK[0] for row in scored])

    def _open(self, on_engine: Callable[[str, str], None]) -> Engine:
        exam = self._exam
        longest = max(len(ids) for tasks in self._prompts.values() for rows in tasks.values() for ids in rows)
        spec = EngineSpec(
            model_dir=self._dir,
            dtype=exam.settings.dtype,
            num_ids=self._num_ids,
            context=longest + exam.settings.max_new_tokens,
            eos_ids=tuple(eos_ids(self._dir, self._config, self._tokenizer)),
            device=exam.device,
            trust_remote_code=exam.trust_remote_code,
            batch_size=exam.settings.batch_size,
        )
        quick = exam.settings.engine == "auto" and exam.device == "cpu"
        opened, reason = open_engine(spec, "transformers" if quick else exam.settings.engine)
        on_engine(opened.name, "on a CPU it starts sooner than vLLM" if quick else reason)
        return opened

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
