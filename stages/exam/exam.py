"""What every model of a run is asked: query sets, and for each subject the texts in front of their questions.

`session.py` puts the questions to a model, `evaluate/results.py` scores what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from duet.cache.errors import UserError
from duet.cache.files import sha256_json
from duet.stages.metrics.text import distinctive_words
from duet.stages.questions.prompts import Prompt, Renderer, open_renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

HEADLINE = "rougeL_recall"  # the metric that the performance shift and the attacks are stated in
DISTINCTIVE = "distinctive_recall"  # the metric that counts facts


@dataclass(frozen=True)
class Subject:
    """A model under evaluation. `prefix` is the unlearning prefix for a teacher, else empty."""

    name: str  # key in results.json: base, teacher, teacher:<name>, student:<name>, base:<name>
    model_dir: Path
    prefix: str
    base: str  # the subject whose scores its performance shift is measured against
    set_prefixes: Mapping[str, str] = field(default_factory=dict)  # of the sets that have another prefix than `prefix`
    trained_on: Sequence[str] = ()  # attacks of whose kind it saw texts in training: they say nothing for it

    def prefix_of(self, name: str) -> str:
        """The prefix in front of this set's questions."""
        return self.set_prefixes.get(name, self.prefix)


def by_directory(subjects: Sequence[Subject]) -> dict[Path, list[Subject]]:
    """The subjects of each model directory, all in the order in which they come: they share what is loaded from it."""
    found: dict[Path, list[Subject]] = {}
    for subject in subjects:
        found.setdefault(subject.model_dir, []).append(subject)
    return found


@dataclass(frozen=True)
class QuerySet:
    """Questions with reference answers, and what a good student does with them."""

    queries: list[Query]
    expect: str  # "forgotten" or "kept"
    shots: tuple[Query, ...] = ()  # shown in front of the questions, for MUSE's KnowMem
    translates: str | None = None  # the set whose questions these are, in another language
    distance: int | None = None  # of a set to be kept, from the topic


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
    control: Path | None = None  # directory of a model that never knew the topic

    @property
    def queries(self) -> dict[str, list[Query]]:
        """The queries of each set."""
        return {name: query_set.queries for name, query_set in self.sets.items()}

    @cached_property
    def distinctive(self) -> Mapping[str, Sequence[frozenset[str]]]:
        """The distinctive words of every reference, by set; which words are common is counted over all sets."""
        questions = {name: [" ".join(query.texts) for query in s.queries] for name, s in self.sets.items()}
        return distinctive_words(questions, {name: references_of(s) for name, s in self.sets.items()})

    @cached_property
    def _renderers(self) -> dict[Path, Renderer]:
        return {}

    def renderer(self, model_dir: Path) -> Renderer:
        """The one that renders this exam's prompts for a model; it remembers them, so everything that asks shares it."""
        if model_dir not in self._renderers:
            self._renderers[model_dir] = open_renderer(model_dir, self.prompt, self.trust_remote_code)
        return self._renderers[model_dir]

    @property
    def judged(self) -> dict[str, QuerySet]:
        """The sets that count for or against a model: all but the membership attacks' non-members, whom no model knows."""
        membership = self.settings.membership
        return {name: s for name, s in self.sets.items() if not membership or name != membership.nonmembers}

    @property
    def attacked(self) -> dict[str, str]:
        """The sets that attacks are tried on, of those that there are, and their topics."""
        topics = {"forget": self.topic, **self.further_topics}
        return {name: topic for name, topic in topics.items() if name in self.sets}


@dataclass(frozen=True)
class Task:
    """Prompts that a subject is asked, in query order."""

    prompts: list[Prompt]
    form: PromptSettings | None = None  # of these prompts, where it is not the exam's
    ends: Callable[[str], str] = str.strip  # what counts of an answer


def sets_as_tasks(exam: Exam, subject: Subject) -> dict[str, Task]:
    """The questions of every set, as they are."""
    return {
        name: Task([Prompt.plain(query, subject.prefix_of(name)) for query in query_set.queries])
        for name, query_set in exam.sets.items()
    }


def stem_of(subject: str) -> str:
    """File-name stem for a subject; ":" is not allowed in file names on every system."""
    return subject.replace(":", "-")


def rows_sha256(query_set: QuerySet) -> str:
    """Hash of id, question and answer of each row."""
    return sha256_json([[query.row_id, query.asked, query.answer] for query in query_set.queries])


def references_of(query_set: QuerySet) -> list[str]:
    """The set's reference answers; a bootstrap draws queries with the same one together."""
    return [query.answer or "" for query in query_set.queries]


def split_by_answer(
    exam: Exam, share: float, seed: int, what: str, hint: str, among: Sequence[Exam] = ()
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Numbers of the queries of a `share` of each set, drawn by the seed, and of the others.

    Queries with the same answer stay together, in all sets: a paraphrase would otherwise tell of the question that is held
    out. So do a question and its translation, by their id. With `among`, exams of which this is one, an answer is on one side
    in all of them. `what` wants the split; where a set cannot be split, a UserError says so with this hint.
    """
    rng = np.random.default_rng(seed)
    chosen: dict[str, bool] = {}
    for answers in (_answers_translated_back(one, of_set) for one in among or (exam,) for of_set in one.sets.values()):
        new = [answer for answer in dict.fromkeys(answers) if answer not in chosen]
        order = rng.permutation(len(new)).tolist()
        chosen |= {new[i]: rank < round(share * len(new)) for rank, i in enumerate(order)}
    parts: list[dict[str, list[int]]] = [{}, {}]
    for name, query_set in exam.sets.items():
        answers = _answers_translated_back(exam, query_set)
        for part, wanted in zip(parts, (True, False), strict=True):
            part[name] = [i for i, answer in enumerate(answers) if chosen[answer] is wanted]
            if not part[name]:
                count = len(query_set.queries)
                raise UserError(
                    f"{what}: the {count} questions of {name} cannot be split in two by their answers", hint
                )
    return parts[0], parts[1]


def _answers_translated_back(exam: Exam, query_set: QuerySet) -> list[str]:
    """The set's reference answers; of a translation those to the questions that it translates, where these are asked."""
    translated = exam.sets[query_set.translates].queries if query_set.translates else []
    by_id = {query.row_id: query.answer or "" for query in translated}
    return [by_id.get(query.row_id, query.answer or "") for query in query_set.queries]


def part_of(exam: Exam, part: Mapping[str, Sequence[int]]) -> Exam:
    """The exam with these queries of each set."""
    sets = {name: replace(s, queries=[s.queries[i] for i in part[name]]) for name, s in exam.sets.items()}
    return replace(exam, sets=sets)
