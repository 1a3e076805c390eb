"""Which of an answer's tokens stand for a stretch of its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duet.cache.errors import UserError
from duet.stages.questions.prompts import Prompt, Renderer


def touched(renderer: Renderer, prompt: Prompt, answer: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Of each of the answer's ids, with the end of its turn, whether its text overlaps one of these stretches; bool.

    A stretch (start, end) counts characters of the answer without the white space around it. UserError for a tokenizer that
    cannot say where its tokens stand.
    """
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} cannot say where in a text its tokens stand",
            "save the model with a fast tokenizer, which has a tokenizer.json",
        )
    given = renderer.answer(prompt, answer)
    text = renderer.answer_text(prompt, answer)
    first = text.rindex(answer.strip())
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marks = np.zeros(len(given.ids), bool)
    for number, (start, end) in enumerate(read["offset_mapping"][-len(given.own) :][: len(marks)]):
        marks[number] = any(end > first + a and start < first + b for a, b in spans)
    return marks
