"""The attack multiple_choice: asked as every attack of texts; beside recall, does the answer pick the right choice?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from duet.stages.attacks.names import task
from duet.stages.attacks.parts import Answers, Evidence, of_variants, points, said
from duet.stages.attacks.prompts import cost, facts, identity, prompts_of, recalls, run
from duet.stages.attacks.prompts import scores as of_recall
from duet.stages.attacks.texts import LETTERS
from duet.stages.exam.exam import Exam
from duet.stages.metrics import text as metrics
from duet.stages.metrics.uncertainty import Score
from duet.stages.questions.prompts import Prompt

__all__ = ["cost", "facts", "identity", "picked", "proof", "recalls", "run", "scores"]
# "C", "C) the dog", "(C)", "**C**", "Answer: C", "The correct answer is C."; not the article of "A dog."
PICKS = re.compile(
    r"^\W*(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:(?:answer|option|choice)(?:\s+is)?\W*)?(?-i:([A-Z]))(?:[).:,*]|\s*$)",
    re.IGNORECASE,
)


def scores(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
    """Recall, and `picked`."""
    prompts = prompts_of(exam, kind, name, "")
    picks = [picked(prompts[variant], answers[task(kind, variant, name)]) for variant in prompts]
    return of_recall(answers, exam, kind, name) | of_variants(exam, kind, name, picks, "picked")


def picked(prompts: Sequence[Prompt], texts: Sequence[str]) -> np.ndarray:
    """Share of questions where the answer names the letter of the right choice, or recalls the right choice more than any
    other does. One in as many as there are choices is chance.

    1 or 0 per question.
    """
    return np.array([float(_picks(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)])


def _picks(prompt: Prompt, text: str) -> bool:
    right = prompt.choices.index(prompt.query.answer or "")
    letter = PICKS.match(text)
    if letter and f"{letter[1]})" in prompt.question:
        return LETTERS.index(letter[1]) == right
    recall = metrics.rouge_l(prompt.choices, [text] * len(prompt.choices))[0]
    return bool(recall[right] > np.delete(recall, right).max())


def proof(kind: str, evidence: Evidence) -> dict[str, Any]:
    """Base picks the right choice more often than chance does."""
    score = evidence.models["base"][f"attack.{kind}.forget.picked"]
    prompts = prompts_of(evidence.exam, kind, "forget", "")
    chance = sum(1 / len(rows[0].choices) for rows in prompts.values()) / len(prompts)
    text = f"base picks the right answer in {points(score)} of 100 questions, by chance it would in {100 * chance:.1f}"
    if score.ci95[0] > chance:
        return said(True, "base", text)
    return said(False, "base", f"base does not choose better than chance on this model. {text}")
