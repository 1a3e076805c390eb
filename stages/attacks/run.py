"""All attacks on all models: who is attacked how, what is kept on disk, and what it will cost.

One file per subject and attack under the run's `answers/`: an interrupted evaluation goes on with the next, and a further
attack asks nothing again. Attacks that only ask run on the examinee's engine; those on weights load the model anew, with
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duet.cache.watch import Watch
from duet.stages.attacks import logit_lens as lens
from duet.stages.attacks import prompts as attacks
from duet.stages.attacks import quantize, relearn, sampling
from duet.stages.exam.exam import Exam, Subject, sets_as_tasks, stem_of
from duet.stages.exam.kept import recalled
from duet.stages.exam.session import ModelSession
from duet.stages.settings.attacks import PROMPT_ATTACKS, QUANTIZE_ATTACKS

CONTROL = "control"  # the name of the model that never knew
NO_ATTACK = "no attack"


@dataclass(frozen=True)
class How:
    """Where answers are kept, and who is told."""

    answers_dir: Path
    watch: Watch

    def kept(self, subject: Subject, kind: str, identity: str, ask: Callable[[], Any]) -> Any:
        """What is on disk under this identity, else what `ask()` finds."""
        folder = self.answers_dir / kind if kind else self.answers_dir
        folder.mkdir(parents=True, exist_ok=True)
        return recalled(folder / f"{stem_of(subject.name)}.json", identity, ask)


@dataclass(frozen=True)
class Cost:
    """What an attack takes, over all models that it is tried on."""

    prompts: int = 0
    prompt_tokens: int = 0  # computed once where a prompt is asked many times
    answer_tokens: int = 0  # at most
    training_steps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def answered(session: ModelSession, subject: Subject, how: How) -> dict[str, Any]:
    """All that is found by asking: the sets as they are, the attacks that are made of prompts, and sampling."""
    found: dict[str, Any] = {}
    for kind in ("", *(k for k in attacks.chosen(session.exam)[0] if k in PROMPT_ATTACKS)):
        tasks = _tasks(session, subject, kind)
        more = [kind, _answers(session)] if kind else None
        found |= how.kept(
            subject,
            kind,
            session.identity(subject, tasks=tasks, more=more),
            lambda tasks=tasks: session.ask(subject, how.watch, tasks),
        )
    if "sampling" in attacks.chosen(session.exam)[0]:
        found |= _on_sets(session, subject, "sampling", how, lambda name: sampling.sampled(
            session, subject, name, how.watch
        ))  # fmt: skip
    return found


def weights_attacked(session: ModelSession, subject: Subject, how: How) -> dict[str, Any]:
    """What the attacks on weights find."""
    made, found = attacks.chosen(session.exam)[0], {}
    for kind in QUANTIZE_ATTACKS:
        if kind in made:
            by_set = _on_sets(session, subject, kind, how, lambda name, kind=kind: quantize.quantized_answers(
                session, subject, kind, name, how.watch
            ))  # fmt: skip
            for name in session.exam.attacked:
                for variant, texts in by_set[f"attack.{kind}.{name}"].items():
                    found[attacks.task(kind, variant, name)] = texts
    if "relearn" in made:
        found |= _relearned(session, subject, how)
    if "logit_lens" in made:
        found |= _on_sets(session, subject, "logit_lens", how, lambda name: lens.ranks_by_layer(
            session, subject, name, how.watch
        ))  # fmt: skip
    return found


def control_attacked(exam: Exam, how: How) -> dict[str, dict[str, Any]]:
    """What the control relearns, under CONTROL; empty where there is none, or relearn is not tried."""
    if exam.control is None or "relearn" not in attacks.chosen(exam)[0]:
        return {}
    session, subject = control_of(exam, exam.control)
    return {CONTROL: _relearned(session, subject, how)}


def cost_of(session: ModelSession, subject: Subject, kind: str) -> Cost:
    """What one subject takes under an attack of this kind."""
    exam = session.exam
    new, attacked = exam.settings.max_new_tokens, list(exam.attacked)

    def asked(tasks: Sequence[str], times: int = 1, answers: int = 1) -> Cost:
        prompts = [ids for task in tasks for ids in session.prompts(subject, task)]
        count = len(prompts) * answers
        return Cost(count * times, sum(map(len, prompts)) * times, count * times * new)

    if kind == NO_ATTACK:
        return asked(_tasks(session, subject, ""))
    if kind == "sampling":
        return asked(attacked, answers=exam.settings.sampling.samples)
    if kind in QUANTIZE_ATTACKS:
        return asked(attacked, times=len(quantize.VARIANTS[kind]))
    if kind == "logit_lens":
        found = asked(attacked)
        return Cost(found.prompts, found.prompt_tokens)
    if kind == "relearn":
        times = len(relearn.steps_of(exam.settings.relearn))
        total = Cost()
        for name in attacked:
            prompts = session.prompts(subject, name)
            for lesson in relearn.relearn_sets(exam, name)[0]:
                count, tokens = len(lesson.asked), sum(len(prompts[i]) for i in lesson.asked)
                total += Cost(count * times, tokens * times, count * times * new, exam.settings.relearn.steps[-1])
        return total
    return asked(_tasks(session, subject, kind))


def _tasks(session: ModelSession, subject: Subject, kind: str) -> list[str]:
    """The tasks of an attack that is made of prompts; of no kind, those of no attack."""
    begins = f"attack.{kind}."
    return [
        task for task in session.tasks(subject) if (task.startswith(begins) if kind else not task.startswith("attack."))
    ]


def _on_sets(
    session: ModelSession, subject: Subject, kind: str, how: How, attack: Callable[[str], Any]
) -> dict[str, Any]:
    """`attack(name)` of every attacked set, as `attack.<kind>.<set>`, or what is kept of it."""
    settings, tasks = session.exam.settings, list(session.exam.attacked)
    deciding = {
        "sampling": [settings.sampling.samples, settings.sampling.temperature, settings.seed],
        "relearn": [settings.relearn.model_dump(mode="json"), settings.seed, [
            [asdict(lesson) for lesson in relearn.relearn_sets(session.exam, name)[0]] for name in tasks
        ]],
        "logit_lens": [],
    }  # fmt: skip
    deciding |= {name: quantize.VARIANTS[name] for name in QUANTIZE_ATTACKS}
    if kind == "relearn":  # what it trains on decides, too
        tasks = list(session.exam.sets)
    identity = session.identity(subject, tasks=tasks, more=[kind, deciding[kind], _answers(session, tasks)])

    def on_all() -> dict[str, Any]:
        found = {}
        for name in session.exam.attacked:
            how.watch.pause(f"{subject.name}, {kind},")
            found[f"attack.{kind}.{name}"] = attack(name)
        return found

    return how.kept(subject, kind, identity, on_all)


def _relearned(session: ModelSession, subject: Subject, how: How) -> dict[str, Any]:
    return _on_sets(session, subject, "relearn", how, lambda name: relearn.relearned(
        session, subject, name, how.watch
    ))  # fmt: skip


def _answers(session: ModelSession, names: Sequence[str] | None = None) -> dict[str, list[list[int]]]:
    """The reference answers that decide what an attack asks or what its answers are compared with."""
    return {name: session.answers(name) for name in (names or session.exam.attacked)}


def control_of(exam: Exam, model_dir: Path) -> tuple[ModelSession, Subject]:
    """The model that never knew, asked the sets as they are."""
    subject = Subject(CONTROL, model_dir, "", "base")
    return ModelSession(model_dir, exam, [(subject, sets_as_tasks(exam, subject))]), subject
