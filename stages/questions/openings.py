"""Where a text begins that a model writes by itself, and what ends it: the user's turn of the student's own prompt, or nothing.

That a chat model continues its template's user header with a question of a user is Magpie's observation (arXiv 2406.08464).
"""

from __future__ import annotations

from dataclasses import dataclass

from duet.cache.errors import UserError
from duet.stages.models.tokenizers import special_tokens, token_ids
from duet.stages.questions.chat import QUESTION, Message
from duet.stages.questions.prompts import Renderer


@dataclass(frozen=True)
class Opening:
    """What a model continues, and what ends its text: every special token, and the first of these texts."""

    field: str  # of a row that holds the text
    ids: tuple[int, ...]
    ends: tuple[str, ...] = ()

    @property
    def must_end(self) -> bool:
        """Whether a text without an end is useless: half a question is another question, half a document is a document."""
        return self.field == "question"


def question_opening(renderer: Renderer) -> Opening:
    """The prompt without prefix up to where the question stands, less spaces, which tokenizers join with a first word."""
    before, _, after = _frame(renderer).partition(QUESTION)
    ids = token_ids(renderer.tokenizer, before.rstrip(" \t"))
    if renderer.chat is None:
        ids = [*renderer.in_front_of_text(""), *ids]
    return Opening("question", tuple(ids or _from_nothing(renderer)), _ends(renderer, after))


def document_opening(renderer: Renderer) -> Opening:
    """What stands before a text that is read as it is."""
    return Opening("text", tuple(renderer.in_front_of_text("") or _from_nothing(renderer)))


def _frame(renderer: Renderer) -> str:
    """The student's prompt around a question, as text."""
    asked = renderer.settings.template.replace("{question}", QUESTION)
    if renderer.chat is None:
        return asked
    system = renderer.system("")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return renderer.chat.text([*messages, {"role": "user", "content": asked}], generate=True)


def _ends(renderer: Renderer, after: str) -> tuple[str, ...]:
    """The first words that the prompt puts behind a question, if they are ordinary text, and in plain prompts a line break."""
    words = after.strip().partition("\n")[0]
    for token in special_tokens(renderer.tokenizer):
        words = words.partition(token)[0]
    found = (words.strip(),) if words.strip() else ()
    return found if renderer.chat else ("\n", *found)


def _from_nothing(renderer: Renderer) -> list[int]:
    """The token behind which a model begins a text: BOS, or the end of the text before."""
    tokenizer = renderer.tokenizer
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError(
            "the tokenizer has neither a BOS nor an end-of-sequence token, so nothing says that a text begins",
            "name one in tokenizer_config.json",
        )
    return [found]
