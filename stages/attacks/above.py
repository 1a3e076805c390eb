"""How far an attack lifts a model above the control, the model that never knew, as a share of how far it lifts base.

Pure functions of answers, in distinctive recall: ROUGE-L gives points to the form of an answer, which the control has too.
Base, model and control are compared under the same attack on the same questions. An attack with several texts counts twice,
by the mean over them and by the worst per question; of begun answers and of relearning each number of tokens or steps is a
case of its own, since some give more away than others.

Shapes: N questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet.stages.attacks.chosen import chosen
from duet.stages.attacks.kinds import file_of
from duet.stages.attacks.names import CONTROL
from duet.stages.attacks.parts import MEAN, WORST_TEXT, Answers, mean_of_variants, worst_of_variants
from duet.stages.exam.exam import Exam, Subject, references_of
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score, linearised_ratio, score, upper_end
from duet.stages.settings.attacks import ATTACKS


@dataclass(frozen=True)
class Above:
    """One case of an attack on one set: what it brings back above the control."""

    kind: str
    set: str
    case: str
    share: Score  # (model - control) / (base - control)
    model: float
    base: float
    control: float
    none_above: bool = False  # on no question does the model have more than the control

    @property
    def is_average(self) -> bool:
        """Whether this is what an attacker gets who does not pick the best text for each question."""
        return self.case != WORST_TEXT

    @property
    def upper_end(self) -> float:
        """Of the interval, see `uncertainty.upper_end`."""
        return upper_end(self.share, self.none_above)

    def in_words(self) -> str:
        """`forget: prefill attack, tokens_1: 13.0 points, base 100.0, control 7.0: 6.5 % [0.0, 21.0] of ...`."""
        low, high = (100 * end for end in self.share.ci95)
        values = f"{100 * self.model:.1f} points, base {100 * self.base:.1f}, control {100 * self.control:.1f}"
        share = f"{100 * self.share.value:.1f} % [{low:.1f}, {high:.1f}] of what base has above the control"
        if self.upper_end > self.share.ci95[1]:
            which = "that agree" if low == high else "without one above the control"
            count = len(set(self.share.clusters))
            share += f"; {count} questions {which} leave up to {100 * self.upper_end:.1f} % open"
        return f"{self.set}: {self.kind} attack, {self.case}: {values}: {share}"

    def as_json(self) -> dict[str, Any]:
        return {**self.share.as_json(), "model": self.model, "base": self.base, "control": self.control}


def above_control(
    subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Answers]
) -> dict[str, list[Above]] | None:
    """Per model all cases in which base is above the control, interval above 0; None without a control."""
    if CONTROL not in answers:
        return None
    found: dict[str, list[Above]] = {subject.name: [] for subject in subjects}
    for kind in chosen(exam)[0]:
        for name in exam.attacked:
            cases = {model: cases_of(answers[model], exam, kind, name) for model in (*found, CONTROL)}
            for subject in subjects:
                for case, control_N in cases[CONTROL].items():
                    three = (cases[subject.name][case], cases[subject.base][case], control_N)
                    found[subject.name] += _above(kind, name, case, three, exam)
    return found


def cases_of(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """One model's distinctive recall by case, float64 [N]; NaN where a question does not count."""
    variants = file_of(kind).facts(answers, exam, kind, name)
    if not variants or ATTACKS[kind].apart:
        return variants
    values_AN = np.stack(list(variants.values()))
    counts_N = ~np.isnan(values_AN).all(axis=0)
    found = {case: np.full(values_AN.shape[1], np.nan) for case in (MEAN, WORST_TEXT)}
    if counts_N.any():
        found[MEAN][counts_N] = mean_of_variants(values_AN[:, counts_N])
        found[WORST_TEXT][counts_N] = worst_of_variants(values_AN[:, counts_N])
    return found


def _above(
    kind: str, name: str, case: str, three: tuple[np.ndarray, np.ndarray, np.ndarray], exam: Exam
) -> list[Above]:
    """One case of one model, or nothing where base is not above the control; `three` are model, base and control, [N] each."""
    counts = np.flatnonzero(~np.isnan(np.stack(three)).any(axis=0))
    if not len(counts):
        return []
    model_N, base_N, control_N = (values[counts] for values in three)
    references = references_of(exam.sets[name])
    clusters, seed = [references[i] for i in counts], exam.settings.seed
    if score(base_N - control_N, clusters, seed).ci95[0] <= 0:
        return []
    share = score(share_above(model_N, base_N, control_N), clusters, seed)
    means = (float(values.mean()) for values in (model_N, base_N, control_N))
    return [Above(kind, name, case, share, *means, none_above=not (model_N > control_N).any())]


def share_above(model_N: np.ndarray, base_N: np.ndarray, control_N: np.ndarray) -> np.ndarray:
    """Per question, values whose mean is (model - control) / (base - control), and whose spread is that of this ratio."""
    return linearised_ratio(base_N - control_N, model_N - control_N)


METRICS = (
    Metric(
        "above_control",
        share_above,
        "What an attack brings back of a model above the control (evaluate.control_model), as a share of what it brings back "
        "of base above it: (model - control) / (base - control), all under the same attack, in distinctive recall, with the "
        "interval of the linearised ratio. 0 is a model that never knew, 1 is base. Left out where base is not above the "
        "control, interval above 0.",
        better="low",
        range="0 to 1, and beyond by chance",
    ),
)
