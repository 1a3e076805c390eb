"""Is each attack shown to work? Asked of models that surely know: base, and the teacher, which is base behind a prefix.

An attack that brings back nothing even from them says nothing about a student that withstands it, and the report has to say so.
Pure functions of scores on the forget set. An attack's row of the table says which proof is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duet.stages.attacks import quantize
from duet.stages.attacks.chosen import chosen
from duet.stages.attacks.kinds import OWN_FILES
from duet.stages.attacks.parts import MIN_LEFT, PLAIN, Evidence, Models, points, said
from duet.stages.exam.exam import Exam, Subject
from duet.stages.settings.attacks import ATTACKS


def attacks_work(
    subjects: Sequence[Subject],
    exam: Exam,
    models: Models,
    relearning: Mapping[str, Mapping[str, Any]],
    untouched: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Per attack whether it works, on which model, and the numbers in words. Empty where base was not asked.

    One that left base `untouched` does not.
    """
    if "base" not in models:
        return {}
    evidence = Evidence(exam, models, [subject.name for subject in subjects if subject.prefix], relearning)
    found = {}
    for kind in chosen(exam)[0]:
        if kind in untouched:
            found[kind] = said(False, "base", f"base's {quantize.UNTOUCHED}: rounding left it as it is")
            continue
        general = {"undoing": undoing, "still answering": still_answering}.get(ATTACKS[kind].proof)
        found[kind] = (general or OWN_FILES[kind].proof)(kind, evidence)
    return found


def undoing(kind: str, evidence: Evidence) -> dict[str, Any]:
    """From the teacher, the worst variant per question brings back half of base's recall or more, and more than the plain
    question, interval above interval. Less may only be common words in longer answers.
    """
    models, teachers = evidence.models, evidence.teachers
    if not teachers:
        return said(False, None, "no model with a prefix was asked, so it is not known whether it would undo one")
    failed = []
    for teacher in teachers:
        plain, worst = models[teacher][PLAIN], models[teacher].get(f"attack.{kind}_worst.{PLAIN}")
        if worst is None:
            return said(False, teacher, "no question counted")
        text = f"{teacher}: recall {points(plain)} without it, {points(worst)} with the worst variant per question"
        if worst.ci95[0] > plain.ci95[1] and worst.value >= MIN_LEFT * models["base"][PLAIN].value:
            return said(True, teacher, text)
        failed.append(text)
    return said(False, teachers[0], f"it does not undo the prefix on this model. {'; '.join(failed)}")


def still_answering(kind: str, evidence: Evidence) -> dict[str, Any]:
    """Asked in this form, base still answers: if a student does not, the form is not the reason."""
    base = evidence.models["base"]
    plain, asked = base[PLAIN], base.get(f"attack.{kind}_worst.{PLAIN}")
    if asked is None:
        return said(False, "base", "no question counted")
    text = f"base: recall {points(plain)} without it, {points(asked)} with the best-answered variant per question"
    if asked.value >= MIN_LEFT * plain.value > 0:
        return said(True, "base", text)
    return said(False, "base", f"not even base answers in this form, so it says nothing on this model. {text}")
