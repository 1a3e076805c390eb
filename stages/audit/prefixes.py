"""Candidate unlearning prefixes: the config's own, the user's, bundled templates, controls, and variations of the best.

Texts only: what they do to a model is asked in `audit.py`. The bundled texts are in `prefixes.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from duet.cache.errors import UserError
from duet.stages.questions.requests import fill_prefix

PREFIXES_PATH = Path(__file__).with_name("prefixes.yaml")
CONFIGS_OWN, NO_PREFIX = "config", "no prefix"
ATTEMPTS = 500  # draws in a row that were seen before or lack the topic, until a search gives up


@dataclass(frozen=True)
class Candidate:
    """One prefix. `template` has {topic} where `prefix` has the topic; both are empty for no prefix."""

    name: str
    kind: str  # "config", "yours", "bundled", "control" or "search"
    template: str
    prefix: str


def candidates(own: str, yours: Sequence[str], topic: str) -> list[Candidate]:
    """No prefix, then the config's own, the user's, the bundled ones and the other controls; equal texts count once."""
    bundled = _bundled()
    texts = [(CONFIGS_OWN, "config", own)]
    texts += [(f"yours-{number}", "yours", text) for number, text in enumerate(yours, start=1)]
    texts += [(name, "bundled", text) for name, text in bundled["templates"].items()]
    texts += [(name, "control", text) for name, text in bundled["controls"].items()]
    found = {"": Candidate(NO_PREFIX, "control", "", "")}
    for name, kind, text in texts:
        if not text.strip():
            where = "teacher.prefix" if kind == "config" else "--prefix"
            raise UserError(f"{where} is empty", "give some text; the bare model is always included as a control")
        prefix = fill_prefix(text, topic)
        found.setdefault(prefix, Candidate(name, kind, prefix.replace(topic, "{topic}"), prefix))
    return list(found.values())


def variations(
    parents: Sequence[Candidate], known: Sequence[Candidate], count: int, topic: str, seed: int
) -> list[Candidate]:
    """Up to `count` new prefixes that name the topic, made of sentences of the parents and of the bundled clauses.

    A draw takes a parent's sentences and changes one thing: another parent's end, a sentence replaced, added or left out, or
    the order. The same parents and seed give the same variations. Fewer come back where no more can be made.
    """
    rng = np.random.default_rng(seed)
    sentences = [_sentences(parent.template) for parent in parents]
    pool = list(dict.fromkeys([*(s for of_one in sentences for s in of_one), *_bundled()["clauses"]]))
    seen, made = {candidate.template for candidate in known}, []
    misses = 0
    while len(made) < count and misses < ATTEMPTS:
        template = " ".join(_changed(rng, sentences, pool))
        if "{topic}" not in template or template in seen:
            misses += 1
            continue
        seen.add(template)
        made.append(Candidate(f"search-{len(made) + 1}", "search", template, fill_prefix(template, topic)))
        misses = 0
    return made


def _changed(rng: np.random.Generator, sentences: Sequence[list[str]], pool: Sequence[str]) -> list[str]:
    """One parent's sentences with one change."""
    own, other = (sentences[int(i)] for i in rng.integers(len(sentences), size=2))
    clause, place = pool[int(rng.integers(len(pool)))], int(rng.integers(len(own)))
    changes = (
        [*own[: place + 1], *other[-1:]],
        [*own[:place], clause, *own[place + 1 :]],
        [*own[: place + 1], clause, *own[place + 1 :]],
        [*own[:place], *own[place + 1 :]],
        [*own[place:], *own[:place]],
    )
    return list(dict.fromkeys(changes[int(rng.integers(len(changes)))]))


def _sentences(template: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", template.strip())


def bundled_prefixes() -> dict[str, str]:
    """The templates that come with Duet, by name."""
    return _bundled()["templates"]


def _bundled() -> dict[str, Any]:
    return yaml.safe_load(PREFIXES_PATH.read_text(encoding="utf-8"))
