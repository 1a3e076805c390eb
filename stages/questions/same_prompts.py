"""Is a student's tokenizer the store's? Asked by meaning (what each id stands for), never by vocabulary width."""

from __future__ import annotations

from typing import Any

from duet.cache.errors import UserError
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.questions.queries import Query
from duet.stages.settings.data import PromptSettings

OTHER_FAMILY = (
    "take a student of the same model family and tokenizer, or make a store with a teacher that has this tokenizer"
)

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


SAMPLE = "What is the capital of France?"  # a question, to compare what chat templates make of it


def check_same_tokenizer(
    store_tokenizer: Any, student_tokenizer: Any, prompt: PromptSettings, student: str
) -> set[int]:
    """Raise UserError unless ids mean the same, texts give the same ids, and questions are rendered alike.

    Students learn from the store's prompts, which are ids, and are then asked through their own tokenizer: a chat template may
    read otherwise where prompts are plain, and must give the same prompt where they are not. Returns ids of added tokens that
    only one of the two has, which no prompt or response of the store may use.
    """
    added = {*store_tokenizer.get_added_vocab().values(), *student_tokenizer.get_added_vocab().values()}
    differing = _differing_ids(store_tokenizer.get_vocab(), student_tokenizer.get_vocab())
    of_one = {i for i, (ours, theirs) in differing.items() if None in (ours, theirs) and i in added}
    fault = (
        _vocabulary_fault({i: tokens for i, tokens in differing.items() if i not in of_one})
        or _probe_fault(store_tokenizer, student_tokenizer)
        or _prompt_fault(store_tokenizer, student_tokenizer, prompt)
    )
    if fault:
        raise UserError(f"student {student!r}: {fault[0]}", fault[1])
    return of_one


def _differing_ids(expected: dict[str, int], found: dict[str, int]) -> dict[int, tuple[str | None, str | None]]:
    """Each id that does not stand for the same, with what it stands for in both."""
    if expected == found:
        return {}
    ours, theirs = ({id_: token for token, id_ in vocab.items()} for vocab in (expected, found))
    return {i: (ours.get(i), theirs.get(i)) for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)}


def _vocabulary_fault(differing: dict[int, tuple[str | None, str | None]]) -> tuple[str, str] | None:
    if not differing:
        return None
    first, (expected, found) = next(iter(differing.items()))
    what = f"{len(differing)} ids differ, the first is {first}: {found!r} instead of {expected!r}"
    return f"its tokenizer is not the store's: {what}", OTHER_FAMILY


def _probe_fault(expected: Any, found: Any) -> tuple[str, str] | None:
    for text in PROBES:
        ids_expected, ids_found = expected(text)["input_ids"], found(text)["input_ids"]
        if ids_expected != ids_found:
            what = f"{text!r} gives the ids {ids_found[:8]}… instead of {ids_expected[:8]}…"
            return f"its tokenizer is not the store's: {what}", OTHER_FAMILY
    return None


def _prompt_fault(expected: Any, found: Any, prompt: PromptSettings) -> tuple[str, str] | None:
    try:
        asked = Prompt.plain(Query("sample", SAMPLE, None))
        several = isinstance(expected.chat_template, dict)
        of_store = (
            prompt if several else prompt.model_copy(update={"template_name": None})
        )  # a store keeps the one it used
        ids_expected = Renderer(expected, of_store).prompt(asked)
        ids_found = Renderer(found, prompt).prompt(asked)
    except UserError as error:
        return error.what, error.hint
    if ids_expected == ids_found:
        return None
    first = next((i for i, (a, b) in enumerate(zip(ids_expected, ids_found, strict=False)) if a != b), None)
    at = min(len(ids_expected), len(ids_found)) if first is None else first
    ours, theirs = (
        repr(tokenizer.decode(ids[at : at + 24])) for tokenizer, ids in ((expected, ids_expected), (found, ids_found))
    )
    return (
        f"it would be asked otherwise than it is trained: its prompts go on with {theirs} where the store's go on with {ours}",
        "give it the chat template of the teacher's model (a date in it is set by prompt.template_args or prompt.date, where "
        "the template takes one), or make a store with prompt.format: plain",
    )
