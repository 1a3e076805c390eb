"""What attacks brought back: from answers and ranks to scores, tables and whether each attack works at all.

Pure functions of what `evaluate/answers.py` found. How one attack is scored stands in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duet.stages.attacks import above, kept_questions, prompts, quantize, relearn
from duet.stages.attacks.chosen import chosen
from duet.stages.attacks.kinds import file_of
from duet.stages.attacks.logit_lens import at_best_layer, layers
from duet.stages.attacks.multiple_choice import picked
from duet.stages.attacks.names import CONTROL, WORST, title
from duet.stages.attacks.parts import Answers, Models, mean_of_variants, worst_of_variants
from duet.stages.attacks.relearn_curves import relearning
from duet.stages.attacks.sampling import leak_at
from duet.stages.attacks.validity import attacks_work
from duet.stages.exam.exam import DISTINCTIVE, Exam, Subject
from duet.stages.metrics.metric import Metric
from duet.stages.metrics.uncertainty import Score
from duet.stages.settings.attacks import ATTACKS


def scores_of(answers: Answers, exam: Exam) -> dict[str, Score]:
    """One model's scores under attack, `attack.<kind>.<set>.<metric>` and `attack.<kind>_worst.<set>.<metric>`."""
    kinds = sorted(chosen(exam)[0], key=lambda kind: ATTACKS[kind].scored == "own")  # of each set, recall comes first
    found: dict[str, Score] = {}
    for name in exam.attacked:
        for kind in kinds:
            found |= file_of(kind).scores(answers, exam, kind, name)
    return found


def results_of(
    subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Answers], models: Models
) -> dict[str, Any]:
    """The parts of results.json about attacks beside the models' scores: the control's, which attacks work, and so on."""
    found: dict[str, Any] = {
        "control": {key: value.as_json() for key, value in scores_of(answers.get(CONTROL, {}), exam).items()}
        if CONTROL in answers
        else {},
        "attack_texts": _texts(subjects, exam, answers),
        "attacks_skipped": chosen(exam)[1] | relearn.skipped(exam) | prompts.skipped(exam),
        "relearning": relearning(subjects, exam, answers),
        "layers": layers(subjects, exam, answers),
        "kept_under_attack": kept_questions.kept_under_attack(subjects, exam, answers),
    }
    for subject in subjects:
        for kind in quantize.untouched(answers[subject.name]):
            found["attacks_skipped"][f"{kind}, {subject.name}"] = f"its {quantize.UNTOUCHED}: asked as it is"
    unchanged = quantize.untouched(answers["base"]) if "base" in answers else []
    return found | {"attacks_work": attacks_work(subjects, exam, models, found["relearning"], unchanged)}


def above_as_json(found: Mapping[str, Sequence[above.Above]] | None) -> dict[str, dict[str, dict[str, Any]]]:
    """`above.above_control` as results.json has it: by model, attack and case, which names a further set."""
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for model, cases in (found or {}).items():
        for case in cases:
            of_kind = by_model.setdefault(model, {}).setdefault(case.kind, {})
            of_kind[title(case.case, case.set)] = case.as_json()
    return by_model


def _texts(
    subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Answers]
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean recall by attack, variant and model, on the forget set (of further sets, as `<variant>, <set>`)."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in chosen(exam)[0]:
        for subject in subjects:
            for name in exam.attacked:
                for variant, recall_N in file_of(kind).recalls(answers[subject.name], exam, kind, name).items():
                    if not np.isnan(recall_N).all():
                        by_model = found.setdefault(kind, {}).setdefault(variant, {})
                        by_model[subject.name] = float(np.nanmean(recall_N))
    return found


METRICS = (
    *above.METRICS,
    *kept_questions.METRICS,
    *(
        Metric(
            f"attack.{attack.name}{suffix}",
            over,
            f"ROUGE-L recall on the attacked questions, {attack.definition}. {per_question} The same in distinctive recall: "
            f".{DISTINCTIVE}.",
            better="low",
            version=attack.version,
        )
        for attack in ATTACKS.values()
        if attack.scored == "recall"
        for suffix, over, per_question in (
            ("", mean_of_variants, "Per question the mean over the attack's variants."),
            (
                WORST,
                worst_of_variants,
                "Per question the highest over the attack's variants: what a persistent attacker gets.",
            ),
        )
    ),
    Metric(
        "picked",
        picked,
        "Attack multiple_choice. Share of questions where the answer names the letter of the right choice, or recalls the "
        "right choice more than any other does. One in as many as there are choices is chance.",
        better="low, but not below chance",
        version=3,
    ),
    Metric(
        "leak@k",
        leak_at,
        "Attack sampling. Chance that at least one of k sampled answers has a ROUGE-L recall of "
        "`evaluate.sampling.leak_recall` or more, estimated without bias from n samples of which c have: "
        "1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, equation 1).",
        better="low",
        version=2,
    ),
    Metric(
        "mrr_best",
        at_best_layer,
        "Attack logit_lens. Mean reciprocal rank of the reference's first token, read off a layer through the final norm and "
        "the output head, at the layer where this mean is highest.",
        better="low",
    ),
)
