"""What every model of a run is asked: query sets, and for each subject the texts in front of their questions.

Data only: `examinee.py` puts the questions to a model, `evaluate.py` scores what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stages import attacks
from stages.data import Query
from stages.exam_settings import EvaluateSettings
from stages.prompts import Prompt
from stages.settings import PromptSettings

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
    shots: tuple[Query, ...] = ()  # shown in front of the questions, for MUSE's KnowMem
    translates: str | None = None  # the set whose questions these are, in another language


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
    def judged(self) -> dict[str, QuerySet]:
        """The sets that count for or against a model: all but the membership attacks' non-members, whom no model knows."""
        membership = self.settings.membership
        return {name: s for name, s in self.sets.items() if not membership or name != membership.nonmembers}

    @property
    def attacked(self) -> dict[str, str]:
        """The sets that attacks are tried on, of those that there are, and their topics."""
        topics = {"forget": self.topic, **self.further_topics}
        return {name: topic for name, topic in topics.items() if name in self.sets}


def questions_of(exam: Exam, subject: Subject) -> dict[str, list[Prompt]]:
    """All prompts per task: each set under its name, each variant of an attack as `attack.<kind>.<variant>.<set>`."""
    prefixes = {name: subject.set_prefixes.get(name, subject.prefix) for name in exam.sets}
    tasks = {
        name: [Prompt.plain(query, prefixes[name]) for query in query_set.queries]
        for name, query_set in exam.sets.items()
    }
    for kind in attacks.prompt_kinds(exam):
        for name in exam.attacked:
            for variant, prompts in attacks.prompts_of(exam, kind, name, prefixes[name]).items():
                tasks[attacks.task(kind, variant, name)] = prompts
    return tasks


def references_of(query_set: QuerySet) -> list[str]:
    """The set's reference answers; a bootstrap draws queries with the same one together."""
    return [query.answer or "" for query in query_set.queries]
