"""Proof, on a run's own rows and before any work, that the tokenizer at hand carries their texts.

`prompts.py` checks each prompt as it is rendered; here is what no single prompt shows: texts that the tokenizer takes for
commands, and texts that it does not give back.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from duet.cache.errors import UserError
from duet.stages.models.tokenizers import special_tokens
from duet.stages.questions.conversations import tool_texts
from duet.stages.questions.prompts import Renderer
from duet.stages.questions.queries import Query

PROVED_ROWS = 32  # of each set, the first ones, are read back

TEXT_FIELDS = ("question", "answer", "paraphrased", "perturbed", "choices")


def prove(
    renderer: Renderer,
    sets: Mapping[str, Sequence[Query]],
    prefixes: Mapping[str, str],
    fields: Sequence[str] = TEXT_FIELDS,
) -> None:
    """Raise UserError where a text has special tokens in it, or does not come back from the tokenizer.

    `sets` are by what errors call them, `prefixes` by the setting that holds each; `fields` are those of the queries in use.
    """
    tokenizer, settings = renderer.tokenizer, renderer.settings
    texts = [(f"{where}, row {query.row_id!r}", text) for where, query, text in _texts(sets, fields)]
    texts += [(key, prefix) for key, prefix in prefixes.items() if prefix]
    if not settings.special_tokens_in_text:
        _check_no_special_tokens(texts, tokens_in_use(renderer))
    first = {where: queries[:PROVED_ROWS] for where, queries in sets.items()}
    for where, query, text in _texts(first, fields):
        check_given_back(tokenizer, text, f"{where}, row {query.row_id!r}")
    for key, prefix in prefixes.items():
        check_given_back(tokenizer, prefix, key)


def tokens_in_use(renderer: Renderer) -> list[str]:
    """Texts that are commands to this model: special tokens, and other tokens of their own that the chat template writes."""
    source = renderer.chat.source if renderer.chat else ""
    added = (token.content for token in renderer.tokenizer.added_tokens_decoder.values())
    return sorted({*special_tokens(renderer.tokenizer), *(t for t in added if len(t.strip()) > 1 and t in source)})


def check_given_back(tokenizer: Any, text: str, where: str) -> None:
    """Raise UserError unless the tokenizer gives back a text, but for case, width of characters and runs of white space."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    found = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if _normal(found) != _normal(text):
        raise UserError(
            f"{where}: the tokenizer makes of {_shown(text, found)} what reads {_shown(found, text)}",
            "the model would read another text: check tokenizer_class in tokenizer_config.json against the model's page, or "
            "take a model whose tokenizer knows these characters",
        )


def cut_references(tokenizer: Any, sets: Mapping[str, Sequence[Query]], max_new_tokens: int) -> list[str]:
    """Of each set with reference answers that are longer than what may be generated, a sentence that says so."""
    found = []
    for name, queries in sets.items():
        texts = [(query.answer or "").strip() for query in queries]
        lengths = [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
        longer = [length for length in lengths if length > max_new_tokens]
        if longer:
            found.append(
                f"{len(longer)} of {len(lengths)} reference answers of {name} have more than {max_new_tokens} tokens, the "
                f"longest {max(longer)}, and are cut: set evaluate.max_new_tokens to {max(longer) + 1} or more"
            )
    return found


def _check_no_special_tokens(texts: Sequence[tuple[str, str]], tokens: Sequence[str]) -> None:
    if not tokens:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    found = [(where, match[0]) for where, text in texts if (match := pattern.search(text))]
    if found:
        more = f" (and {len(found) - 1} more texts)" if len(found) > 1 else ""
        raise UserError(
            f"{found[0][0]}{more}: the text has {found[0][1]!r} in it, which this tokenizer takes for a special token",
            "take it out; texts that were rendered before hold a template's own tokens; or set prompt.special_tokens_in_text: "
            "true if they are meant",
        )


def _texts(sets: Mapping[str, Sequence[Query]], fields: Sequence[str]) -> Iterator[tuple[str, Query, str]]:
    for where, queries in sets.items():
        for query in queries:
            for field in fields:
                held = [*query.texts, *_called(query)] if field == "question" else getattr(query, field)
                for text in (held,) if isinstance(held, str) else held or ():
                    yield where, query, text


def _called(query: Query) -> Iterator[str]:
    for turn in (*query.before, *query.after):
        yield from (forms[0] for forms in tool_texts(turn))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shown(text: str, other: str) -> str:
    """The text around the first character in which it differs from the other."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, at - 20) : at + 20])
