"""The attacks of texts: the prompts that they make of a query set, how these are asked, and the recall of the answers.

Such an attack is a row of the table in `settings/attacks.py` and a block of `attacks.yaml`, which `texts.py` reads. What must
always hold: every model of a run is asked the same, so a prompt depends on the model only by its prefix; random choices are
drawn by the evaluation's seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.attacks.chosen import chosen, kept_queries, translations
from duet.stages.attacks.names import task, title
from duet.stages.attacks.parts import Answers, Cost, answers_of, asked, of_variants
from duet.stages.attacks.texts import LETTERS, Variant, texts
from duet.stages.exam.exam import DISTINCTIVE, Exam, Subject
from duet.stages.exam.session import ModelSession, left_of
from duet.stages.metrics import text as metrics
from duet.stages.metrics.uncertainty import Score
from duet.stages.metrics.words import has_word, letters, replace_words, split_words
from duet.stages.questions.prompts import Prompt
from duet.stages.questions.queries import Query
from duet.stages.settings.attacks import TRANSLATION


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, Any]:
    """The answers to all variants on all attacked sets, by task, and under `left_of` a task what is left of its references."""
    return session.ask(subject, watch, _tasks(session, subject, kind))


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the answers."""
    more = [kind, answers_of(session, session.exam.attacked)]
    return session.identity(subject, tasks=_tasks(session, subject, kind), more=more)


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    return asked(session, subject, _tasks(session, subject, kind))


def recalls(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """ROUGE-L recall of each variant by its title, float64 [N]; NaN where a question does not count."""
    found = {}
    for variant, prompts in prompts_of(exam, kind, name, "").items():
        asked_as = task(kind, variant, name)
        found[title(variant, name)] = _best_match(prompts, answers[asked_as], answers.get(left_of(asked_as)))
    return found


def facts(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """Distinctive recall of each variant by its title, float64 [N]; of a begun answer, of the words left to be said.

    NaN where none is left. Of a translation the better match counts.
    """
    found = {}
    for variant in prompts_of(exam, kind, name, ""):
        asked_as = task(kind, variant, name)
        outputs, left = answers[asked_as], answers.get(left_of(asked_as))
        values = metrics.distinctive_recall(exam.distinctive[name], outputs, left)
        if kind == TRANSLATION:
            by_id = dict(zip((q.row_id for q in exam.sets[variant].queries), exam.distinctive[variant], strict=True))
            words = [by_id[query.row_id] for query in exam.sets[name].queries]
            values = np.maximum(values, metrics.distinctive_recall(words, outputs))
        found[title(variant, name)] = values
    return found


def scores(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
    return of_variants(exam, kind, name, list(recalls(answers, exam, kind, name).values())) | of_variants(
        exam, kind, name, list(facts(answers, exam, kind, name).values()), DISTINCTIVE
    )


def skipped(exam: Exam) -> dict[str, str]:
    """Of the attack synonyms on each attacked set, how many questions it asks as they are, if any."""
    found = {}
    for name in exam.attacked if "synonyms" in chosen(exam)[0] else ():
        if unchanged := without_synonyms(exam, name):
            count = len(exam.sets[name].queries)
            found[f"synonyms, {name}"] = (
                f"{unchanged} of {count} questions have no word of the table: asked as they are"
            )
    return found


def _tasks(session: ModelSession, subject: Subject, kind: str) -> list[str]:
    return [name for name in session.tasks(subject) if name.startswith(f"attack.{kind}.")]


def _best_match(prompts: Sequence[Prompt], outputs: Sequence[str], left: Sequence[str] | None) -> np.ndarray:
    """Recall of the best of each prompt's references; NaN where nothing of the reference is left to be said."""
    values = np.full(len(prompts), np.nan)
    for number, prompt in enumerate(prompts):
        if left is not None:  # punctuation alone is nothing to be said
            references = [left[number]] if has_word(left[number]) else []
        else:
            references = [text for text in prompt.references or [prompt.query.answer or ""] if split_words(text)]
        if references:
            values[number] = metrics.rouge_l(references, [outputs[number]] * len(references))[0].max()
    return values


def prompts_of(exam: Exam, kind: str, name: str, prefix: str) -> dict[str, list[Prompt]]:
    """Per variant of an attack, what is asked on the query set `name`, in its order; `prefix` is the model's own."""
    if kind == TRANSLATION:
        return {other: _translated(exam, name, other, prefix) for other in translations(exam, name)}
    variants = texts(exam.settings.attack_texts)[0]
    return {key: prompts_with(exam, variant, name, prefix) for key, variant in variants[kind].items()}


def without_synonyms(exam: Exam, name: str) -> int:
    """Number of a set's questions that have no word of the table of synonyms."""
    words = texts(exam.settings.attack_texts)[1]
    return sum(with_synonyms(query.question, words, 1) == query.question for query in exam.sets[name].queries)


def with_synonyms(text: str, words: Mapping[str, Sequence[str]], number: int) -> str:
    """`text` with each word of the table replaced by its synonym of that number (from 1; the last where it has fewer)."""
    return replace_words(text, {word: some[min(number, len(some)) - 1] for word, some in words.items()})


def _translated(exam: Exam, name: str, other: str, prefix: str) -> list[Prompt]:
    by_id = {query.row_id: query for query in exam.sets[other].queries}
    queries = exam.sets[name].queries
    if lacking := [query.row_id for query in queries if query.row_id not in by_id]:
        raise UserError(
            f"evaluate.sets.{other} translates {name}, but has no row with its id {lacking[0]!r}",
            "give both sets an id_field, with the same id on a question and its translation",
        )
    return [
        Prompt(
            replace(q, before=by_id[q.row_id].before, after=by_id[q.row_id].after),
            by_id[q.row_id].question,
            prefix,
            references=(q.answer or "", by_id[q.row_id].answer or ""),
        )
        for q in queries
    ]


def prompts_with(exam: Exam, variant: Variant, name: str, prefix: str) -> list[Prompt]:
    """A variant's prompts on the query set `name`; of a set that is not attacked the topic is the forget set's."""
    topic, queries = exam.attacked.get(name, exam.topic), exam.sets[name].queries
    words = texts(exam.settings.attack_texts)[1]
    text = _filled(variant.in_front, topic=topic)
    in_front = exam.prompt.separator.join(part for part in (prefix, text) if part)
    examples = _examples(exam, variant.examples)
    choose = _chooser(exam, variant.choices) if variant.choices else None
    prompts = []
    for query in queries:
        choices = choose(query) if choose else ()
        wording = with_synonyms(query.question, words, variant.synonym) if variant.synonym else query.question
        opening = (query.answer or "") if variant.answer_tokens else _filled(variant.opening, topic=topic)
        prompts.append(
            Prompt(
                query,
                _question(variant, topic, wording, choices),
                in_front,
                opening,
                variant.answer_tokens,
                variant.bare,
                examples,
                choices=choices,
            )
        )
    return prompts


def _question(variant: Variant, topic: str, wording: str, choices: Sequence[str]) -> str:
    """The question of a prompt, with all placeholders filled."""
    shown = [
        _filled(variant.choice, letter=letter, answer=answer) for letter, answer in zip(LETTERS, choices, strict=False)
    ]
    return _filled(
        variant.question,
        topic=topic,
        question=wording,
        words_backwards=" ".join(reversed(wording.split())),
        letters_backwards="".join(reversed(letters(wording))),
        choices=" ".join(shown),
    )


def _filled(text: str, **values: str) -> str:
    """`text` with {name} replaced, once: what is filled in may hold braces of its own."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)


def _examples(exam: Exam, count: int) -> tuple[Query, ...]:
    kept = [query for query in kept_queries(exam) if not query.is_conversation]
    if count > len(kept):
        raise UserError(
            f"an attack wants {count} answered questions of a single turn to be kept, there are {len(kept)}",
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
    kept = kept_queries(exam)
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
