"""A judge: a language model behind an OpenAI-compatible server that says of each answer whether it states the reference's fact.

At temperature 0, one request for each answer that differs. Replies are kept on disk as answers are, model by model, so that an
interrupted evaluation asks only for the rest. Before any model is asked, two made-up answers, one right and one wrong, show
that the server can be reached and that its model judges at all. The key is part of the requests alone.
"""

from __future__ import annotations

import functools
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from duet.cache.errors import UserError
from duet.cache.files import sha256_json
from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, QuerySet, Subject, stem_of
from duet.stages.exam.kept import recalled
from duet.stages.questions.text_files import text_of
from duet.stages.questions.yaml_text import parse_yaml
from duet.stages.settings.base import Settings
from duet.stages.settings.judge import JudgeSettings

KEY, PROMPT_PATH = "evaluate.judge", Path(__file__).with_name("judge.yaml")
KEY_VARIABLE = "DUET_JUDGE_KEY"
FIELDS: tuple[str, ...] = ("question", "reference", "answer")
AT_A_TIME = 8  # requests on their way
REPLY_TOKENS = 8  # asked for at most: one word is wanted
WAITS = (1.0, 4.0, 16.0)  # seconds before a request is made again that a busy server turned down
TIMEOUT = 120  # seconds for one reply
BUSY = (408, 429, 500, 502, 503, 504)
PROOFS = (
    ("Paris.", True),
    ("I do not know.", False),
)  # answers to a question that every model knows, and which is right


class JudgePrompt(Settings):
    """The two messages of a request."""

    system: str = Field(description="the judge's task; may hold the placeholders too")
    user: str = Field(description="text with {question}, {reference} and {answer}")


@dataclass(frozen=True)
class Judge:
    """A server's model with its prompt; the key stays out of messages and files."""

    settings: JudgeSettings
    prompt: JudgePrompt
    key: str | None
    waits: tuple[float, ...] = WAITS

    def __repr__(self) -> str:
        return f"Judge({self.settings!r})"

    def messages(self, question: str, reference: str, answer: str) -> list[dict[str, str]]:
        """One request's messages; what stands in a text is never taken for a placeholder."""
        values: dict[str, str] = dict(zip(FIELDS, (question, reference, answer), strict=True))
        return [
            {
                "role": role,
                "content": re.sub(r"\{(\w+)\}", lambda found: values[str(found[1])], getattr(self.prompt, role)),
            }
            for role in ("system", "user")
        ]


@dataclass(frozen=True)
class Judged:
    """What a judge replied, by subject and set."""

    judge: Judge
    replies: Mapping[str, Mapping[str, list[str]]]


def judge_of(settings: JudgeSettings, key: str | None) -> Judge:
    """The judge with its prompt; UserError for a faulty prompt file."""
    path = Path(settings.prompt or PROMPT_PATH)
    where = f"{KEY}.prompt: {path}"
    raw = parse_yaml(text_of(path, where), where)
    try:
        prompt = JudgePrompt(**raw)
    except (ValidationError, TypeError):
        raise UserError(
            f"{where} is not a prompt", "it has two texts, system and user, as stages/exam/judge.yaml"
        ) from None
    named = set(re.findall(r"\{(\w+)\}", prompt.system + prompt.user))
    if named != set(FIELDS):
        raise UserError(
            f"{where}: its placeholders are {', '.join(sorted(named)) or 'none'}", f"expected {', '.join(FIELDS)}"
        )
    return Judge(settings, prompt, key)


def verdict_of(reply: str) -> bool | None:
    """Whether a reply says yes or no by its first word; None where it is neither."""
    word = re.search(r"\w+", reply.casefold())
    return {"yes": True, "no": False}.get(word[0]) if word else None


def check_judge(judge: Judge) -> None:
    """UserError where the server cannot be reached or its model does not judge two simple answers rightly."""
    for answer, right in PROOFS:
        reply = _ask(judge, judge.messages("What is the capital of France?", "The capital is Paris.", answer))
        if verdict_of(reply) is not right:
            expected = "yes" if right else "no"
            raise UserError(
                f"{KEY}: {judge.settings.model} judges the answer {answer!r} with {reply!r}, expected {expected}",
                "name a model that follows instructions, or change the prompt (evaluate.judge.prompt)",
            )


def asked_of(query_set: QuerySet, answers: Sequence[str]) -> list[tuple[str, str, str]]:
    """Question, reference and answer of every query."""
    return [(q.question, q.answer or "", answer) for q, answer in zip(query_set.queries, answers, strict=True)]


def read_judge(
    judge: Judge,
    subjects: Sequence[Subject],
    exam: Exam,
    answers: Mapping[str, Mapping[str, Any]],
    folder: Path,
    watch: Watch,
) -> Judged:
    """The judge's replies to every subject's answers to the sets as they are; kept in `folder`.

    Raises Interrupted when `watch` stops; what was judged before is kept.
    """
    found: dict[str, dict[str, list[str]]] = {subject.name: {} for subject in subjects}
    for number, subject in enumerate(subjects, start=1):
        for name, query_set in exam.judged.items():
            watch.pause(f"{subject.name}, judged,")
            triples = asked_of(query_set, answers[subject.name][name])
            found[subject.name][name] = recalled(
                folder / f"{stem_of(subject.name)}.{name}.json",
                sha256_json([judge.settings.model, judge.prompt.model_dump(), triples]),
                functools.partial(_replies, judge, triples),
            )
        watch.on_progress("judged", number, len(subjects))
    return Judged(judge, found)


def _replies(judge: Judge, triples: Sequence[tuple[str, str, str]]) -> list[str]:
    """A reply for each; equal ones are asked for once."""
    different = list(dict.fromkeys(triples))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        replies = list(pool.map(lambda triple: _ask(judge, judge.messages(*triple), judge.waits), different))
    by_triple = dict(zip(different, replies, strict=True))
    return [by_triple[triple] for triple in triples]


def _ask(judge: Judge, messages: list[dict[str, str]], waits: Sequence[float] = ()) -> str:
    """The text of one reply; a server that is busy or does not answer is asked again after each of `waits`."""
    body = {"model": judge.settings.model, "messages": messages, "temperature": 0, "max_tokens": REPLY_TOKENS}
    url = f"{judge.settings.url}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if judge.key:
        request.add_unredirected_header("Authorization", f"Bearer {judge.key}")  # to this server and to no other
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return _text_of(response.read(), url)
    except (OSError, HTTPException) as error:
        refused = isinstance(error, urllib.error.HTTPError) and error.code not in BUSY
        if not waits or refused:
            raise _unanswered(error, url) from None
    time.sleep(waits[0])
    return _ask(judge, messages, waits[1:])


def _unanswered(error: Exception, url: str) -> UserError:
    if isinstance(error, urllib.error.HTTPError):
        return UserError(
            f"{KEY}: {url} answers {error.code} ({error.reason})",
            f"check evaluate.judge.model and, in the environment, {KEY_VARIABLE}; what was judged before is kept",
        )
    return UserError(
        f"{KEY}: {url} cannot be reached: {getattr(error, 'reason', error)}",
        "start the server, correct evaluate.judge.url, or leave evaluate.judge out",
    )


def _text_of(content: bytes, url: str) -> str:
    try:
        return str(json.loads(content)["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(
            f"{KEY}: {url} does not reply as an OpenAI-compatible server: {content[:80]!r}",
            "the address ends in the version, such as /v1",
        ) from None


def prompt_sha256(judge: Judge) -> str:
    """Hash of the prompt's texts."""
    return sha256(json.dumps(judge.prompt.model_dump(), sort_keys=True).encode()).hexdigest()
