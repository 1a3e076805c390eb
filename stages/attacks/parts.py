"""What the files of the attacks share: which functions each has, what asking costs, scores of variants, words of a proof.

Shapes: A variants, N questions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from duet.cache.watch import Watch
from duet.stages.attacks.names import WORST, title
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, Subject, references_of
from duet.stages.exam.session import ModelSession
from duet.stages.metrics import text as metrics
from duet.stages.metrics.uncertainty import Score, score

T = TypeVar("T")
Answers = Mapping[str, Any]  # what one model said: by task, or of attacks on whole sets by `attack.<kind>.<set>`
Models = Mapping[str, Mapping[str, Score]]  # by model and metric id
PLAIN = f"forget.{HEADLINE}"
MEAN, WORST_TEXT = "mean over its texts", "worst text per question"  # as reasons call the two scores of an attack
# Share of base's recall that must come back from a teacher, or be left in another form of asking; and what the mean reciprocal
# rank of a lens must reach.
MIN_LEFT = 0.5


@dataclass(frozen=True)
class Cost:
    """What an attack takes, over all models that it is tried on."""

    prompts: int = 0
    prompt_tokens: int = 0  # computed once where a prompt is asked many times
    answer_tokens: int = 0  # at most
    training_steps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Evidence:
    """What a proof that an attack works may look at."""

    exam: Exam
    models: Models
    teachers: Sequence[str]  # the models behind a prefix
    relearning: Mapping[str, Mapping[str, Any]]  # as in results.json


class Kind(Protocol):
    """The functions in the file of an attack; `kind` is its name, `name` a set that is attacked."""

    def run(self, session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, Any]:
        """Everything that the attack finds on all attacked sets, as it is kept on disk."""
        ...

    def identity(self, session: ModelSession, subject: Subject, kind: str) -> str:
        """Hash of everything that decides what `run` finds."""
        ...

    def cost(self, session: ModelSession, subject: Subject, kind: str) -> Cost:
        """What `run` takes."""
        ...

    def recalls(self, answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
        """ROUGE-L recall of each variant by its title, float64 [N], NaN where a question does not count; or empty."""
        ...

    def facts(self, answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
        """The same in distinctive recall; of sampling too, by sample. This decides the verdict."""
        ...

    def scores(self, answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
        """One model's scores under the attack, by metric id."""
        ...


class ProvedKind(Kind, Protocol):
    """An attack that can be shown to work in its own way."""

    def proof(self, kind: str, evidence: Evidence) -> dict[str, Any]:
        """Whether it works, on which model, and the numbers in words: see `said`."""
        ...


def asked(session: ModelSession, subject: Subject, tasks: Collection[str], times: int = 1, answers: int = 1) -> Cost:
    """The cost of asking all prompts of these tasks `times` times, each time with `answers` answers per prompt."""
    prompts = [ids for task in tasks for ids in session.prompts(subject, task)]
    count = len(prompts) * answers * times
    return Cost(count, sum(map(len, prompts)) * times, count * session.exam.settings.max_new_tokens)


def answers_of(session: ModelSession, names: Collection[str]) -> dict[str, list[list[int]]]:
    """The reference answers that decide what an attack asks or what its answers are compared with."""
    return {name: session.answers(name) for name in names}


def drawn(items: Sequence[T], count: int, seed: int) -> list[T]:
    """At most `count` of them, by the seed: the same questions for all models."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:count].tolist()]


def identity_on_sets(session: ModelSession, subject: Subject, kind: str, deciding: object) -> str:
    """The identity of an attack that asks the attacked sets as they are, decided by `deciding` beside them."""
    tasks = list(session.exam.attacked)
    return session.identity(subject, tasks=tasks, more=[kind, deciding, answers_of(session, tasks)])


def on_sets(
    session: ModelSession, subject: Subject, kind: str, watch: Watch, attack: Callable[[str], Any]
) -> dict[str, Any]:
    """`attack(name)` of every attacked set, as `attack.<kind>.<set>`."""
    found = {}
    for name in session.exam.attacked:
        watch.pause(f"{subject.name}, {kind},")
        found[f"attack.{kind}.{name}"] = attack(name)
    return found


def mean_of_variants(values_AN: np.ndarray) -> np.ndarray:
    """Per question the mean over the attack's variants.

    NaN where a question does not count for a variant; no question is NaN for all.
    """
    return np.nanmean(values_AN, axis=0)


def worst_of_variants(values_AN: np.ndarray) -> np.ndarray:
    """Per question the highest over the attack's variants: what a persistent attacker gets.

    NaN as above.
    """
    return np.nanmax(values_AN, axis=0)


def of_variants(
    exam: Exam,
    kind: str,
    name: str,
    values: Sequence[np.ndarray],
    metric: str = HEADLINE,
    tried: Sequence[np.ndarray] | None = None,
) -> dict[str, Score]:
    """Scores `attack.<kind>.<set>.<metric>` and `attack.<kind>_worst.<set>.<metric>` of the variants' values, [N] each.

    Per question the mean, and the worst (highest): what an attacker gets by chance, and by persistence. The worst is over
    `tried` where that is given. Questions that count for no variant are left out.
    """
    if not values:
        return {}
    values_AN, tried_AN, references = np.stack(values), np.stack(tried or values), references_of(exam.sets[name])
    counts = np.flatnonzero(~np.isnan(values_AN).all(axis=0))
    clusters = [references[i] for i in counts]
    if not clusters:
        return {}
    found = {"": mean_of_variants(values_AN[:, counts]), WORST: worst_of_variants(tried_AN[:, counts])}
    return {
        f"attack.{kind}{suffix}.{name}.{metric}": score(items, clusters=clusters, seed=exam.settings.seed)
        for suffix, items in found.items()
    }


def recalls(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """ROUGE-L recall by variant of an attack that keeps a set's answers by variant, float64 [N]."""
    references, outputs = references_of(exam.sets[name]), answers[f"attack.{kind}.{name}"]
    return {title(variant, name): metrics.rouge_l(references, texts)[0] for variant, texts in outputs.items()}


def facts(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """The same in distinctive recall."""
    words, outputs = exam.distinctive[name], answers[f"attack.{kind}.{name}"]
    return {title(variant, name): metrics.distinctive_recall(words, texts) for variant, texts in outputs.items()}


def scores(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
    """Scores of both: see `of_variants`."""
    return of_variants(exam, kind, name, list(recalls(answers, exam, kind, name).values())) | of_variants(
        exam, kind, name, list(facts(answers, exam, kind, name).values()), DISTINCTIVE
    )


def said(works: bool, on: str | None, text: str) -> dict[str, Any]:
    """Whether an attack works, as in results.json."""
    return {"works": works, "on": on, "text": text}


def points(score: Score) -> str:
    """`93.3 [78.6, 100.0]`."""
    return f"{100 * score.value:.1f} [{100 * score.ci95[0]:.1f}, {100 * score.ci95[1]:.1f}]"
