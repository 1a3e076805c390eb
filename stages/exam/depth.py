"""How deep forgetting goes: base reads answers while one layer at a time comes from another model.

`facts_of` says which part of each answer is its fact, `read_depth` has the models of a run, and the control, take base's place
layer by layer; `metrics/depth.py` makes scores of what base then loses. Only weights are compared: a prefix is left out, so
a teacher that is base behind one is not measured. Numbers per answer are kept on disk, as those of given answers are.

Shapes: L layers, N answers of a set whose fact is known.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.cache.files import sha256_json
from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, Subject, stem_of
from duet.stages.exam.kept import recalled
from duet.stages.exam.reading import ANSWER_TOKENS, PAD_ID, Reader
from duet.stages.metrics.text import stems
from duet.stages.metrics.words import word_spans
from duet.stages.models.directory import load_config, text_config
from duet.stages.models.patching import Marked, patched_logprobs
from duet.stages.questions.prompts import Prompt
from duet.stages.questions.queries import Query, load_queries
from duet.stages.questions.spans import touched
from duet.stages.settings.data import DataSettings

WORDS = "words"  # evaluate.depth: the distinctive words are the fact
KEY = "evaluate.depth"
Span = tuple[int, int]


@dataclass(frozen=True)
class Depth:
    """What base loses of the facts' log-probability, in nats per token, to the layers of each model."""

    rows: Mapping[str, list[int]]  # by set, the numbers of the queries whose fact is known
    lost: Mapping[str, Mapping[str, np.ndarray]]  # by subject and set, float64 [L, N]
    control: Mapping[str, Mapping[str, np.ndarray]]  # the same of the control, by the base that it is put into
    left_out: Mapping[str, str] = field(default_factory=dict)  # subjects that were not measured, and why


def facts_of(exam: Exam) -> dict[str, dict[int, list[Span]]]:
    """By attacked set and number of the query, where in its answer the fact stands; queries without one are left out.

    UserError where a set has none, or the file names words that an answer does not have exactly once.
    """
    source = exam.settings.depth
    entities = {} if source == WORDS else _entities(source or "")
    found: dict[str, dict[int, list[Span]]] = {}
    for name in exam.attacked:
        queries = exam.sets[name].queries
        spans = [
            _distinctive(query, exam.distinctive[name][number])
            if source == WORDS
            else _entity(query, entities.get(query.question), f"{KEY}: {source}")
            for number, query in enumerate(queries)
        ]
        found[name] = {number: of_query for number, of_query in enumerate(spans) if of_query}
        if not found[name]:
            raise UserError(
                f"{KEY}: {source} has the fact of none of the {len(queries)} questions of {name}",
                f"take the file that was made for these questions, or {WORDS}",
            )
    return found


def _entities(path: str) -> dict[str, str]:
    """The fact of each question, from a file."""
    rows = load_queries(DataSettings(path=path, answer_field="entity"), KEY, need_answers=True)
    return {row.question: row.answer or "" for row in rows}


def _entity(query: Query, entity: str | None, where: str) -> list[Span]:
    if entity is None:
        return []
    answer = (query.answer or "").strip()
    if answer.count(entity.strip()) != 1:
        raise UserError(
            f"{where}: {entity!r} stands {answer.count(entity.strip())} times in the answer {answer!r}, expected once",
            "name words of the answer as they stand there, enough of them to be found once",
        )
    start = answer.index(entity.strip())
    return [(start, start + len(entity.strip()))]


def _distinctive(query: Query, words: frozenset[str]) -> list[Span]:
    answer = (query.answer or "").strip()
    return [(start, end) for start, end in word_spans(answer) if stems(answer[start:end]) & words]


def tokens_of(exam: Exam, model_dir: Path) -> int:
    """The tokens of all questions and answers that are read in each pass."""
    base = Subject("base", model_dir, "", "base")
    marked = _marked(Reader(model_dir, exam), exam, facts_of(exam), base).values()
    return sum(map(len, (ids for of_set in marked for part in (of_set.prompts, of_set.answers) for ids in part)))


def check(subjects: Sequence[Subject], exam: Exam) -> None:
    """Refuse what cannot be measured, before anything is asked: no facts, or a control that does not fit base."""
    facts, base = facts_of(exam), next(subject for subject in subjects if subject.name == "base")
    _marked(Reader(base.model_dir, exam), exam, facts, base)
    if exam.control is None:  # the settings ask for one
        raise ValueError("evaluate.depth without a control")
    if reason := _misfit(exam.control, base.model_dir, exam):
        raise UserError(
            f"{KEY}: evaluate.control_model {reason}", "name a control of base's shape, or leave evaluate.depth out"
        )


def read_depth(subjects: Sequence[Subject], exam: Exam, folder: Path, watch: Watch) -> Depth:
    """What base, or a subject's own base, loses to the layers of each subject without a prefix, and to those of the control.

    What is on disk from the same weights, prompts and answers is not computed again. Raises Interrupted when `watch` stops.
    """
    facts, directories = facts_of(exam), {subject.name: subject.model_dir for subject in subjects}
    left_out: dict[str, str] = {}
    by_base: dict[str, list[Subject]] = {}
    for subject in subjects:
        reason = _why_not(subject, directories[subject.base], exam)
        if reason:
            left_out[subject.name] = reason
        else:
            by_base.setdefault(subject.base, []).append(subject)
    lost: dict[str, dict[str, np.ndarray]] = {}
    control: dict[str, dict[str, np.ndarray]] = {}
    for base, members in by_base.items():
        target = Reader(directories[base], exam)
        marked = _marked(target, exam, facts, Subject(base, directories[base], "", base))
        never_knew = Subject(f"control.{base}", exam.control or directories[base], "", base)
        losses = {s.name: _losses(target, marked, s, folder, watch) for s in (never_knew, *members)}
        control[base] = losses.pop(never_knew.name)
        diverged = [
            name for name, of in losses.items() if not all(np.isfinite(lost_LN).all() for lost_LN in of.values())
        ]
        left_out |= dict.fromkeys(diverged, "its layers have numbers that are not finite: its weights have diverged")
        lost |= {name: of for name, of in losses.items() if name not in diverged}
    rows = {name: list(of_set) for name, of_set in facts.items()}
    return Depth(rows, lost, control, left_out)


def _why_not(subject: Subject, base_dir: Path, exam: Exam) -> str:
    """Why a subject is not measured; empty if it is."""
    if subject.prefix or subject.set_prefixes:
        return "its prefix is not in its weights"
    if exam.control and (reason := _misfit(exam.control, base_dir, exam)):
        return f"the control {reason}"
    return _misfit(subject.model_dir, base_dir, exam)


def _misfit(model_dir: Path, base_dir: Path, exam: Exam) -> str:
    """Why a model's layers cannot take the place of base's, as a sentence goes on after its name; empty if they can."""
    if model_dir == base_dir:
        return ""
    own, of_base = (_shape(folder, exam.trust_remote_code) for folder in (model_dir, base_dir))
    if own != of_base:
        return f"has {own[0]} layers of width {own[1]}, base has {of_base[0]} of width {of_base[1]}"
    own, of_base = (exam.renderer(folder).tokenizer.get_vocab() for folder in (model_dir, base_dir))
    return "" if own == of_base else "has another tokenizer than base"


def _shape(model_dir: Path, trust_remote_code: bool) -> tuple[int, int]:
    config = text_config(load_config(model_dir, trust_remote_code))
    return config.num_hidden_layers, config.hidden_size


def _marked(
    reader: Reader, exam: Exam, facts: Mapping[str, Mapping[int, list[Span]]], base: Subject
) -> dict[str, Marked]:
    """By set, the questions and answers as base reads them, with the facts' tokens marked."""
    found = {}
    for name, of_set in facts.items():
        asked = {number: Prompt.plain(exam.sets[name].queries[number]) for number in of_set}
        prompts = [reader.renderer.prompt(prompt) for prompt in asked.values()]
        answers = [reader.renderer.answer(prompt, prompt.query.answer or "").ids for prompt in asked.values()]
        marks = [
            touched(reader.renderer, prompt, prompt.query.answer or "", of_set[number])
            for number, prompt in asked.items()
        ]
        reader.check(list(zip(prompts, answers, strict=True)), name, base)
        found[name] = Marked(prompts, answers, marks)
    return found


def _losses(
    target: Reader, marked: Mapping[str, Marked], subject: Subject, folder: Path, watch: Watch
) -> dict[str, np.ndarray]:
    """By set, what the target loses to each layer of a subject, float64 [L, N]."""
    source, settings = Reader(subject.model_dir, target.exam), target.exam.settings
    ids = {name: [m.prompts, m.answers, [marks.tolist() for marks in m.marks]] for name, m in marked.items()}
    kept = recalled(
        folder / f"{stem_of(subject.name)}.depth.json",
        sha256_json([target.hashes, source.hashes, settings.dtype, target.exam.device, ids]),
        functools.partial(_patch, target, source, marked, subject.name, watch),
    )
    return {name: _float64(of_set["whole"]) - _float64(of_set["patched"]) for name, of_set in kept.items()}


def _float64(values: Any) -> np.ndarray:
    return np.array(values, np.float64)  # NaN for None


def _patch(target: Reader, source: Reader, marked: Mapping[str, Marked], called: str, watch: Watch) -> dict[str, Any]:
    found = {}
    for number, (name, given) in enumerate(marked.items(), start=1):
        watch.pause(f"{called}, depth,")
        whole_N, patched_LN = patched_logprobs(target.model, source.model, given, PAD_ID, ANSWER_TOKENS)
        found[name] = {"whole": whole_N.tolist(), "patched": patched_LN.tolist()}
        watch.on_progress(f"{called}, depth", number, len(marked))
    return found
