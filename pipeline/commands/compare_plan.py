"""What `duet compare` works with, before anything is trained: DUET's modes, the training rows, the split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from duet.cache.errors import UserError
from duet.cache.record import MAIN_SUBSETS
from duet.pipeline.commands.distill import job_of
from duet.pipeline.config.schema import PRESETS, Config
from duet.pipeline.config.selection import Selection
from duet.pipeline.run.exam import check_texts_apart, exam_of, subjects_of
from duet.pipeline.run.named_models import model_name, start_model
from duet.pipeline.run.stores import stores_of_run
from duet.stages.settings.student import StudentSettings

if TYPE_CHECKING:
    from duet.cache.reader import Store
    from duet.stages.compare.grid import Comparison, Mode
    from duet.stages.compare.rows import TrainingRows
    from duet.stages.exam.exam import Exam


def with_preset(request: Selection, config: Config, preset: str) -> Selection:
    """The request for the run that has this preset's teacher logits: the comparison's own, or one in its folder."""
    if preset not in PRESETS:
        raise UserError(
            f"compare.harden: there is no preset {preset!r}, expected some of {', '.join(PRESETS)}",
            "choose among these",
        )
    if preset == config.harden:
        return request
    own = {
        "harden": preset,
        "runs_dir": config.run.compare / "harden",
        "name": preset,
        "prompt.date": config.prompt.date,
    }
    return replace(
        request,
        overrides=(*request.overrides, *(f"{key}={json.dumps(value, default=str)}" for key, value in own.items())),
    )


def compared_student(config: Config, preset: str) -> StudentSettings:
    """The first student that starts from the teacher's own model: DUET's trials are trained with its settings.

    Refuses one that would be trained on texts of the attacks that all are asked under.
    """
    if config.bare_teachers:
        raise UserError(
            "the teacher has no prefix: other methods would start from a model that is silent already",
            "compare with the config of the run that has the prefix",
        )
    damaged = PRESETS[preset].get("students", {}).get("start_noise", 0.0)
    for student in config.students:
        if start_model(config, student) == config.teacher.model and student.start_noise == damaged:
            _check_preset(config, student, preset)
            check_texts_apart(config, [student])
            return student
    raise UserError(
        "no student starts from the teacher's own weights, and methods are compared on one start",
        "add a student without a model and start_noise of its own: students: [{name: base}]",
    )


def _check_preset(config: Config, student: StudentSettings, preset: str) -> None:
    """Refuse a row that would bear a preset's name with other settings, which the config says itself."""
    found = config.model_dump() | {"students": student.model_dump()}
    for group, settings in PRESETS[preset].items():
        for key, value in settings.items():
            if found[group][key] != value:
                name = f"{'students[]' if group == 'students' else group}.{key}"
                raise UserError(
                    f"compare.harden: {preset} sets {name} to {value}, and the config says {found[group][key]}",
                    f"leave {name} out of the config, or {preset} out of compare.harden",
                )


def mode_of(config: Config, student: StudentSettings, preset: str) -> Mode:
    """DUET with this preset, from the config of the run that has its teacher logits."""
    import torch

    from duet.cache.reader import Rank
    from duet.stages.compare.grid import Mode
    from duet.stages.student.noise import noise_identity
    from duet.stages.student.ranks import Processes
    from duet.stages.student.train import open_stores

    alone = Processes(Rank(), torch.device("cpu"))
    own = student.model_dump(mode="json", exclude={"name", "model", "train", "push_to_hub"}, exclude_defaults=True)
    own |= noise_identity(student.start_noise)
    return Mode(preset, job_of(config, student, alone), own, *open_stores(stores_of_run(config), config.store.verify))


def parts_of(configs: Sequence[Config]) -> list[tuple[Exam, Exam]]:
    """Each config's exam in two: the questions that choose a setting, as they are, and those that are reported.

    A question is on one side in all of them.
    """
    from duet.stages.exam.exam import part_of, split_by_answer

    settings, exams, found = configs[0].compare, [exam_of(config) for config in configs], []
    for exam in exams:
        validation, reported = split_by_answer(
            exam, settings.validation_share, settings.seed, "duet compare",
            "give the set more questions, or move compare.validation_share towards 0.5", exams[::-1],
        )  # fmt: skip
        found.append((as_they_are(part_of(exam, validation)), part_of(exam, reported)))
    return found


def as_they_are(exam: Exam) -> Exam:
    """The exam's sets that count, without attacks, and without shots in front."""
    from duet.stages.exam.exam import QuerySet

    return replace(
        exam,
        sets={name: QuerySet(s.queries, s.expect) for name, s in exam.judged.items()},
        settings=exam.settings.model_copy(update={"attacks": (), "membership": None}),
    )


def plan_of(
    config: Config, of_presets: Mapping[str, tuple[Config, StudentSettings]], validation: Exam, reported: Exam
) -> Comparison:
    """Everything that is the same for all methods; `of_presets` is the config with each preset, and the student."""
    from duet.stages.compare.grid import Comparison, duet_row
    from duet.stages.models.directory import resolve_model

    modes = {duet_row(preset): mode_of(*found, preset) for preset, found in of_presets.items()}
    first = next(iter(modes.values()))
    model_dir = resolve_model(config.teacher.model, "teacher.model")
    return Comparison(
        settings=config.compare,
        train=first.job.settings,
        modes=modes,
        model_dir=model_dir,
        start_name=model_name(config.teacher.model),
        folder=config.run.compare,
        training_rows=_training_rows(config, model_dir, next(iter(first.stores.values()))),
        validation=validation,
        reported=reported,
        references=subjects_of(config, ()),
        trust_remote_code=config.teacher.trust_remote_code,
    )


def _training_rows(config: Config, model_dir: Path, store: Store) -> TrainingRows:
    """The store's queries, in its order, with the data's answers and the refusals, as token ids."""
    from duet.stages.compare.rows import Contexts, TrainingRows, row_of
    from duet.stages.questions.prompts import open_renderer
    from duet.stages.questions.requests import queries_of

    by_request = queries_of(config.data, config.requests, need_answers=True)
    queries = {s: [query for found in by_request.values() for query in found[s]] for s in MAIN_SUBSETS}
    counts = {subset: len(found) for subset, found in queries.items()}
    if counts != {subset: store.manifest.subsets[subset] for subset in MAIN_SUBSETS}:
        raise UserError(
            f"the store has {store.manifest.subsets} rows, the data now has {counts}",
            "run `duet teacher-logits` with this config",
        )
    renderer = open_renderer(model_dir, config.prompt, config.teacher.trust_remote_code)
    rows = {s: [row_of(renderer, query) for query in found] for s, found in queries.items()}
    refusals = config.compare.refusals or (config.evaluate.refusal,)
    refused = [[row_of(renderer, query, text) for text in refusals] for s in MAIN_SUBSETS for query in queries[s]]
    return TrainingRows(**rows, refusals=refused, contexts=Contexts(renderer, **queries, refusals=refusals))
