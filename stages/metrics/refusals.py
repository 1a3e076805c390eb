"""Which answers are refusals, and of which texts that can be told: the patterns of `refusals.yaml`, and the user's own.

Texts are compared in Unicode's form NFC. A number is made with all patterns, whatever the language of the answers;
`unknown_sets` tells where no answer is in a language that they know, so that a rate of 0 there is not believed.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import regex
import yaml

from duet.stages.metrics.words import split_words
from duet.stages.settings.evaluate import compiled

PATTERNS_PATH = Path(__file__).with_name("refusals.yaml")
SHARE = 0.1  # of a text's words that are among a language's most frequent ones, if it is in that language
SHORT = 4  # a text of fewer words in a script of several languages does not tell which of them it is in


@cache
def languages() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(PATTERNS_PATH.read_text(encoding="utf-8"))


@cache
def _packaged() -> tuple[list[regex.Pattern[str]], regex.Pattern[str]]:
    """The patterns, each language's as one, and that of an I which is not a pronoun."""
    patterns = [compiled(_any_of(language["patterns"])) for language in languages().values()]
    numerals = [pattern for language in languages().values() for pattern in language.get("not_pronoun", ())]
    return patterns, regex.compile(_any_of(numerals), regex.V1)


def _any_of(patterns: Sequence[str]) -> str:
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def refusals(outputs: Sequence[str], extra_patterns: Sequence[str] = ()) -> np.ndarray:
    """Per output, 1 where a pattern of `refusals.yaml` or one of these takes it for a refusal, else 0; float64 [n]."""
    packaged, numeral = _packaged()
    own = [compiled(pattern) for pattern in extra_patterns]

    def refuses(output: str) -> bool:
        text = unicodedata.normalize("NFC", output).strip().replace("\u2019", "'")
        others = numeral.sub("1", text)
        return any(p.search(text) for p in own) or any(p.search(others) for p in packaged)

    return np.array([float(refuses(output)) for output in outputs])


def unknown_sets(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """The sets whose texts are in no language that the patterns know."""
    return [name for name, of_set in texts.items() if _is_known(of_set) is False]


def _is_known(texts: Sequence[str]) -> bool | None:
    """Whether the texts are in languages that the patterns know; None where they are too short to tell.

    By script, and where languages share one by the share of their most frequent words.
    """
    by_script = _languages_by_script()
    told: dict[str, Counter[str]] = {}
    strange = lettered = 0
    for text in texts:
        words = [word for word in split_words(text) if regex.search(r"\p{L}", word)]
        if not words:
            continue
        lettered += 1
        script = Counter(_script_of(word) for word in words).most_common(1)[0][0]
        if script is None:
            strange += 1
        elif any(common is None for common in by_script[script]):
            return True
        elif len(words) >= SHORT:
            told.setdefault(script, Counter()).update(words)
    for script, counts in told.items():
        for common in by_script[script]:
            if sum(counts[word] for word in common or ()) >= SHARE * counts.total():
                return True
    return False if told or 2 * strange > lettered else None


@cache
def _languages_by_script() -> dict[str, list[frozenset[str] | None]]:
    """Of each script the most frequent words of its languages; None of one that is known by its script alone."""
    found: dict[str, list[frozenset[str] | None]] = {}
    for language in languages().values():
        common = frozenset(split_words(language["common"])) if "common" in language else None
        for script in language["script"].split():
            found.setdefault(script, []).append(common)
    return found


@cache
def _script_of(word: str) -> str | None:
    """The script of a word's first letter, of those that some pattern knows."""
    return next((script for script in _languages_by_script() if regex.match(rf"\P{{L}}*\p{{{script}}}", word)), None)
