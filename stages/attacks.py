"""Attacks that are made of prompts: which there are, their texts, and the prompts that they make of a query set.

Data and text only: `examinee.py` asks, `attack_scores.py` scores. Texts are in `attacks.yaml`; a user's file of the same form
adds to them. What must always hold: every model of a run is asked the same, so nothing here depends on a model; what is drawn
is drawn by the evaluation's seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from cache.errors import UserError
from stages.data import Query
from stages.exam_settings import ALL, ATTACKS, PROMPT_ATTACKS
from stages.prompts import Prompt
from stages.settings import Settings

if TYPE_CHECKING:
    from stages.exam import Exam

TEXTS_PATH = Path(__file__).with_name("attacks.yaml")
WORDS = "words"  # the table of synonyms
TRANSLATION = "translation"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PLACEHOLDERS = {
    "in_front": ("topic",),
    "opening": ("topic",),
    "question": ("topic", "question", "words_backwards", "letters_backwards", "choices"),
}


class Variant(Settings):
    """One text of an attack."""

    in_front: str = Field(default="", description="text where a prefix goes")
    question: str = Field(default="{question}", description="the question as it is asked")
    opening: str = Field(default="", description="what the answer is made to begin with")
    answer_tokens: int | None = Field(default=None, ge=1, description="so many tokens of the right answer begin it")
    bare: bool = Field(default=False, description="plain text to be continued, without the chat's form")
    examples: int = Field(default=0, ge=0, description="number of answered questions in front")
    synonym: int = Field(default=0, ge=0, description="which synonym replaces words of the table; 0: none does")
    choices: int = Field(default=0, ge=0, le=len(LETTERS), description="number of answers to choose from")
    choice: str = Field(default="- {answer}", description="how each is written: {letter}, {answer}")

    @model_validator(mode="after")
    def _fits_together(self) -> Variant:
        for field, known in PLACEHOLDERS.items():
            if unknown := set(re.findall(r"\{(\w+)\}", getattr(self, field))) - set(known):
                raise ValueError(
                    f"{field} has no {{{min(unknown)}}}: it may hold {', '.join(map('{{{}}}'.format, known))}"
                )
        if self.opening and self.answer_tokens:
            raise ValueError("opening and answer_tokens both say how the answer begins: leave one out")
        if self.choices == 1 or (self.choices > 0) != ("{choices}" in self.question):
            raise ValueError("choices needs {choices} in question, and 2 answers at least: give both or none")
        return self


def task(kind: str, variant: str, name: str) -> str:
    """The name under which the answers to one variant on one query set are kept."""
    return f"attack.{kind}.{variant}.{name}"


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


def variants_of(exam: Exam, kind: str, name: str) -> list[str]:
    """The ids of an attack's variants on a query set."""
    return _translations(exam, name) if kind == TRANSLATION else list(texts(exam.settings.attack_texts)[0][kind])


def prompts_of(exam: Exam, kind: str, name: str, prefix: str) -> dict[str, list[Prompt]]:
    """Per variant of an attack, what is asked on the query set `name`, in its order; `prefix` is the model's own."""
    if kind == TRANSLATION:
        return {other: _translated(exam, name, other, prefix) for other in _translations(exam, name)}
    variants, words = texts(exam.settings.attack_texts)
    return {key: _prompts(exam, variant, words, name, prefix) for key, variant in variants[kind].items()}


def reworded(exam: Exam, kind: str, name: str) -> int | None:
    """Of `synonyms`, the number of questions of which the table changes a word; None for other attacks."""
    variants, words = texts(exam.settings.attack_texts)
    if not any(variant.synonym for variant in variants.get(kind, {}).values()):
        return None
    return sum(with_synonyms(q.question, words, 1) != q.question for q in exam.sets[name].queries)


def with_synonyms(text: str, words: Mapping[str, Sequence[str]], number: int) -> str:
    """`text` with each word of the table replaced by its synonym of that number (from 1; the last where it has fewer)."""

    def other(found: re.Match[str]) -> str:
        synonyms = words.get(found[0].lower())
        if synonyms is None:
            return found[0]
        synonym = synonyms[min(number, len(synonyms)) - 1]
        return synonym[0].upper() + synonym[1:] if found[0][0].isupper() else synonym

    return re.sub(r"[^\W\d_]+", other, text)


@cache
def texts(path: str | None) -> tuple[dict[str, dict[str, Variant]], dict[str, list[str]]]:
    """All variants by attack and id, and the table of synonyms: ours, and those of the user's file."""
    variants: dict[str, dict[str, Variant]] = {}
    words: dict[str, list[str]] = {}
    for source in (str(TEXTS_PATH), *([path] if path else [])):
        for kind, entries in _read(source).items():
            if kind == WORDS:
                words |= {word.lower(): synonyms for word, synonyms in _checked_words(entries, source).items()}
                continue
            known = [name for name in PROMPT_ATTACKS if name != TRANSLATION]
            if kind not in known or not isinstance(entries, dict):
                raise UserError(
                    f"{source}: {kind!r} is no attack that is made of texts, or holds no variants",
                    f"its keys are {', '.join(known)} and {WORDS}; each holds variants by name",
                )
            of_kind = variants.setdefault(kind, {})
            for key, entry in entries.items():
                of_kind[_new(key, of_kind, kind, source)] = _checked(entry, f"{source}: {kind}.{key}")
    return variants, words


def _read(source: str) -> dict[str, Any]:
    try:
        read = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"evaluate.attack_texts: {source} cannot be read: {error.strerror}", "name a file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}", "quote texts") from None
    if not isinstance(read, dict):
        raise UserError(f"{source} must hold a mapping of attacks, found {type(read).__name__}", "see docs/attacks.md")
    return read


def _new(key: Any, known: Mapping[str, Variant], kind: str, source: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(key)):
        raise UserError(f"{source}: {kind}: {key!r} is no name of a variant", "use letters, digits, _ and -")
    if str(key) in known:
        raise UserError(f"{source}: {kind} has a variant {key!r} already", f"choose a name beside {', '.join(known)}")
    return str(key)


def _checked(entry: Any, where: str) -> Variant:
    if not isinstance(entry, dict):
        raise UserError(f"{where} must hold fields, found {entry!r}", f"they are {', '.join(Variant.model_fields)}")
    try:
        return Variant(**entry)
    except (ValidationError, TypeError) as error:
        first = (
            error.errors(include_url=False)[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        )
        field = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where}: {field or 'the fields'}: {first['msg']}", f"the fields are {', '.join(Variant.model_fields)}"
        ) from None


def _checked_words(entries: Any, source: str) -> dict[str, list[str]]:
    lists = entries if isinstance(entries, dict) else {}
    faulty = [
        word for word, synonyms in lists.items() if not (isinstance(synonyms, list) and synonyms and all(synonyms))
    ]
    if not lists or faulty:
        raise UserError(
            f"{source}: {WORDS} must hold lists of synonyms by word; faulty: {faulty or entries!r}",
            'for example `where: ["in which place"]`',
        )
    return {str(word): list(map(str, synonyms)) for word, synonyms in lists.items()}


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
        letters_backwards=asked[::-1],
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
    words_of = [_words(query.question) for query in kept]

    def choose(query: Query) -> tuple[str, ...]:
        own = _words(query.question)
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


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
