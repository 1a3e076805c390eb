"""The attack relearn: copies are fine-tuned on a few pairs; do they then answer the other questions that were forgotten?

What was erased would have to be taught again, question by question; what was only hidden comes back after a few steps on other
questions, or on harmless text (Hu et al. 2024, arXiv 2406.13356). How strong the attack is hangs on the learning rate, so that
several are tried, and the one that brings back most counts. `relearn_sets.py` says what copies are trained on, `teaching.py`
how, `relearn_curves.py` what came back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from duet.cache.watch import Watch
from duet.stages.attacks.chosen import chosen
from duet.stages.attacks.parts import Answers, Cost, Evidence, answers_of, of_variants, on_sets, said
from duet.stages.attacks.relearn_curves import Curve, curve_of
from duet.stages.attacks.relearn_sets import Draw, RelearnSet, relearn_sets
from duet.stages.attacks.teaching import LORA_LR_FACTOR, Teaching, add_adapters
from duet.stages.exam.exam import DISTINCTIVE, HEADLINE, Exam, Subject
from duet.stages.exam.session import ModelSession
from duet.stages.metrics.uncertainty import MIN_ANSWERS, Score
from duet.stages.models.loading import load_model


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, dict[str, Any]]:
    """Per attacked set, the answers before any step, and by relearn set and learning rate those after each number of steps."""
    return on_sets(session, subject, kind, watch, lambda name: relearned(session, subject, name, watch))


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the answers, of the pairs that are trained on too."""
    exam = session.exam
    sets = [[asdict(one) for one in relearn_sets(exam, name)[0]] for name in exam.attacked]
    deciding = [exam.settings.relearn.model_dump(mode="json"), exam.settings.seed, sets]
    return session.identity(subject, tasks=list(exam.sets), more=[kind, deciding, answers_of(session, exam.sets)])


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    """Of all relearn sets at all rates: their training, and their questions after each number of steps; before any step, all
    questions once.
    """
    exam, total = session.exam, Cost()
    settings, most = exam.settings.relearn, exam.settings.max_new_tokens
    times = len(settings.steps) * len(settings.lrs)
    for name in exam.attacked:
        prompts = session.prompts(subject, name)
        total += Cost(len(prompts), sum(map(len, prompts)), len(prompts) * most)
        for draw in (draw for one in relearn_sets(exam, name)[0] for draw in one.draws):
            count, tokens = len(draw.asked) * times, sum(len(prompts[i]) for i in draw.asked) * times
            total += Cost(count, tokens, count * most, settings.steps[-1] * len(settings.lrs))
    return total


def recalls(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """ROUGE-L recall after the last step by relearn set, float64 [N]; NaN for the questions that it does not ask."""
    sets = relearn_sets(exam, name)[0]
    return {one.name: _spread(exam, name, one, _last(curve_of(answers, name, one), HEADLINE)) for one in sets}


def facts(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """Distinctive recall by relearn set and number of steps, at the rate that brings back most on average, float64 [N].

    NaN for the questions that the set does not ask.
    """
    found = {}
    for one in relearn_sets(exam, name)[0]:
        strongest_SN = curve_of(answers, name, one).strongest(DISTINCTIVE)[0]
        for steps, values_N in zip(exam.settings.relearn.steps, strongest_SN[1:], strict=True):
            found[f"{one.name}, {steps} steps"] = _spread(exam, name, one, values_N)
    return found


def scores(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
    """Recall, and distinctive recall, after the last step at the rate that brings back most on average.

    The worst is over all rates and numbers of steps, since an attacker stops where it is best.
    """
    sets, found = relearn_sets(exam, name)[0], {}
    curves = [(one, curve_of(answers, name, one)) for one in sets]
    for metric in (HEADLINE, DISTINCTIVE):
        last = [_spread(exam, name, one, _last(curve, metric)) for one, curve in curves]
        tried = [
            _spread(exam, name, one, values_N)
            for one, curve in curves
            for values_N in curve.by_metric[metric][:, 1:].reshape(-1, len(one.asked))
        ]
        found |= of_variants(exam, kind, name, last, metric, tried=tried)
    return found


def _last(curve: Curve, metric: str) -> np.ndarray:
    return curve.strongest(metric)[0][-1]


def _spread(exam: Exam, name: str, one: RelearnSet, values: np.ndarray) -> np.ndarray:
    """Scores of the questions that are asked among all of the set, NaN for the others."""
    spread = np.full(len(exam.sets[name].queries), np.nan)
    spread[list(one.asked)] = values
    return spread


def proof(kind: str, evidence: Evidence) -> dict[str, Any]:
    """Behind the prefix, base's own weights recover half of what they know after some steps on other questions."""
    failed = []
    for teacher in evidence.teachers:
        for name, found in evidence.relearning.get(teacher, {}).items():
            before, best = (100 * recall for recall in (found["recall"][0], max(found["recall"])))
            text = f"{teacher}, {name}: recall {before:.1f} before, {best:.1f} at best"
            if (count := found["different_answers"]) < MIN_ANSWERS:
                failed.append(f"{text}, of {found['n']} questions with {count} different answers, too few to say")
            elif found["steps_to_half"]:
                return said(True, teacher, f"{text}; half of base's after {found['steps_to_half']} steps")
            else:
                failed.append(text)
    if not failed:
        return said(False, None, "no model with a prefix was trained, so it is not known whether it would recover")
    text = f"half of base's recall does not come back on this model. {'; '.join(failed)}"
    return said(False, evidence.teachers[0], text)


def skipped(exam: Exam) -> dict[str, str]:
    """The relearn sets that the data do not allow, if the attack is made, and why."""
    names = exam.attacked if "relearn" in chosen(exam)[0] else ()
    return {f"relearn, {title}": why for name in names for title, why in relearn_sets(exam, name)[1].items()}


def relearned(session: ModelSession, subject: Subject, name: str, watch: Watch) -> dict[str, Any]:
    """The greedy answers to a set's questions `before` any step, and those of the copies `after` it: by relearn set and
    learning rate, of each draw after each number of steps, of the questions that the draw asks, in its order.

    Asked and trained as the subject is asked: behind its prefix, where it has one.
    """
    settings, sets = session.exam.settings.relearn, relearn_sets(session.exam, name)[0]
    before = _said_by(session, _copy(session), session.prompts(subject, name))
    after: dict[str, dict[str, list[list[list[str]]]]] = {
        one.name: {str(lr): [] for lr in settings.lrs} for one in sets
    }
    copies = [(one, lr, draw) for one in sets for lr in settings.lrs for draw in one.draws]
    for number, (one, lr, draw) in enumerate(copies):
        asked = [session.prompts(subject, name)[i] for i in draw.asked]
        teach = _teaching(session, subject, one, draw, lr)
        after[one.name][str(lr)].append(_answers_after(session, teach, asked, watch))
        watch.on_progress(f"{subject.name}, relearn", number + 1, len(copies))
    return {"before": before, "after": after}


def _teaching(session: ModelSession, subject: Subject, one: RelearnSet, draw: Draw, lr: float) -> Teaching:
    settings, seed = session.exam.settings.relearn, session.exam.settings.seed
    model = _copy(session)
    if one.lora_rank:
        model, lr = add_adapters(model, one.lora_rank, seed), LORA_LR_FACTOR * lr
    prompts, full_answers = session.prompts(subject, one.source), session.full_answers(one.source)
    return Teaching(model, [(prompts[i], full_answers[i]) for i in draw.pairs], lr, settings.batch_size, seed)


def _answers_after(session: ModelSession, teach: Teaching, asked: list[list[int]], watch: Watch) -> list[list[str]]:
    found = []
    for steps in session.exam.settings.relearn.steps:
        while teach.done < steps:
            watch.pause("relearning")
            teach.step()
        found.append(_said_by(session, teach.model, asked))
    return found


def _copy(session: ModelSession) -> Any:
    spec = session.spec()
    return load_model(spec.model_dir, "float32", spec.trust_remote_code).to(spec.device)


def _said_by(session: ModelSession, model: Any, prompts: Sequence[list[int]]) -> list[str]:
    from duet.stages.engines.transformers_engine import TransformersEngine

    engine = TransformersEngine(session.spec(), model)  # a new one: the last one's cache of prompts is of other weights
    return [session.text(ids) for ids in engine.generate(list(prompts), session.exam.settings.max_new_tokens)]
