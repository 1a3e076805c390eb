"""Which attacks are made: those that the settings name and the data allow, in the order of the table."""

from __future__ import annotations

from duet.cache.errors import UserError
from duet.stages.exam.exam import Exam
from duet.stages.questions.queries import Query
from duet.stages.settings.attacks import ALL, ATTACKS

# What an attack may need beside the attacked questions: what the error says where it is missing, and the hint.
MISSING = {
    "a translation": (
        "no query set translates one that is attacked.",
        "Give a set under evaluate.sets `translates: forget`.",
    ),
    "kept questions": (
        "there are no questions to be kept.",
        "Name some under data.retain or evaluate.sets.",
    ),
}


def chosen(exam: Exam) -> tuple[tuple[str, ...], dict[str, str]]:
    """The attacks that are made, in the order of ATTACKS, and of those that `all` leaves out, why.

    UserError where an attack that is named cannot be made.
    """
    wanted = exam.settings.attacks
    missing = _missing(exam)
    if wanted == ALL:
        return tuple(kind for kind in ATTACKS if kind not in missing), {k: f"{w} {h}" for k, (w, h) in missing.items()}
    for kind in wanted:
        if kind in missing:
            raise UserError(f"evaluate.attacks: {kind}: {missing[kind][0]}", missing[kind][1])
    return tuple(kind for kind in ATTACKS if kind in wanted), {}


def prompt_kinds(exam: Exam) -> list[str]:
    """Those of the attacks that are made of prompts."""
    return [kind for kind in chosen(exam)[0] if ATTACKS[kind].made_of == "prompts"]


def kept_queries(exam: Exam) -> list[Query]:
    """Answered questions of the sets to be kept, which lend examples and wrong choices."""
    return [q for s in exam.judged.values() if s.expect == "kept" for q in s.queries if q.answer]


def translations(exam: Exam, name: str) -> list[str]:
    """The sets whose questions are those of the set `name` in another language."""
    return [other for other, query_set in exam.sets.items() if query_set.translates == name]


def _missing(exam: Exam) -> dict[str, tuple[str, str]]:
    """Attacks that this exam's data do not allow: what is missing, and a hint."""
    there = {
        "a translation": any(translations(exam, name) for name in exam.attacked),
        "kept questions": bool(kept_queries(exam)),
    }
    return {
        attack.name: (lack, hint)
        for need, (lack, hint) in MISSING.items()
        for attack in ATTACKS.values()
        if attack.needs == need and not there[need]
    }
