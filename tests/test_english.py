"""Native English: phrases that were retired stay away from documents, help, docstrings, comments and messages.

The rule of thumb: subject, verb, object; "not a" instead of "is no"; "reported" instead of "told"; "number of"
instead of "so many"; "fix" instead of "mend"; "again" instead of "anew"; "Duet's" instead of "ours".
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

# What may not be written (but for "there is no", "so many that", and `ours` as a name in code), and what to write instead.
RETIRED = {
    r"(?<!here )\b(?:is|are|was) no (?!(?:less|more|longer|other|better|worse|smaller|larger|need)\b)[a-z]+\b": "is not a",
    r"\bso[- ]many(?!\b.*\bthat\b)|so-manieth": "the number of",
    r"\banew\b": "again, or re-",
    r"\bmend(?:s|ed|ing)?\b": "fix, or repair",
    r"(?<![`\"'{\[.])\bours\b(?![`\"'}\]])": "Duet's",
    r", too[.;:,)]": "also",
    r"\b(?:is|are) none of (?:it|them)\b": "is not one of",
    r"\bin others' hands\b": "claimed by other workers",
}
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "lab/README.md",
        "lab/smollm2/README.md",
        "notebooks/lab.ipynb",
    )
]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "configs").glob("*.yaml"))
FOLDERS = ("api", "cache", "pipeline", "stages", "scripts", "lab", "benchmarks", "examples")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts: of a page all lines; of code its docstrings, comments and messages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    texts = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in texts and token.string.strip("\"'").isidentifier() is False:  # a key is not English
            yield from enumerate(token.string.splitlines(), token.start[0])


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_retired_phrase_is_written(path):
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {found[0]!r} (write {better}): {line.strip()[:100]}"
        for number, line in words_of(path)
        for phrase, better in RETIRED.items()
        if (found := re.search(phrase, line))
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    "line",
    [
        "it is no config file",
        "at most so many tokens",
        "writes it anew",
        "you can mend it",
        "a script of ours",
        "works here, too.",
    ],
)
def test_a_retired_phrase_is_found(line):
    assert any(re.search(phrase, line) for phrase in RETIRED)


@pytest.mark.parametrize(
    "line",
    [
        "it is no longer read",
        "there is no file",
        "has no tail",
        "there are so many that it takes hours",
        "hours",
        "too many tokens",
    ],
)
def test_a_legitimate_phrase_passes(line):
    assert not any(re.search(phrase, line) for phrase in RETIRED)
