"""Attacks that are made of prompts: which there are, their texts, and the prompts that they make of a query set.

`attack_texts.py` has the texts, `examinee.py` asks, `attack_scores.py` scores. What must always hold: every model of a run is
asked the same, so nothing here depends on a model; what is drawn is drawn by the evaluation's seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from duet.stages.exam.exam import Exam
from duet.cache.errors import UserError
from duet.stages.attacks.texts import LETTERS, Variant, texts
from duet.stages.exam.exam import Exam
from duet.stages.metrics.words import letters, replace_words, split_words
from duet.stages.questions.prompts import Prompt
from duet.stages.questions.queries import Query
from duet.stages.settings.attacks import ALL, ATTACKS, PROMPT_ATTACKS, TRANSLATION

WORST = "_worst"  # what the kind ends with in the id of a score of the worst variants


def task(kind: str, variant: str, name: str) -> str:
    """The name under which the answers to one variant on one query set are kept."""
    return f"attack.{kind}.{variant}.{name}"


@dataclass(frozen=True)
class Attacked:
    """A metric id of an attack in its parts: `attack.<kind>[_worst].<set>.<metric>`."""

    id: str
    kind: str
    worst: bool
    set: str
    metric: str


def attacked_of(metric_id: str, sets: Collection[str]) -> Attacked | None:
    """The parts of a metric id, None if it is of no attack on one of these sets; kinds, sets and metrics may have dots."""
    rest = metric_id.removeprefix("attack.")
    name = next((name for name in sorted(sets, key=len, reverse=True) if f".{name}." in rest), None)
    if rest == metric_id or name is None:
        return None
    kind, _, metric = rest.partition(f".{name}.")
    return Attacked(metric_id, kind.removesuffix(WORST), kind.endswith(WORST), name, metric)


def chosen(exam: Exam) -> tuple[tuple[str, ...], dict[str, str]]:
    """The attacks that are made, in the order of ATTACKS, and of those that `all` leaves out, why.

    UserError where an attack that is named cannot be made.
    """
    wanted = exam.settings.attacks
    missing = _missing(exam)
    if wanted == ALL:
        return tuple(kind for kind in ATTACKS if kind not in missing), {k: f"{w} {h}" for k, (w, h) in missing.items()}
    for kind in wanted:
        if kind in missing:
            raise UserError(f"evaluate.attacks: {kind}: {missing[kind][0]}", missing[kind][1])
    return tuple(kind for kind in ATTACKS if kind in wanted), {}


def prompt_kinds(exam: Exam) -> list[str]:
    """Those of the attacks that are made of prompts."""
    return [kind for kind in chosen(exam)[0] if kind in PROMPT_ATTACKS]


def prompts_of(exam: Exam, kind: str, name: str, prefix: str) -> dict[str, list[Prompt]]:
    """Per variant of an attack, what is asked on the query set `name`, in its order; `prefix` is the model's own."""
    if kind == TRANSLATION:
        return {other: _translated(exam, name, other, prefix) for other in _translations(exam, name)}
    variants, words = texts(exam.settings.attack_texts)
    return {key: _prompts(exam, variant, words, name, prefix) for key, variant in variants[kind].items()}


def without_synonyms(exam: Exam, name: str) -> int:
    """Number of a set's questions that have no word of the table of synonyms."""
    words = texts(exam.settings.attack_texts)[1]
    return sum(with_synonyms(query.question, words, 1) == query.question for query in exam.sets[name].queries)


def with_synonyms(text: str, words: Mapping[str, Sequence[str]], number: int) -> str:
    """`text` with each word of the table replaced by its synonym of that number (from 1; the last where it has fewer)."""
    chosen = {word: synonyms[min(number, len(synonyms)) - 1] for word, synonyms in words.items()}
    return replace_words(text, chosen)


def _missing(exam: Exam) -> dict[str, tuple[str, str]]:
    """Attacks that this exam's data do not allow: what is missing and a hint."""
    found = {}
    if not any(_translations(exam, name) for name in exam.attacked):
        found[TRANSLATION] = (
            "no query set translates one that is attacked.",
            "Give a set under evaluate.sets `translates: forget`.",
        )
    if not _kept(exam):
        for kind in ("in_context", "multiple_choice"):
            found[kind] = ("there are no questions to be kept.", "Name some under data.retain or evaluate.sets.")
    return found


def _kept(exam: Exam) -> list[Query]:
    """Answered questions of the sets to be kept, which lend examples and wrong choices."""
    return [q for s in exam.sets.values() if s.expect == "kept" for q in s.queries if q.answer]


def _translations(exam: Exam, name: str) -> list[str]:
    return [other for other, query_set in exam.sets.items() if query_set.translates == name]


def _translated(exam: Exam, name: str, other: str, prefix: str) -> list[Prompt]:
    by_id = {query.row_id: query for query in exam.sets[other].queries}
    queries = exam.sets[name].queries
    if lacking := [query.row_id for query in queries if query.row_id not in by_id]:
        raise UserError(
            f"evaluate.sets.{other} translates {name}, but has no row with its id {lacking[0]!r}",
            "give both sets an id_field, with the same id on a question and its translation",
        )
    return [
        Prompt(q, by_id[q.row_id].question, prefix, references=(q.answer or "", by_id[q.row_id].answer or ""))
        for q in queries
    ]


def _prompts(exam: Exam, variant: Variant, words: Mapping[str, Sequence[str]], name: str, prefix: str) -> list[Prompt]:
    topic, queries = exam.attacked[name], exam.sets[name].queries
    text = _filled(variant.in_front, topic=topic)
    in_front = exam.prompt.separator.join(part for part in (prefix, text) if part)
    examples = _examples(exam, variant.examples)
    choose = _chooser(exam, variant.choices) if variant.choices else None
    return [
        _prompt(query, variant, words, topic, in_front, examples, choose(query) if choose else ()) for query in queries
    ]


def _prompt(
    query: Query,
    variant: Variant,
    words: Mapping[str, Sequence[str]],
    topic: str,
    in_front: str,
    examples: tuple[Query, ...],
    choices: tuple[str, ...],
) -> Prompt:
    asked = with_synonyms(query.question, words, variant.synonym) if variant.synonym else query.question
    shown = [
        _filled(variant.choice, letter=letter, answer=answer) for letter, answer in zip(LETTERS, choices, strict=False)
    ]
    question = _filled(
        variant.question,
        topic=topic,
        question=asked,
        words_backwards=" ".join(reversed(asked.split())),
        letters_backwards="".join(reversed(letters(asked))),
        choices=" ".join(shown),
    )
    opening = (query.answer or "") if variant.answer_tokens else _filled(variant.opening, topic=topic)
    return Prompt(query, question, in_front, opening, variant.answer_tokens, variant.bare, examples, choices=choices)


def _filled(text: str, **values: str) -> str:
    """`text` with {name} replaced, once: what is filled in may hold braces of its own."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)


def _examples(exam: Exam, count: int) -> tuple[Query, ...]:
    kept = _kept(exam)
    if count > len(kept):
        raise UserError(
            f"an attack wants {count} answered questions to be kept, there are {len(kept)}",
            "name more under data.retain or evaluate.sets, or ask for fewer `examples`",
        )
    drawn = np.random.default_rng(exam.settings.seed).choice(len(kept), count, replace=False) if count else []
    return tuple(kept[int(i)] for i in drawn)


def _chooser(exam: Exam, count: int) -> Callable[[Query], tuple[str, ...]]:
    """Of a query, its answer among wrong ones, in random order.

    The wrong ones are the answers to those questions to be kept whose words are most like the query's (Jaccard index), so that
    they answer the same kind of question and the form alone does not tell the right one.
    """
    rng = np.random.default_rng(exam.settings.seed)
    kept = _kept(exam)
    kept = [kept[int(i)] for i in rng.permutation(len(kept))]
    words_of = [set(split_words(query.question)) for query in kept]

    def choose(query: Query) -> tuple[str, ...]:
        own = set(split_words(query.question))
        likeness = np.array([len(own & other) / max(1, len(own | other)) for other in words_of])
        order = np.argsort(-likeness, kind="stable")
        wrong = dict.fromkeys(kept[int(i)].answer or "" for i in order)
        offered = [answer for answer in wrong if answer != query.answer][: count - 1]
        if len(offered) < count - 1:
            raise UserError(
                f"an attack wants {count - 1} wrong answers, the sets to be kept have {len(offered)} distinct ones",
                "name more questions under data.retain or evaluate.sets, or ask for fewer `choices`",
            )
        answers = [query.answer or "", *offered]
        return tuple(answers[int(i)] for i in rng.permutation(count))

    return choose
