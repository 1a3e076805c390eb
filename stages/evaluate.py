"""Stage three: what base, teacher and students answer, with and without attacks, and how that is scored.

`answer_all` asks one model everything and keeps the answers on disk, so that an interrupted evaluation goes on with the
next model; `results_of` turns answers into scores. Every score carries n and an interval, every text score two floors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cache.errors import Interrupted, UserError
from cache.files import publish_json, read_json, sha256_json
from stages import metrics
from stages.data import Query
from stages.engine import Engine, EngineSpec, open_engine
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
from stages.settings import EvaluateSettings, PromptSettings

ATTACKS_PATH = Path(__file__).with_name("attacks.yaml")
NUM_SAMPLES = 10
CALL_BATCHES = 4  # per call of an engine, which makes its own batches: between calls a signal is heard
HEADLINE = "rougeL_recall"  # the metric that the performance shift and the attacks are stated in


@dataclass(frozen=True)
class Subject:
    """A model under evaluation. `prefix` is the unlearning prefix for a teacher, else empty."""

    name: str  # key in results.json: base, teacher, teacher:<name>, student:<name>, base:<name>
    model_dir: Path
    prefix: str
    base: str  # the subject whose scores its performance shift is measured against
    set_prefixes: Mapping[str, str] = field(default_factory=dict)  # of the sets that have another prefix than `prefix`


@dataclass(frozen=True)
class QuerySet:
    """Questions with reference answers, and what a good student does with them."""

    queries: list[Query]
    expect: str  # "forgotten" or "kept"


@dataclass(frozen=True)
class Exam:
    """Everything that is the same for all models."""

    sets: dict[str, QuerySet]
    topic: str
    prompt: PromptSettings
    settings: EvaluateSettings
    device: str
    trust_remote_code: bool = False
    further_topics: Mapping[str, str] = field(
        default_factory=dict
    )  # of forget sets beside `forget`, which are attacked too

    @property
    def attacked(self) -> dict[str, str]:
        """The sets that attacks are tried on, and their topics."""
        return {"forget": self.topic, **self.further_topics}


def attack_texts(kind: str, topic: str) -> list[str]:
    """The bundled texts of one attack with the topic in place."""
    return [text.replace("{topic}", topic) for text in yaml.safe_load(ATTACKS_PATH.read_text(encoding="utf-8"))[kind]]


def questions_of(exam: Exam, subject: Subject) -> dict[str, list[tuple[Query, str]]]:
    """All (query, text in front) pairs per task: each set under its name, each attack text as `attack.<kind>.<i>.<set>`."""
    prefixes = {name: subject.set_prefixes.get(name, subject.prefix) for name in exam.sets}
    tasks = {name: [(query, prefixes[name]) for query in query_set.queries] for name, query_set in exam.sets.items()}
    for kind in exam.settings.attacks:
        for name, topic in exam.attacked.items():
            for number, text in enumerate(attack_texts(kind, topic)):
                in_front = exam.prompt.separator.join(part for part in (prefixes[name], text) if part)
                tasks[f"attack.{kind}.{number}.{name}"] = [(query, in_front) for query in exam.sets[name].queries]
    return tasks


def answer_all(
    subjects: Sequence[Subject],
    exam: Exam,
    answers_dir: Path,
    on_progress: Callable[[str, int, int], None],
    on_engine: Callable[[str, str], None],
    should_stop: Callable[[], bool],
) -> dict[str, dict[str, list[str]]]:
    """Answers per subject and task, in query order. Subjects of one model directory share an engine.

    What is on disk from the same model, prefix, questions and settings is not asked again.
    """
    answers_dir.mkdir(parents=True, exist_ok=True)
    answers: dict[str, dict[str, list[str]]] = {}
    for model_dir in dict.fromkeys(subject.model_dir for subject in subjects):
        asked = [subject for subject in subjects if subject.model_dir == model_dir]
        examinee = Examinee(model_dir, exam, asked)
        try:
            for subject in asked:
                answers[subject.name] = recalled(
                    answers_dir / f"{subject.name.replace(':', '-')}.json",
                    examinee.identity(subject),
                    lambda examinee=examinee, subject=subject: examinee.ask(
                        subject, on_progress, on_engine, should_stop
                    ),
                )
        finally:
            examinee.close()
    return {subject.name: answers[subject.name] for subject in subjects}


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
        }
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
                by_index[i] = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
            on_progress(subject.name, len(by_index), len(flat))
        texts = [by_index[i] for i in range(len(flat))]
        result, start = {}, 0
        for task, rows in prompts.items():
            result[task] = texts[start : start + len(rows)]
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


def results_of(
    subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, Any]:
    """The parts of results.json that come from answers: models, sets, floors, performance_shift, samples, definitions."""
    models = {subject.name: _scores(answers[subject.name], exam) for subject in subjects}
    return {
        "models": {name: {key: score.as_json() for key, score in scores.items()} for name, scores in models.items()},
        "sets": {name: {"n": len(s.queries), "expect": s.expect} for name, s in exam.sets.items()},
        "floors": _floors(exam),
        "performance_shift": _shifts(subjects, exam, models),
        "samples": _samples(subjects, exam, answers),
        "definitions": metrics.DEFINITIONS,
    }


def references_of(query_set: QuerySet) -> list[str]:
    """The set's reference answers; a bootstrap draws queries with the same one together."""
    return [query.answer or "" for query in query_set.queries]


def _scores(answers: Mapping[str, list[str]], exam: Exam) -> dict[str, metrics.Score]:
    """Scores of one model: `<set>.<metric>`, then per attack the mean over its texts and the worst per question."""
    seed, extra = exam.settings.seed, exam.settings.refusal_patterns
    scores: dict[str, metrics.Score] = {}
    for name, query_set in exam.sets.items():
        references = references_of(query_set)
        for metric, values in metrics.score_texts(references, answers[name], extra).items():
            scores[f"{name}.{metric}"] = metrics.score(values, clusters=references, seed=seed)
    for kind, (name, topic) in itertools.product(exam.settings.attacks, exam.attacked.items()):
        references = references_of(exam.sets[name])
        tasks = [f"attack.{kind}.{number}.{name}" for number in range(len(attack_texts(kind, topic)))]
        recall_AN = np.stack([metrics.score_texts(references, answers[task], extra)[HEADLINE] for task in tasks])
        for suffix, values in (("", recall_AN.mean(axis=0)), ("_worst", recall_AN.max(axis=0))):
            scores[f"attack.{kind}{suffix}.{name}.{HEADLINE}"] = metrics.score(values, clusters=references, seed=seed)
    return scores


def _floors(exam: Exam) -> dict[str, dict[str, float]]:
    found = {}
    for name, query_set in exam.sets.items():
        questions = [query.question for query in query_set.queries]
        for metric, floor in metrics.floors(questions, references_of(query_set), exam.settings.refusal).items():
            found[f"{name}.{metric}"] = floor
    return found


def _shifts(
    subjects: Sequence[Subject], exam: Exam, models: Mapping[str, Mapping[str, metrics.Score]]
) -> dict[str, dict[str, Any]]:
    """Performance shift in points (100 * score) of every subject that has a base, over the sets' headline metric."""
    keys = {name: f"{name}.{HEADLINE}" for name in exam.sets}
    forgotten = {key for name, key in keys.items() if exam.sets[name].expect == "forgotten"}
    points = {model: {key: 100 * scores[key].value for key in keys.values()} for model, scores in models.items()}
    shifts = {}
    for subject in subjects:
        if subject.base != subject.name:
            total, terms = metrics.performance_shift(points[subject.base], points[subject.name], forgotten)
            shifts[subject.name] = {"value": total, "terms": terms}
    return shifts


def _samples(
    subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Mapping[str, list[str]]]
) -> list[dict[str, Any]]:
    """Ten questions drawn evenly from the sets, by seed and not by how they turned out."""
    rng = np.random.default_rng(exam.settings.seed)
    shuffled = {name: iter(rng.permutation(len(s.queries)).tolist()) for name, s in exam.sets.items()}
    drawn: list[tuple[str, int]] = []
    while len(drawn) < NUM_SAMPLES and shuffled:
        for name in list(shuffled):
            number = next(shuffled[name], None)
            if number is None:
                del shuffled[name]
            elif len(drawn) < NUM_SAMPLES:
                drawn.append((name, number))
    drawn.sort(key=lambda pair: list(exam.sets).index(pair[0]))
    return [
        {
            "set": name,
            "id": exam.sets[name].queries[number].row_id,
            "question": exam.sets[name].queries[number].question,
            "answer": exam.sets[name].queries[number].answer,
            "outputs": {subject.name: answers[subject.name][name][number] for subject in subjects},
        }
        for name, number in drawn
    ]
