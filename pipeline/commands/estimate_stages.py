"""The need of each stage of a run for `duet estimate`: as configured, and under the settings that take less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duet.pipeline.config.schema import Config
from duet.pipeline.run.stores import questions_of
from duet.stages.cost.gpus import Device
from duet.stages.cost.memory import Need, Reading, StudentOnMeta, reading_need, student_need
from duet.stages.models.sizes import ModelSizes
from duet.stages.settings.evaluate import EvaluateSettings
from duet.stages.settings.student import TrainSettings
from duet.stages.settings.teacher import TeacherSettings

if TYPE_CHECKING:
    from duet.stages.teacher.plan import RenderedQuery


@dataclass(frozen=True)
class Stage:
    """A part of the run, its need, and its need under other settings."""

    name: str
    need: Need
    changes: dict[str, Need]  # by the setting; none where it fits as it is


def stages_of(config: Config, on: Device, devices: int) -> list[Stage]:
    """Teachers, students (each on `devices` GPUs), and the evaluation, in the order in which they run."""
    asked = {name: _rendered(config, settings) for name, settings in config.teacher_settings().items()}
    rows = next(iter(asked.values()))[1]  # whichever teacher: the student's side is the same
    return [*_teachers(config, on, asked), *_students(config, on, devices, rows), _evaluation(config, on)]


def _teachers(config: Config, on: Device, asked: Mapping[str, tuple[Path, list[RenderedQuery]]]) -> Iterator[Stage]:
    for name, settings in config.teacher_settings().items():
        folder, rows = asked[name]
        sizes = ModelSizes.of(folder, settings.trust_remote_code)
        need = _teacher_need(settings, sizes, rows, on)
        changes: dict[str, dict[str, Any]] = {
            "teacher.dtype=bfloat16": {"dtype": "bfloat16"},
            "teacher.batch_size=8": {"batch_size": 8},
            "teacher.quantization=fp8": {"quantization": "fp8"},
            **{f"teacher.tensor_parallel={count}": {"tensor_parallel": count} for count in (2, 4, 8)},
        }
        others = {} if need.fits(on) else changes
        yield Stage(
            "teacher" if name == "teacher" else f"teacher {name}",
            need,
            _smaller(
                {k: _teacher_need(settings.model_copy(update=v), sizes, rows, on) for k, v in others.items()}, need
            ),
        )


def _rendered(config: Config, settings: TeacherSettings) -> tuple[Path, list[RenderedQuery]]:
    """The teacher's directory, of which the weights may be missing, and the rows that it is asked."""
    from duet.stages.models.directory import small_files
    from duet.stages.teacher.prepare import render_rows

    folder = small_files(settings.model, "teacher.model")
    return folder, render_rows(folder, settings, questions_of(config)).rows


def _teacher_need(settings: TeacherSettings, sizes: ModelSizes, rows: list[RenderedQuery], on: Device) -> Need:
    from duet.stages.cost.store import not_shared

    positions = [row.positions(settings.max_positions) for row in rows]
    reading = Reading(
        longest=max(len(row.teacher_ids) + count for row, count in zip(rows, positions, strict=True)),
        prompt_tokens=not_shared([row.teacher_ids for row in rows]),
        new_tokens=sum(positions) - len(rows),  # the first of each is the prompt's
        batch=min(settings.batch_size, len(rows)),
    )
    devices = settings.tensor_parallel * settings.pipeline_parallel
    dtype = sizes.dtype_of(settings.dtype)
    need = reading_need(sizes, dtype, reading, on, devices, 1.0 if settings.quantization else None)
    return replace(need, seconds=need.seconds / settings.data_parallel)


def _students(config: Config, on: Device, devices: int, rows: list[RenderedQuery]) -> Iterator[Stage]:
    from duet.pipeline.run.named_models import start_model
    from duet.stages.models.directory import small_files

    positions = config.teacher.max_positions
    plain = np.array([len(row.student_ids) + row.positions(positions) - 1 for row in rows])
    for student in config.students:
        folder = small_files(start_model(config, student), f"students.{student.name}.model")
        train = config.train_settings(student)
        lengths = plain if train.contexts == "none" else plain + _added(config, folder, train, rows)

        def need_of(
            train: TrainSettings, count: int = devices, folder: Path = folder, lengths: np.ndarray = lengths
        ) -> Need:
            made = StudentOnMeta.of(folder, train, on, count, config.teacher.trust_remote_code)
            return student_need(made, lengths, on, count)

        need = need_of(train)
        if need.fits(on):
            yield Stage(f"student {student.name}", need, {})
            continue
        others = {text: need_of(train.model_copy(update=new)) for text, new in _savings(train, folder).items()}
        if on.kind == "cuda" and train.optimizer == "adamw":
            spread = train.model_copy(update={"parallel": "fsdp"})
            others |= {f"train.parallel=fsdp on {n} GPUs": need_of(spread, n) for n in (2, 4, 8) if n > devices}
        yield Stage(f"student {student.name}", need, _smaller(others, need))


def _added(config: Config, folder: Path, train: TrainSettings, rows: list[RenderedQuery]) -> np.ndarray:
    """int [rows]: tokens that a drawn context adds to each, and to a forget row the longest begun answer."""
    from duet.stages.questions.contexts import Contexts
    from duet.stages.questions.prompts import open_renderer
    from duet.stages.questions.requests import asked_about
    from duet.stages.student.contexts import most_begun

    renderer = open_renderer(folder, config.prompt, config.teacher.trust_remote_code)
    contexts = Contexts(renderer, asked_about(config.data, config.topic, config.requests))
    begun = most_begun(train)
    return np.array(
        [
            len(contexts.drawn(row.row_id, ())) - len(row.student_ids) + begun * (row.subset == "forget")
            if row.row_id in contexts.asked
            else 0
            for row in rows
        ]
    )


def _savings(train: TrainSettings, folder: Path) -> dict[str, dict[str, Any]]:
    """Settings that take less memory, as written for --set; docs/training.md has the cost of each."""
    from duet.stages.settings.lora import LoraSettings

    found: dict[str, dict[str, Any]] = {
        "train.gradient_checkpointing=true": {"gradient_checkpointing": True},
        "train.pass_tokens=1024": {"pass_tokens": min(1024, train.pass_tokens)},
        "train.dtype=bfloat16": {"dtype": "bfloat16"},
    }
    if train.parallel != "fsdp":
        found["train.optimizer=adamw8bit"] = {"optimizer": "adamw8bit"}
    if not (train.lora or train.last_layers or train.freeze_embeddings):
        last = max(1, ModelSizes.of(folder).layers // 4)
        found["train.freeze_embeddings=true"] = {"freeze_embeddings": True}
        found[f"train.last_layers={last}"] = {"last_layers": last}
        found["train.lora={rank: 64}"] = {"lora": LoraSettings(rank=64)}
    return found


def _evaluation(config: Config, on: Device) -> Stage:
    """Every model is asked alone; the largest decides the memory, all of them the time."""
    folders = _models(config)
    sizes_of = {name: ModelSizes.of(folder, config.teacher.trust_remote_code) for name, folder in folders.items()}
    costs, longest, facts_tokens = _asked(config, folders["base"])
    patched = _patched(config, sizes_of) if facts_tokens else []

    def need_of(kinds: Mapping[str, Any], **new: Any) -> Need:
        settings = config.evaluate.model_copy(update=new)
        needs = [_asked_need(sizes, settings, kinds, longest, on) for sizes in sizes_of.values()]
        needs += [_depth_need(sizes, settings, longest, facts_tokens, on) for sizes in patched]
        return replace(max(needs, key=lambda need: need.total), seconds=sum(need.seconds for need in needs))

    need, others = need_of(costs), {}
    if not need.fits(on):
        without = {kind: cost for kind, cost in costs.items() if not cost.training_steps}
        others = {
            "evaluate.dtype=bfloat16": need_of(costs, dtype="bfloat16"),
            "evaluate.batch_size=8": need_of(costs, batch_size=8),
            "evaluate.attacks without relearn": need_of(without),
        }
    return Stage(f"evaluation of {len(sizes_of)} models", need, _smaller(others, need))


def _models(config: Config) -> dict[str, Path]:
    """The directories of the models to be asked: a student has the sizes of the model that it starts from."""
    from duet.pipeline.run.named_models import start_model
    from duet.stages.models.directory import small_files

    base = small_files(config.base_model, "evaluate.base" if config.evaluate.base else "teacher.model")
    found = {"base": base}
    silent = {small_files(one.model, "teacher.model").resolve() for one in config.silent_teachers.values()}
    teachers, students = config.teacher_settings(), config.students
    asked = {f"teacher:{name}": (settings.model, "teacher.model") for name, settings in teachers.items()}
    asked |= {f"student:{s.name}": (start_model(config, s), f"students.{s.name}.model") for s in students}
    for name, (model, where) in asked.items():
        found[name] = small_files(model, where)
        if found[name].resolve() not in {base.resolve(), *silent}:
            found[f"base:{name}"] = found[name]
    return found | {
        f"model:{name}": small_files(model, f"evaluate.models.{name}") for name, model in config.evaluate.models.items()
    }


def _patched(config: Config, sizes_of: Mapping[str, ModelSizes]) -> list[ModelSizes]:
    """The models that `evaluate.depth` measures, the control among them: of base's shape, and without a prefix."""
    prefixed = {f"teacher:{name}" for name in set(config.teacher_settings()) - set(config.bare_teachers)}
    base = sizes_of["base"]
    alike = [
        sizes
        for name, sizes in sizes_of.items()
        if name not in prefixed and (sizes.layers, sizes.hidden) == (base.layers, base.hidden)
    ]
    return [*alike, base]  # the control is of its shape


def _asked(config: Config, folder: Path) -> tuple[Mapping[str, Any], int, int]:
    """The cost of asking one model, by attack; the longest prompt with its answer, in tokens; and the tokens of all prompts and
    answers that `evaluate.depth` reads, 0 where it is not asked for."""
    from duet.pipeline.run.exam import exam_of
    from duet.stages.evaluate.answers import costs_of, session_of
    from duet.stages.exam.depth import tokens_of
    from duet.stages.exam.exam import Subject
    from duet.stages.questions.requests import fill_prefix

    plain = config.model_copy(
        update={"device": "cpu", "evaluate": config.evaluate.model_copy(update={"control_model": None})}
    )
    exam = exam_of(plain)
    prefix = fill_prefix(config.teacher.prefix, config.topic)
    subject = Subject("teacher", folder, prefix, "base")  # whose prompts are the longest
    session = session_of(folder, exam, [subject])
    prompts = [ids for task in session.tasks(subject) for ids in session.prompts(subject, task)]
    facts_tokens = tokens_of(exam, folder) if config.evaluate.depth else 0
    return costs_of([subject], exam), max(map(len, prompts)) + config.evaluate.max_new_tokens, facts_tokens


def _asked_need(
    sizes: ModelSizes, settings: EvaluateSettings, costs: Mapping[str, Any], longest: int, on: Device
) -> Need:
    """One model's evaluation. Likelihoods read every prompt once more; relearning trains all weights in float32."""
    dtype = sizes.dtype_of(settings.dtype)
    prompt_tokens = sum(cost.prompt_tokens for cost in costs.values()) * (2 if settings.likelihood else 1)
    new_tokens = sum(cost.answer_tokens for cost in costs.values())
    need = reading_need(sizes, dtype, Reading(longest, prompt_tokens, new_tokens, settings.batch_size), on)
    if any(cost.training_steps for cost in costs.values()):
        relearning = {"weights, gradients, AdamW's states, float32, to relearn": 16.0 * sizes.parameters}
        if sum(relearning.values()) > sum(need.parts.values()):
            return replace(need, parts=relearning)
    return need


def _depth_need(sizes: ModelSizes, settings: EvaluateSettings, longest: int, tokens: int, on: Device) -> Need:
    """One model's layers put into base: the model reads the answers once, base once as it is and once per layer."""
    dtype = sizes.dtype_of(settings.dtype)
    need = reading_need(sizes, dtype, Reading(longest, (sizes.layers + 2) * tokens, 0, settings.batch_size), on)
    return replace(need, parts=need.parts | {"weights of base beside them": need.parts["weights"]})


def _smaller(others: Mapping[str, Need], need: Need) -> dict[str, Need]:
    """Those that save at least a hundredth, the least memory last."""
    saving = {text: other for text, other in others.items() if other.total < 0.99 * need.total}
    return dict(sorted(saving.items(), key=lambda item: -item[1].total))
