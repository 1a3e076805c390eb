"""DUET against other methods: each tries its grid, the best on the validation part is asked the rest of the questions.

A trial is one method with one learning rate and one value of its constant, in a folder of its own, named after a hash of
everything that decides its weights. No trial is trained twice, and no model is asked twice. Where a method's best is known,
the weights of its others are removed; the numbers stay. DUET's trials are trained by `train_student`, as every student.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet.cache.files import publish_json, read_json, sha256_json
from duet.cache.reader import Rank, Store
from duet.cache.watch import Watch
from duet.stages.compare.methods import METHODS
from duet.stages.compare.train import BaselineJob, TrainingRows, store_order, train_baseline
from duet.stages.evaluate import results as evaluation
from duet.stages.evaluate.answers import answer_all
from duet.stages.exam.exam import Exam, Subject, references_of
from duet.stages.metrics.text import performance_shift, rouge_l
from duet.stages.metrics.uncertainty import compare_sums, weighted_sum
from duet.stages.models.identity import weights_sha256
from duet.stages.settings.compare import CompareSettings
from duet.stages.settings.student import TrainSettings, deciding_settings
from duet.stages.student.job import StudentJob
from duet.stages.student.loop import StepReport
from duet.stages.student.ranks import Processes
from duet.stages.student.targets import Teachers
from duet.stages.student.train import train_student

DUET = "duet"
DONE_NAME, VALIDATION_NAME = "candidate.json", "validation.json"
ANSWERS_TO_CHOOSE = "answers/validation"  # of base, in the comparison's folder


@dataclass(frozen=True)
class Comparison:
    """All that is the same for every method: the data, the settings, the questions and the folder."""

    settings: CompareSettings
    train: TrainSettings  # of DUET's student; all methods share it but for the learning rate
    model_dir: Path  # that all start from
    start_name: str
    folder: Path
    training_rows: TrainingRows
    stores: Mapping[str, Store]
    tokenizer: Any  # of the stores
    validation: Exam
    reported: Exam
    references: Sequence[Subject]  # base first, and the teachers
    trust_remote_code: bool


@dataclass(frozen=True)
class Trial:
    """One method with one setting."""

    method: str
    lr: float
    constant: float | None
    folder: Path
    identity: str

    @property
    def label(self) -> str:
        """`npo, lr 3e-05`, with the constant where the method has one."""
        return f"{self.method}, {self.setting}"

    @property
    def setting(self) -> str:
        constant = METHODS[self.method].constant if self.method in METHODS else None
        return f"lr {self.lr:.3g}" + (f", {constant} {self.constant:g}" if constant else "")

    @property
    def is_trained(self) -> bool:
        return (self.folder / DONE_NAME).is_file() and (self.folder / "model").is_dir()


def trials_of(plan: Comparison, method: str) -> list[Trial]:
    """The method's grid: every learning rate with every value of its constant."""
    known = METHODS.get(method)
    grid = plan.settings.grid.get(method)  # pyright: ignore[reportArgumentType]
    lrs = (grid and grid.lr) or tuple(plan.train.lr * factor for factor in plan.settings.lr_factors)
    constants = ((grid and grid.constant) or known.constants if known else ()) or (None,)
    return [_trial(plan, method, lr, constant) for constant in constants for lr in lrs]


def _trial(plan: Comparison, method: str, lr: float, constant: float | None) -> Trial:
    settings = plan.train.model_copy(update={"lr": lr})
    deciding = [
        method,
        constant,
        deciding_settings(settings),
        weights_sha256(plan.model_dir),
        {name: store.manifest.fingerprint for name, store in plan.stores.items()},
    ]
    if method != DUET:
        deciding += [plan.settings.seed, plan.training_rows.sha256()]
    identity = sha256_json(deciding)
    constant_part = "" if constant is None else f"-{constant:g}"
    return Trial(method, lr, constant, plan.folder / method / f"lr{lr:.3g}{constant_part}-{identity[:8]}", identity)


def train_trial(plan: Comparison, trial: Trial, watch: Watch) -> None:
    """Leave `model/` and candidate.json in the trial's folder, however much of it is there."""
    if trial.is_trained:
        return
    if (trial.folder / DONE_NAME).is_file():  # only its weights were removed
        shutil.rmtree(trial.folder)
    settings = plan.train.model_copy(update={"lr": trial.lr})
    train = _train_duet if trial.method == DUET else _train_method
    publish_json(trial.folder / DONE_NAME, train(plan, trial, settings, watch))


def _train_duet(plan: Comparison, trial: Trial, settings: TrainSettings, watch: Watch) -> dict[str, Any]:
    def show(report: StepReport) -> None:
        watch.on_progress(trial.label, report.step, report.total_steps, f"loss {report.loss:.3g}")

    job = StudentJob(trial.method, plan.model_dir, plan.start_name, trial.folder, settings, plan.trust_remote_code)
    alone = Processes(Rank(), torch.device(plan.reported.device))
    summary = train_student(job, plan.stores, plan.tokenizer, alone, replace(watch, on_progress=show))
    return {"steps": summary.steps, "train_s": summary.train_s, "diverged_at": None, "curve": summary.curve}


def _train_method(plan: Comparison, trial: Trial, settings: TrainSettings, watch: Watch) -> dict[str, Any]:
    order = Teachers.of(plan.stores, settings).order(settings)
    job = BaselineJob(
        name=trial.label,
        method=METHODS[trial.method],
        constant=trial.constant or 0.0,
        model_dir=plan.model_dir,
        start_name=plan.start_name,
        folder=trial.folder,
        settings=settings,
        rows=plan.training_rows,
        steps=store_order(order, settings),
        seed=plan.settings.seed,
        device=torch.device(plan.reported.device),
        trust_remote_code=plan.trust_remote_code,
    )
    return train_baseline(job, watch)


def best_of(
    plan: Comparison, method: str, watch: Watch, tell: Callable[[str], None]
) -> tuple[Trial, list[dict[str, Any]]]:
    """The method's trial with the largest performance shift on the validation part, broken or not, and the rows of all.

    Leaves the weights of the best only. `tell` gets a sentence for each trial that was scored.
    """
    trials = trials_of(plan, method)
    rows = []
    for trial in trials:
        shift = _validated(plan, trial, watch, tell)
        done = read_json(trial.folder / DONE_NAME)
        rows.append(
            {"setting": trial.setting, "lr": trial.lr, "constant": trial.constant, "validation_shift": shift}
            | {key: done[key] for key in ("steps", "train_s", "diverged_at")}
        )
    best = max(range(len(trials)), key=lambda number: rows[number]["validation_shift"])  # of equals the first
    train_trial(plan, trials[best], watch)
    for trial in trials:
        if trial is not trials[best]:
            shutil.rmtree(trial.folder / "model", ignore_errors=True)
    return trials[best], [row | {"chosen": number == best} for number, row in enumerate(rows)]


def _validated(plan: Comparison, trial: Trial, watch: Watch, tell: Callable[[str], None]) -> float:
    """The trial's performance shift, in points, on the validation part."""
    exam = plan.validation
    identity = sha256_json([trial.identity, _asked(exam)])
    path = trial.folder / VALIDATION_NAME
    if path.is_file() and (kept := read_json(path))["identity"] == identity:
        return kept["shift"]
    train_trial(plan, trial, watch)
    base = plan.references[0]
    before = answer_all([base], exam, plan.folder / ANSWERS_TO_CHOOSE, watch)[base.name]
    subject = Subject(trial.label, trial.folder / "model", "", base.name)
    after = answer_all([subject], exam, trial.folder / "answers", watch)[subject.name]
    shift, _ = performance_shift(_points(exam, before), _points(exam, after), forgotten(exam))
    shutil.rmtree(trial.folder / "answers")
    publish_json(path, {"identity": identity, "shift": shift, "scores": _points(exam, after)})
    tell(f"{trial.label}: {shift:+.1f} points on the validation part")
    return shift


def _asked(exam: Exam) -> list[Any]:
    """All of an exam that decides a model's scores, but for the model."""
    settings = exam.settings.model_dump(mode="json", include={"max_new_tokens", "engine", "dtype"})
    sets = [[name, s.expect, [[q.question, q.answer] for q in s.queries]] for name, s in exam.sets.items()]
    return [settings, exam.prompt.model_dump(mode="json"), exam.device, sets]


def forgotten(exam: Exam) -> set[str]:
    """The sets that are to be forgotten, of those that count."""
    return {name for name, query_set in exam.judged.items() if query_set.expect == "forgotten"}


def recalls(exam: Exam, answers: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    """ROUGE-L recall of every question, by set that counts, float64 [n] each."""
    return {name: rouge_l(references_of(s), answers[name])[0] for name, s in exam.judged.items()}


def _points(exam: Exam, answers: Mapping[str, list[str]]) -> dict[str, float]:
    return {name: 100 * float(values.mean()) for name, values in recalls(exam, answers).items()}


def results_of(
    exam: Exam, subjects: Sequence[Subject], answers: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, Any]:
    """The parts of compare.json that come from answers: those of results.json, and how the subjects differ.

    Each performance shift gets its interval; `trade_off` has the mean recall over the sets to be kept, and 1 less that over
    the sets to be forgotten; `comparisons` every subject's scores and shift, less DUET's on the same items.
    """
    found = evaluation.results_of(subjects, exam, answers, against=DUET)
    recall = {subject.name: recalls(exam, answers[subject.name]) for subject in subjects}
    clusters = {name: references_of(query_set) for name, query_set in exam.judged.items()}
    gone, seed = forgotten(exam), exam.settings.seed
    # Points; a fall is good where it is wanted.
    signs = {name: -100.0 if name in gone else 100.0 for name in exam.judged}
    base = recall[subjects[0].name]
    for name, shift in found["performance_shift"].items():
        shift["ci95"] = compare_sums(recall[name], base, clusters, signs, seed)["ci95"]
    for name, of_model in found["comparisons"].items():
        shift = compare_sums(recall[name], recall[DUET], clusters, signs, seed)
        of_model["performance_shift"] = {"against": DUET, **shift}
    trade_off = {name: _trade_off(values, clusters, gone, seed) for name, values in recall.items()}
    return found | {"trade_off": trade_off}


def _trade_off(
    recall: Mapping[str, np.ndarray], clusters: Mapping[str, Sequence[str]], gone: set[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Means over the sets of either kind, 0..1, with intervals."""
    sides = {
        "forgotten": {name: 1 - values for name, values in recall.items() if name in gone},
        "kept": {name: values for name, values in recall.items() if name not in gone},
    }
    found = {}
    for side, values in sides.items():
        value, ci95 = weighted_sum(values, clusters, dict.fromkeys(values, 1 / len(values)), seed)
        found[side] = {"value": value, "ci95": list(ci95)}
    return found
