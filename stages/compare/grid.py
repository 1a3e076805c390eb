"""DUET against other methods: each tries its grid, the best on the validation part is asked the rest of the questions.

A candidate is one method with one learning rate and one value of its constant, in a folder of its own, named after a hash of
all that decides its weights. What is trained is not trained again, who was asked is not asked again. Where a method's best is
known, the weights of its others are removed; the numbers stay. DUET's candidates go through `student.py`, as every student.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet.cache.files import publish_json, read_json, sha256_json
from duet.cache.reader import Rank, Store
from duet.cache.watch import Watch
from duet.stages.compare.methods import METHODS
from duet.stages.compare.train import BaselineJob, TrainingRows, store_order, train_baseline
from duet.stages.evaluate import results as evaluate
from duet.stages.evaluate.answers import answer_all
from duet.stages.exam.exam import Exam, Subject, references_of
from duet.stages.metrics import text as metrics
from duet.stages.metrics.uncertainty import compare_sums, weighted_sum
from duet.stages.models.identity import weights_sha256
from duet.stages.settings.compare import CompareSettings
from duet.stages.settings.student import FREE_TRAIN, TrainSettings
from duet.stages.student.ranks import Processes
from duet.stages.student.targets import Teachers
from duet.stages.student.train import StudentJob, train_student

DUET = "duet"
DONE_NAME, VALIDATION_NAME = "candidate.json", "validation.json"
ANSWERS_TO_CHOOSE = "answers/validation"  # of base, in the comparison's folder


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and where."""

    settings: CompareSettings
    train: TrainSettings  # of DUET's student; all methods share it but for the learning rate
    model_dir: Path  # what all start from
    start_name: str
    folder: Path
    lessons: TrainingRows
    stores: Mapping[str, Store]
    store_tokenizer: Any
    validation: Exam
    reported: Exam
    references: Sequence[Subject]  # base first, and the teachers
    trust_remote_code: bool


@dataclass(frozen=True)
class Report:
    """Who is told what happens, and who is asked whether to stop."""

    on_step: Callable[[str, int, int, str], None]
    tell: Callable[[str], None]
    watch: Watch


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


def candidates(plan: Comparison, method: str) -> list[Trial]:
    """The method's grid: every learning rate with every value of its constant."""
    known = METHODS.get(method)
    grid = plan.settings.grid.get(method)  # pyright: ignore[reportArgumentType]
    lrs = (grid and grid.lr) or tuple(plan.train.lr * factor for factor in plan.settings.lr_factors)
    constants = ((grid and grid.constant) or known.constants if known else ()) or (None,)
    return [_candidate(plan, method, lr, constant) for constant in constants for lr in lrs]


def _candidate(plan: Comparison, method: str, lr: float, constant: float | None) -> Trial:
    settings = plan.train.model_copy(update={"lr": lr})
    deciding = [
        method,
        constant,
        settings.model_dump(mode="json", exclude=set(FREE_TRAIN)),
        weights_sha256(plan.model_dir),
        {name: store.manifest.fingerprint for name, store in plan.stores.items()},
    ]
    if method != DUET:
        deciding += [plan.settings.seed, plan.lessons.sha256()]
    identity = sha256_json(deciding)
    constant_part = "" if constant is None else f"-{constant:g}"
    return Trial(method, lr, constant, plan.folder / method / f"lr{lr:.3g}{constant_part}-{identity[:8]}", identity)


def train_candidate(plan: Comparison, candidate: Trial, report: Report) -> None:
    """Leave `model/` and candidate.json in the candidate's folder, whatever of it is there."""
    if candidate.is_trained:
        return
    if (candidate.folder / DONE_NAME).is_file():  # only its weights were removed
        shutil.rmtree(candidate.folder)
    settings = plan.train.model_copy(update={"lr": candidate.lr})
    train = _train_duet if candidate.method == DUET else _train_method
    publish_json(candidate.folder / DONE_NAME, train(plan, candidate, settings, report))


def _train_duet(plan: Comparison, candidate: Trial, settings: TrainSettings, report: Report) -> dict[str, Any]:
    job = StudentJob(
        candidate.method, plan.model_dir, plan.start_name, candidate.folder, settings, plan.trust_remote_code
    )
    summary = train_student(
        job,
        plan.stores,
        plan.store_tokenizer,
        Processes(Rank(), torch.device(plan.reported.device)),
        lambda step: report.on_step(candidate.label, step.step, step.total_steps, f"loss {step.loss:.3g}"),
        report.watch.should_stop,
    )
    return {"steps": summary["steps"], "train_s": summary["train_s"], "diverged_at": None, "curve": summary["curve"]}


def _train_method(plan: Comparison, candidate: Trial, settings: TrainSettings, report: Report) -> dict[str, Any]:
    order = Teachers.of(plan.stores, settings).order(settings)
    job = BaselineJob(
        name=candidate.label,
        method=METHODS[candidate.method],
        constant=candidate.constant or 0.0,
        model_dir=plan.model_dir,
        start_name=plan.start_name,
        folder=candidate.folder,
        settings=settings,
        lessons=plan.lessons,
        steps=store_order(order, settings),
        seed=plan.settings.seed,
        device=torch.device(plan.reported.device),
        trust_remote_code=plan.trust_remote_code,
    )
    return train_baseline(
        job,
        lambda step, total, loss: report.on_step(job.name, step, total, f"loss {loss:.3g}"),
        report.watch.should_stop,
    )


def best_of(plan: Comparison, method: str, report: Report) -> tuple[Trial, list[dict[str, Any]]]:
    """The method's candidate with the largest performance shift on the validation part, broken or not, and all of them.

    Leaves the weights of the best only.
    """
    tried = candidates(plan, method)
    rows = []
    for candidate in tried:
        shift = _validated(plan, candidate, report)
        done = read_json(candidate.folder / DONE_NAME)
        rows.append(
            {
                "setting": candidate.setting,
                "lr": candidate.lr,
                "constant": candidate.constant,
                "validation_shift": shift,
            }
            | {key: done[key] for key in ("steps", "train_s", "diverged_at")}
        )
    best = max(range(len(tried)), key=lambda number: rows[number]["validation_shift"])  # of equals the first
    train_candidate(plan, tried[best], report)
    for candidate in tried:
        if candidate is not tried[best]:
            shutil.rmtree(candidate.folder / "model", ignore_errors=True)
    return tried[best], [row | {"chosen": number == best} for number, row in enumerate(rows)]


def _validated(plan: Comparison, candidate: Trial, report: Report) -> float:
    """The candidate's performance shift, in points, on the validation part."""
    exam = plan.validation
    identity = sha256_json([candidate.identity, _asked(exam)])
    path = candidate.folder / VALIDATION_NAME
    if path.is_file() and (kept := read_json(path))["identity"] == identity:
        return kept["shift"]
    train_candidate(plan, candidate, report)
    base = plan.references[0]
    before = ask(exam, [base], plan.folder / ANSWERS_TO_CHOOSE, report)[base.name]
    subject = Subject(candidate.label, candidate.folder / "model", "", base.name)
    after = ask(exam, [subject], candidate.folder / "answers", report)[subject.name]
    shift, _ = metrics.performance_shift(_points(exam, before), _points(exam, after), forgotten(exam))
    shutil.rmtree(candidate.folder / "answers")
    publish_json(path, {"identity": identity, "shift": shift, "scores": _points(exam, after)})
    report.tell(f"{candidate.label}: {shift:+.1f} points on the validation part")
    return shift


def _asked(exam: Exam) -> list[Any]:
    """All of an exam that decides what a model's answers are worth, but for the model."""
    settings = exam.settings.model_dump(mode="json", include={"max_new_tokens", "engine", "dtype"})
    sets = [[name, s.expect, [[q.question, q.answer] for q in s.queries]] for name, s in exam.sets.items()]
    return [settings, exam.prompt.model_dump(mode="json"), exam.device, sets]


def ask(exam: Exam, subjects: Sequence[Subject], folder: Path, report: Report) -> dict[str, dict[str, list[str]]]:
    """As `evaluate.answer_all`, which keeps the answers in `folder`."""
    return answer_all(subjects, exam, folder, report.watch)


def forgotten(exam: Exam) -> set[str]:
    """The sets that are to be forgotten, of those that count."""
    return {name for name, query_set in exam.judged.items() if query_set.expect == "forgotten"}


def recalls(exam: Exam, answers: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    """ROUGE-L recall of every question, by set that counts, float64 [n] each."""
    return {name: metrics.rouge_l(references_of(s), answers[name])[0] for name, s in exam.judged.items()}


def _points(exam: Exam, answers: Mapping[str, list[str]]) -> dict[str, float]:
    return {name: 100 * float(values.mean()) for name, values in recalls(exam, answers).items()}


def results_of(
    exam: Exam, subjects: Sequence[Subject], answers: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, Any]:
    """The parts of compare.json that come from answers: those of results.json, and how the subjects differ.

    Each performance shift gets its interval; `trade_off` has the mean recall over the sets to be kept, and what is missing to
    1 on those to be forgotten; `comparisons` every subject's scores and shift, less DUET's on the same items.
    """
    found = evaluate.results_of(subjects, exam, answers, against=DUET)
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
