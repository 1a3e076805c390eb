"""Is a student's tokenizer the store's? Asked by meaning (what each id stands for), never by vocabulary width."""

from __future__ import annotations

from typing import Any

from cache.errors import UserError

# Texts on which two tokenizers of one family but of different rules (digits, spaces, case, scripts) come apart.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Year 1984, 3.14159, 1,000,000 and 0x7fff",
    "  leading,   repeated and trailing spaces  \n\n\tand tabs",
    "naïve café Ångström straße Ñandú",
    "Кто написал «Войну и мир»? 东京都在哪里？ مرحبا 🙂👩‍🚀",
    "def f(x):\n    return x**2  # comment\n",
    "don't I'll we've O'Neil rock'n'roll e-mail",
)


def check_same_tokenizer(store_tokenizer: Any, student_tokenizer: Any, student_width: int, student: str) -> None:
    """Raise UserError unless ids mean the same and texts give the same ids; a wider, padded output head is fine."""
    hint = (
        "take a student of the same model family and tokenizer, or make a store with a teacher that has this tokenizer"
    )
    fault = (
        _vocabulary_fault(store_tokenizer.get_vocab(), student_tokenizer.get_vocab())
        or _special_fault(store_tokenizer, student_tokenizer)
        or _probe_fault(store_tokenizer, student_tokenizer)
    )
    if fault:
        raise UserError(f"student {student!r}: its tokenizer is not the store's: {fault}", hint)
    largest = max(store_tokenizer.get_vocab().values())
    if student_width <= largest:
        raise UserError(
            f"student {student!r}: its head has {student_width} rows, the tokenizer's ids go up to {largest}", hint
        )


def _vocabulary_fault(expected: dict[str, int], found: dict[str, int]) -> str | None:
    if expected == found:
        return None
    by_id_expected, by_id_found = ({id_: token for token, id_ in vocab.items()} for vocab in (expected, found))
    differing = [i for i in sorted({*by_id_expected, *by_id_found}) if by_id_expected.get(i) != by_id_found.get(i)]
    first = differing[0]
    return (
        f"{len(differing)} ids differ, the first is {first}: "
        f"{by_id_found.get(first)!r} instead of {by_id_expected.get(first)!r}"
    )


def _special_fault(expected: Any, found: Any) -> str | None:
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(expected, name) != getattr(found, name):
            return f"{name} is {getattr(found, name)} instead of {getattr(expected, name)}"
    if (expected.chat_template or None) != (found.chat_template or None):
        return "the chat templates differ"
    return None


def _probe_fault(expected: Any, found: Any) -> str | None:
    for text in PROBES:
        ids_expected, ids_found = expected(text)["input_ids"], found(text)["input_ids"]
        if ids_expected != ids_found:
            return f"{text!r} gives the ids {ids_found[:8]}… instead of {ids_expected[:8]}…"
    return None
