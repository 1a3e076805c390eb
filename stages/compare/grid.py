"""DUET against other methods: each tries its grid, the best on the validation part is trained with further seeds.

A trial is one method with one learning rate, one value of its constant and one seed, in a folder of its own, named after a hash
of everything that decides its weights. No trial is trained twice, and no model is asked twice. Where a method's best is known,
the weights of its others are removed; the numbers stay. DUET's trials are trained by `train_student`, as every student.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duet.cache.files import publish_json, read_json, sha256_json
from duet.cache.reader import Rank, Store
from duet.cache.watch import Watch
from duet.stages.compare.methods import METHODS
from duet.stages.compare.repselect import REPSELECT, train_repselect
from duet.stages.compare.results import forgotten, points
from duet.stages.compare.rows import TrainingRows, store_order
from duet.stages.compare.train import BaselineJob, train_baseline
from duet.stages.evaluate.answers import answer_all
from duet.stages.exam.exam import Exam, Subject, stem_of
from duet.stages.metrics.text import performance_shift
from duet.stages.models.identity import weights_sha256
from duet.stages.settings.compare import CompareSettings
from duet.stages.settings.student import TrainSettings, deciding_settings
from duet.stages.student.job import StudentJob
from duet.stages.student.loop import StepReport
from duet.stages.student.ranks import Processes
from duet.stages.student.targets import Teachers
from duet.stages.student.train import train_student

DUET = "duet"  # its row without hardening
DONE_NAME, VALIDATION_NAME = "candidate.json", "validation.json"
ANSWERS_TO_CHOOSE = "answers/validation"  # of base, in the comparison's folder


@dataclass(frozen=True)
class Mode:
    """DUET with one preset of `harden`."""

    harden: str
    job: StudentJob  # whose name, folder and settings each trial replaces
    own: Mapping[str, Any]  # what the student has of its own beside `train`, where it does something
    stores: Mapping[str, Store]
    tokenizer: Any  # of the stores


@dataclass(frozen=True)
class Comparison:
    """All that is the same for every method: the data, the settings, the questions and the folder."""

    settings: CompareSettings
    train: TrainSettings  # of DUET's first mode; all methods share it but for the learning rate
    modes: Mapping[str, Mode]  # DUET's rows by name, at least one
    model_dir: Path  # that all start from
    start_name: str
    folder: Path
    training_rows: TrainingRows
    validation: Exam
    reported: Exam
    references: Sequence[Subject]  # base first, and the teachers
    trust_remote_code: bool


@dataclass(frozen=True)
class Trial:
    """One method with one setting and one seed."""

    method: str  # or the name of a mode of DUET
    lr: float
    constant: float | None
    repeat: int  # added to every seed; 0 is the one that chooses
    folder: Path
    identity: str

    @property
    def label(self) -> str:
        """`npo, lr 3e-05`, with the constant where the method has one, and `, seed + 1` of a repetition."""
        return f"{self.method}, {self.setting}" + (f", seed + {self.repeat}" if self.repeat else "")

    @property
    def setting(self) -> str:
        constant = METHODS[self.method].constant if self.method in METHODS else None
        return f"lr {self.lr:.3g}" + (f", {constant} {self.constant:g}" if constant else "")

    @property
    def is_trained(self) -> bool:
        return (self.folder / DONE_NAME).is_file() and (self.folder / "model").is_dir()


def duet_row(harden: str) -> str:
    """The name of DUET's row with this preset: `duet`, `duet:deep`."""
    return DUET if harden == "none" else f"{DUET}:{harden}"


def trials_of(plan: Comparison, method: str) -> list[Trial]:
    """The method's grid: every learning rate with every value of its constant."""
    known, train = METHODS.get(method), _train_settings(plan, method)
    grid = plan.settings.grid.get(DUET if method in plan.modes else method)  # pyright: ignore[reportArgumentType]
    lrs = (grid and grid.lr) or tuple(train.lr * factor for factor in plan.settings.lr_factors)
    constants = ((grid and grid.constant) or known.constants if known else ()) or (None,)
    return [_trial(plan, method, lr, constant) for constant in constants for lr in lrs]


def _train_settings(plan: Comparison, method: str) -> TrainSettings:
    return plan.modes[method].job.settings if method in plan.modes else plan.train


def _first(plan: Comparison) -> Mode:
    return next(iter(plan.modes.values()))


def _settings_of(plan: Comparison, trial: Trial) -> TrainSettings:
    train = _train_settings(plan, trial.method)
    return train.model_copy(update={"lr": trial.lr, "seed": train.seed + trial.repeat})


def _trial(plan: Comparison, method: str, lr: float, constant: float | None, repeat: int = 0) -> Trial:
    constant_part = "" if constant is None else f"-{constant:g}"
    unnamed = Trial(method, lr, constant, repeat, plan.folder, "")
    stores = plan.modes[method].stores if method in plan.modes else _first(plan).stores
    deciding = [
        DUET if method in plan.modes else method,
        constant,
        deciding_settings(_settings_of(plan, unnamed)),
        weights_sha256(plan.model_dir),
        {name: store.manifest.fingerprint for name, store in stores.items()},
    ]
    if method not in plan.modes:
        deciding += [plan.settings.seed + repeat, plan.training_rows.sha256()]
    elif plan.modes[method].own:
        deciding += [plan.modes[method].own]
    identity = sha256_json(deciding)
    folder = plan.folder / stem_of(method) / f"lr{lr:.3g}{constant_part}-{identity[:8]}"
    return replace(unnamed, folder=folder, identity=identity)


def train_trial(plan: Comparison, trial: Trial, watch: Watch) -> None:
    """Leave `model/` and candidate.json in the trial's folder, however much of it is there."""
    if trial.is_trained:
        return
    if (trial.folder / DONE_NAME).is_file():  # only its weights were removed
        shutil.rmtree(trial.folder)
    train = _train_duet if trial.method in plan.modes else _train_method
    publish_json(trial.folder / DONE_NAME, train(plan, trial, watch))


def _train_duet(plan: Comparison, trial: Trial, watch: Watch) -> dict[str, Any]:
    def show(report: StepReport) -> None:
        watch.on_progress(trial.label, report.step, report.total_steps, f"loss {report.loss:.3g}")

    mode = plan.modes[trial.method]
    job = replace(mode.job, name=trial.method, student_dir=trial.folder, settings=_settings_of(plan, trial))
    alone = Processes(Rank(), torch.device(plan.reported.device))
    summary = train_student(job, mode.stores, mode.tokenizer, alone, replace(watch, on_progress=show))
    return {"steps": summary.steps, "train_s": summary.train_s, "diverged_at": None, "curve": summary.curve}


def _train_method(plan: Comparison, trial: Trial, watch: Watch) -> dict[str, Any]:
    settings = _settings_of(plan, trial)
    order = Teachers.of(_first(plan).stores, settings).order(settings)
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
        seed=plan.settings.seed + trial.repeat,
        device=torch.device(plan.reported.device),
        trust_remote_code=plan.trust_remote_code,
    )
    return (train_repselect if trial.method == REPSELECT else train_baseline)(job, watch)


def chosen_row(rows: Sequence[Mapping[str, Any]], configured_lr: float) -> int:
    """The number of the row with the largest validation shift; of equals the one whose learning rate is nearest to the
    config's, by its logarithm, and of these the first.

    No attack takes part in the validation: a rate at which a hardened student has hardly changed may tie with the recipe's.
    """
    return max(
        range(len(rows)),
        key=lambda number: (rows[number]["validation_shift"], -abs(math.log(rows[number]["lr"] / configured_lr))),
    )


def best_of(
    plans: Sequence[Comparison], method: str, watch: Watch, tell: Callable[[str], None]
) -> tuple[list[Trial], list[dict[str, Any]]]:
    """The method's trial with the largest performance shift on the validation part, broken or not, trained with every seed,
    the one that chose first; and the rows of all trials. Which of equals: `chosen_row`.

    A plan for each seed, which differ at most in the model that they start from. Leaves the weights of these trials only.
    `tell` gets a sentence for each trial that was scored.
    """
    plan = plans[0]
    trials = trials_of(plan, method)
    rows = []
    for trial in trials:
        shift = _validated(plan, trial, watch, tell)
        done = read_json(trial.folder / DONE_NAME)
        rows.append(
            {"setting": trial.setting, "lr": trial.lr, "constant": trial.constant, "validation_shift": shift}
            | {key: done[key] for key in ("steps", "train_s", "diverged_at")}
        )
    number = chosen_row(rows, _train_settings(plan, method).lr)
    best = trials[number]
    chosen = [_trial(plan, method, best.lr, best.constant, repeat) for repeat, plan in enumerate(plans)]
    for plan, trial in zip(plans, chosen, strict=True):
        train_trial(plan, trial, watch)
    for model_dir in best.folder.parent.glob("*/model"):
        if model_dir.parent not in {trial.folder for trial in chosen}:
            shutil.rmtree(model_dir)
    return chosen, [row | {"chosen": at == number} for at, row in enumerate(rows)]


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
    shift, _ = performance_shift(points(exam, before), points(exam, after), forgotten(exam))
    shutil.rmtree(trial.folder / "answers")
    publish_json(path, {"identity": identity, "shift": shift, "scores": points(exam, after)})
    tell(f"{trial.label}: {shift:+.1f} points on the validation part")
    return shift


def _asked(exam: Exam) -> list[Any]:
    """All of an exam that decides a model's scores, but for the model."""
    settings = exam.settings.model_dump(mode="json", include={"max_new_tokens", "engine", "dtype"})
    sets = [[name, s.expect, [[q.asked, q.answer] for q in s.queries]] for name, s in exam.sets.items()]
    return [settings, exam.prompt.model_dump(mode="json"), exam.device, sets]
