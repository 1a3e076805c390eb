"""What every model of a run is asked: query sets, and for each subject the texts in front of their questions.

Data only: `examinee.py` puts the questions to a model, `evaluate.py` scores what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from stages.data import Query
from stages.exam_settings import EvaluateSettings
from stages.settings import PromptSettings

ATTACKS_PATH = Path(__file__).with_name("attacks.yaml")
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
    def judged(self) -> dict[str, QuerySet]:
        """The sets that count for or against a model: all but the membership attacks' non-members, whom no model knows."""
        membership = self.settings.membership
        return {name: s for name, s in self.sets.items() if not membership or name != membership.nonmembers}

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


def references_of(query_set: QuerySet) -> list[str]:
    """The set's reference answers; a bootstrap draws queries with the same one together."""
    return [query.answer or "" for query in query_set.queries]
