"""All attacks on a model: what is kept on disk, and what they will cost.

One file per subject and attack under the run's `answers/`: an interrupted evaluation goes on with the next, and a further
attack asks nothing again. Attacks that only ask run on the session's engine; those on weights load the model again, with
transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duet.cache.watch import Watch
from duet.stages.attacks import kept_questions
from duet.stages.attacks.chosen import chosen
from duet.stages.attacks.kinds import file_of
from duet.stages.attacks.names import CONTROL, NO_ATTACK, kept_as
from duet.stages.attacks.parts import Cost, asked
from duet.stages.exam.exam import Subject, stem_of
from duet.stages.exam.kept import recalled
from duet.stages.exam.session import ModelSession
from duet.stages.settings.attacks import ATTACKS


def answered(session: ModelSession, subject: Subject, answers_dir: Path, watch: Watch) -> dict[str, Any]:
    """All that is found by asking: the sets as they are, then under the attacks that only ask."""
    sets = _as_they_are(session, subject)
    found: dict[str, Any] = _kept(
        answers_dir, subject, session.identity(subject, tasks=sets), lambda: session.ask(subject, watch, sets)
    )
    for kind in chosen(session.exam)[0]:
        if ATTACKS[kind].made_of != "weights":
            found |= _attacked(session, subject, kind, answers_dir, watch)
    for kind in kept_questions.asked_kinds(session, subject):
        identity = kept_questions.identity(session, subject, kind)
        ask = functools.partial(kept_questions.run, session, subject, kind, watch)
        found |= _kept(answers_dir / kept_as(kind), subject, identity, ask)
    return found


def weights_attacked(session: ModelSession, subject: Subject, answers_dir: Path, watch: Watch) -> dict[str, Any]:
    """What the attacks on weights find."""
    found: dict[str, Any] = {}
    for kind in chosen(session.exam)[0]:
        if ATTACKS[kind].made_of == "weights":
            found |= _attacked(session, subject, kind, answers_dir, watch)
    return found


def costs(session: ModelSession, subject: Subject) -> dict[str, Cost]:
    """What one subject takes: the sets as they are, each attack, and the questions to be kept behind its texts."""
    found = {NO_ATTACK: asked(session, subject, _as_they_are(session, subject))}
    found |= {kind: file_of(kind).cost(session, subject, kind) for kind in chosen(session.exam)[0]}
    kept = kept_questions.asked_kinds(session, subject)
    return found | {kept_as(kind): kept_questions.cost(session, subject, kind) for kind in kept}


def _attacked(session: ModelSession, subject: Subject, kind: str, answers_dir: Path, watch: Watch) -> dict[str, Any]:
    attack = file_of(kind)
    identity = attack.identity(session, subject, kind)
    return _kept(answers_dir / kind, subject, identity, lambda: attack.run(session, subject, kind, watch))


def _kept(folder: Path, subject: Subject, identity: str, ask: Callable[[], Any]) -> Any:
    """What is on disk under this identity, else what `ask()` finds."""
    folder.mkdir(parents=True, exist_ok=True)
    return recalled(folder / f"{stem_of(subject.name)}.json", identity, ask)


def _as_they_are(session: ModelSession, subject: Subject) -> list[str]:
    """The tasks of no attack; of the control, which attacks alone are measured against, those of the attacked sets."""
    tasks = [task for task in session.tasks(subject) if not task.startswith("attack.")]
    return [task for task in tasks if task in session.exam.attacked] if subject.name == CONTROL else tasks
