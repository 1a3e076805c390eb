"""The texts of the attacks: variants by attack and name, read from `attacks.yaml` and from a user's file of the same form.

What a text may hold is checked here, once, whoever wrote it; `prompts.py` makes prompts of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from duet.cache.errors import UserError
from duet.stages.questions.text_files import text_of
from duet.stages.questions.yaml_text import parse_yaml
from duet.stages.settings.attacks import ATTACKS, TRANSLATION
from duet.stages.settings.base import Settings

TEXTS_PATH = Path(__file__).with_name("attacks.yaml")
WORDS = "words"  # the table of synonyms
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
    answer_tokens: int | None = Field(
        default=None, ge=1, description="number of tokens of the right answer that begin it"
    )
    bare: bool = Field(default=False, description="plain text to be continued, without the chat's form")
    examples: int = Field(default=0, ge=0, description="number of answered questions in front")
    synonym: int = Field(default=0, ge=0, description="number of the synonym that replaces words of the table; 0: none")
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


@cache
def texts(path: str | None) -> tuple[dict[str, dict[str, Variant]], dict[str, list[str]]]:
    """All variants by attack and id, and the table of synonyms: Duet's, and those of the user's file."""
    known = [name for name, attack in ATTACKS.items() if attack.made_of == "prompts" and name != TRANSLATION]
    variants: dict[str, dict[str, Variant]] = {}
    words: dict[str, list[str]] = {}
    for source in (str(TEXTS_PATH), *([path] if path else [])):
        for kind, entries in _read(source).items():
            if kind == WORDS:
                words |= {word.lower(): synonyms for word, synonyms in _checked_words(entries, source).items()}
                continue
            if kind not in known or not isinstance(entries, dict):
                raise UserError(
                    f"{source}: {kind!r} is not an attack of texts, or holds no variants",
                    f"its keys are {', '.join(known)} and {WORDS}; each holds variants by name",
                )
            of_kind = variants.setdefault(kind, {})
            for key, entry in entries.items():
                of_kind[_new(key, of_kind, kind, source)] = _checked(entry, f"{source}: {kind}.{key}")
    return variants, words


def _read(source: str) -> dict[str, Any]:
    read = parse_yaml(text_of(Path(source), "evaluate.attack_texts"), source)
    if not isinstance(read, dict):
        raise UserError(f"{source} must hold a mapping of attacks, found {type(read).__name__}", "see docs/attacks.md")
    return read


def _new(key: Any, known: Mapping[str, Variant], kind: str, source: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(key)):
        raise UserError(f"{source}: {kind}: {key!r} is not a valid name of a variant", "use letters, digits, _ and -")
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
