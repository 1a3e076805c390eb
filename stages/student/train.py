"""Stage two: one student learns to give the teacher's logits, or several teachers', without ever seeing a prefix.

Reads stores and a model to start from; neither vLLM nor the teacher's weights are ever loaded. Here a student's folder is
claimed, all parts are checked against each other, and the results are written; the training is `duet.stages.student.loop`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duet.cache.errors import UserError, note
from duet.cache.files import free_bytes, publish_json, read_json
from duet.cache.location import Location, local_folder
from duet.cache.manifest import Manifest
from duet.cache.reader import Store
from duet.cache.record import SUBSETS
from duet.cache.watch import Watch
from duet.stages.models.identity import weights_sha256
from duet.stages.models.tokenizers import load_tokenizer, pad_id_of, tokenizer_sha256
from duet.stages.questions.contexts import Contexts
from duet.stages.questions.prompts import Renderer
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.student import CHECKPOINTS_NAME, TrainSettings, check_start_noise, deciding_settings
from duet.stages.student import checkpoint
from duet.stages.student.alone import one_launch
from duet.stages.student.card import student_card
from duet.stages.student.checks import Start, check_settings, loss_by_store
from duet.stages.student.contexts import Wide, check_asked
from duet.stages.student.export import export
from duet.stages.student.job import StudentJob
from duet.stages.student.loop import run_loop, steps_of
from duet.stages.student.losses import LOSSES
from duet.stages.student.model import Student, export_dtype_of
from duet.stages.student.noise import noise_identity
from duet.stages.student.passes import FORGET
from duet.stages.student.probe import Probe, ask, ask_exported
from duet.stages.student.ranks import Processes
from duet.stages.student.summary import TrainingSummary, is_trained, read_summary, seen_by, write_summary
from duet.stages.student.targets import Teachers

IDENTITY_NAME = "student.json"
ROUNDED_OFF = 0.02  # share of forget rows that a student may lose when its weights are rounded, before that is said
OFFSET_TOO = ", though its start weights are damaged: it has the teacher's offset of raw logits to learn as well"


def open_store(location: Location, verify: bool) -> tuple[Store, Any]:
    """A complete store and the teacher's tokenizer, which lies in it."""
    store = Store(location, verify)
    tokenizer = load_tokenizer(local_folder(location, "tokenizer", store.manifest.attachments))
    if tokenizer_sha256(tokenizer) != store.manifest.provenance["tokenizer_sha256"]:
        raise UserError(
            f"{location.name_of('tokenizer')} is not the tokenizer that the store was made with", "make the store again"
        )
    return store, tokenizer


def open_stores(locations: Mapping[str, Location], verify: bool) -> tuple[dict[str, Store], Any]:
    """The stores of a run's teachers, by name, and the tokenizer of all."""
    opened = {name: open_store(location, verify) for name, location in locations.items()}
    stores = {name: store for name, (store, _) in opened.items()}
    (first, expected), *others = ((n, s.manifest.provenance["tokenizer_sha256"]) for n, s in stores.items())
    for name, found in others:
        if found != expected:
            raise UserError(
                f"the stores of {first} and {name} were made with different tokenizers",
                "take teachers of one tokenizer",
            )
    return stores, opened[first][1]


def train_student(
    job: StudentJob, stores: Mapping[str, Store], tokenizer: Any, processes: Processes, watch: Watch
) -> TrainingSummary:
    """Train, or go on training, one student and export it; returns its training.json. All processes call this.

    `stores` are those of the run's teachers, by name; the job's settings say which are used. `tokenizer` is theirs. In the
    first process, `watch.on_progress` gets a StepReport after each step. UserError where the folder belongs to other settings
    or a setting would do nothing; Interrupted (after a checkpoint) when `watch.should_stop()` is true in any process.
    """
    with one_launch(job, processes, watch) as watch_alone:
        return _train(job, stores, tokenizer, processes, watch_alone)


def _train(
    job: StudentJob, stores: Mapping[str, Store], tokenizer: Any, processes: Processes, watch: Watch
) -> TrainingSummary:
    start_sha256 = weights_sha256(job.model_dir)
    teachers = Teachers.of(stores, job.settings)
    loss, reason = chosen_loss(job.settings, start_sha256, teachers.manifests, job.start_noise, teachers.combine)
    teachers = replace(teachers, least_ids=LOSSES[loss].least_ids)
    start = None if is_trained(job.student_dir) else _checked_start(job, teachers, tokenizer, loss, processes)
    comparable = {} if start is None else teachers.comparable()
    contexts = _contexts(job, teachers, tokenizer, start)
    with processes.first_first():
        claim(job, teachers, start_sha256, contexts)
    if start is None:
        _drop_checkpoints(job, processes)  # a kill may have come between training.json and this
        return read_summary(job.student_dir)
    order = teachers.order(job.settings)
    pad_id = pad_id_of(start.tokenizer, start.width)
    wide = contexts and Wide.of(job, contexts, teachers.first, start.eos_ids, processes.device)
    probe = Probe.of(teachers, order, job.settings, pad_id)
    student = Student.of(job, loss, pad_id, processes, wide)
    dtype = export_dtype_of(job.settings, start.config)
    check_room(job.student_dir, student, dtype, steps_of(order, job.settings))
    state, lines = run_loop(job, teachers, order, student, probe, watch)
    if job.settings.probe and job.settings.probe.patience:
        checkpoint.load_parameters(job.student_dir / CHECKPOINTS_NAME / checkpoint.BEST_NAME, student.model)
    summary = TrainingSummary(
        name=job.name,
        start_noise=job.start_noise or None,
        trained_on=list(dict.fromkeys([*seen_by(job.model_dir), *(wide.families if wide else [])])) or None,
        loss=loss,
        loss_reason=reason,
        teachers=teachers.shares(),
        combine=teachers.combine,
        **comparable,
        head=student.head.reason,
        steps=state.step,
        stopped_early=state.step < lines[-1]["total_steps"],
        rows=len(teachers.first) - len(order.held_out),
        train_s=state.train_s,
        rows_per_s=lines[-1]["epoch"] * order.num_slots / state.train_s,
        tokens_per_s=state.tokens / state.train_s,
        stall_share=state.stall_s / state.train_s,
        peak_memory_gb=max(line["memory_gb"] for line in lines),
        parameters=student.num_parameters,
        trained_parameters=student.num_trained,
        processes=processes.rank.world,
        left_out=start.left_out,
        added_ends=start.missing_ends(teachers.manifests),
        curve=[[line["step"], line["loss"]] for line in lines],
        probe=ask(probe, student.answer, processes.device),
    )
    return _finish(job, student, start, Exported(dtype, probe, teachers.manifests, start_sha256), summary)


def _contexts(job: StudentJob, teachers: Teachers, tokenizer: Any, start: Start | None) -> Contexts | None:
    """What the student's questions are put into, where the settings say so; checked where it has still to start."""
    if job.settings.contexts == "none":
        return None
    recorded = teachers.manifests[0].provenance.get("prompt")
    if recorded is None or job.asked is None:
        raise UserError(
            f"student {job.name!r}: train.contexts needs the questions and prompts that the store was made of",
            "train by a config with `duet distill`, on a store that `duet teacher-logits` made; or set train.contexts: none",
        )
    prompt = PromptSettings(**recorded | {"template_name": None})  # the store's tokenizer has the one that is used
    contexts = Contexts(Renderer(tokenizer, prompt), job.asked)
    if start is not None:
        check_asked(contexts, teachers.first)
        start.check_contexts(contexts, job.settings, teachers.first.manifest.max_positions)
    return contexts


def _checked_start(job: StudentJob, teachers: Teachers, tokenizer: Any, loss: str, processes: Processes) -> Start:
    """The model that the student starts from, after all checks that need no weights."""
    manifests = teachers.manifests
    check_start_noise(job.start_noise, job.settings, f"student {job.name!r}")
    check_settings(job.settings, loss, manifests, teachers.combine, processes)
    recorded = manifests[0].provenance.get("prompt")  # another program's store may not say how questions became prompts
    prompt = PromptSettings(**recorded) if recorded else PromptSettings(format="plain", prefix_placement="text")
    start = Start.of(job.model_dir, job.name, job.settings, tokenizer, prompt, job.trust_remote_code)
    for store in teachers.stores.values():
        start.check_store(store)
    return start


def check_room(student_dir: Path, student: Student, dtype: torch.dtype, num_steps: int) -> None:
    """Refuse to begin where the disk has no room for what training keeps: checkpoints, the best weights, and the model.

    A new checkpoint is written before the oldest is removed, and the model beside those that are kept.
    """
    settings = student.settings
    states = 8 if settings.optimizer == "adamw" else 2  # bytes of a weight's two
    checkpoint_bytes, model_bytes = (4 + states) * student.num_trained, dtype.itemsize * student.num_parameters
    num_checkpoints = math.ceil(num_steps / settings.checkpoint_steps)
    more = num_checkpoints > settings.keep_last
    needed = min(num_checkpoints, settings.keep_last) * checkpoint_bytes + max(more * checkpoint_bytes, model_bytes)
    if settings.probe and settings.probe.patience:
        needed += 4 * student.num_trained
    there = sum(path.stat().st_size for path in student_dir.rglob("*") if path.is_file())
    if (free := free_bytes(student_dir)) + there < needed:
        raise UserError(
            f"student {student_dir.name!r}: {needed / 1e9:.2f} GB are needed in {student_dir}, {free / 1e9:.2f} are free",
            "make space, set runs_dir, or train less with train.lora or train.last_layers",
        )


def chosen_loss(
    settings: TrainSettings,
    start_sha256: str,
    manifests: Sequence[Manifest],
    start_noise: float = 0.0,
    combine: str | None = None,
) -> tuple[str, str]:
    """The loss and why: the one of the settings, or on "auto" the one that fits the weights that the student starts from."""
    if settings.loss != "auto":
        offset = start_noise and not LOSSES[settings.loss].offset_free
        return settings.loss, "as the settings say" + (OFFSET_TOO if offset else "")
    if found := loss_by_store(manifests, start_noise, combine):
        return found
    if all(start_sha256 == manifest.provenance["weights_sha256"] for manifest in manifests):
        return "huber_raw", "it starts from the teacher's own weights, so raw logits compare"
    return "huber_centred", "it starts from other weights than the teacher's, whose raw logits have another offset"


def claim(job: StudentJob, teachers: Teachers, start_sha256: str, contexts: Contexts | None = None) -> None:
    """Write down whose folder this is, or refuse a folder that holds another student."""
    identity = {
        "teachers": {name: store.manifest.fingerprint for name, store in teachers.stores.items()},
        "start_weights_sha256": start_sha256,
        "train": deciding_settings(job.settings),
        **noise_identity(job.start_noise),
    }
    if contexts:
        identity["contexts"] = contexts.sha256()
    path = job.student_dir / IDENTITY_NAME
    if path.is_file():
        found = read_json(path)
        differing = [key for key in {**identity, **found} if found.get(key) != identity.get(key)]
        if differing:
            raise UserError(
                f"{job.student_dir} holds another run: {_differences(found, identity, differing)}",
                "give the run or the student another name, or remove the folder if nobody needs it",
            )
        return
    if job.student_dir.exists() and any(job.student_dir.iterdir()):
        raise UserError(f"{job.student_dir} is not empty and does not hold a student", "give the student another name")
    job.student_dir.mkdir(parents=True, exist_ok=True)
    publish_json(path, identity)


def _differences(found: dict[str, Any], expected: dict[str, Any], keys: list[str]) -> str:
    parts = []
    for key in keys:
        if isinstance(expected.get(key), dict):
            before = found.get(key) or {}
            pairs = {k: (before.get(k), expected[key].get(k)) for k in (*expected[key], *before)}
            parts += [f"{key}.{k} is {old!r} there and {new!r} now" for k, (old, new) in pairs.items() if old != new]
        else:
            parts.append(f"{key} is {str(found.get(key))[:16]} there and {str(expected.get(key))[:16]} now")
    return "; ".join(parts)


@dataclass(frozen=True)
class Exported:
    """What the exported model is made and judged by."""

    dtype: torch.dtype
    probe: Probe
    manifests: Sequence[Manifest]
    start_sha256: str


def _finish(
    job: StudentJob, student: Student, start: Start, exported: Exported, summary: TrainingSummary
) -> TrainingSummary:
    """Export the model, write training.json (the sign that the student is done) and drop the checkpoints."""
    model = student.whole_model()

    def card_of(model: Any) -> str:
        nonlocal summary
        if student.has_room_for(exported.dtype):  # else only its trained weights were asked
            asked = ask_exported(summary.probe, exported.probe, model, student.processes.device)
            _say_rounding(job.name, summary.probe, asked, exported.dtype)
            summary = replace(summary, probe=asked)
        return student_card(summary, exported.manifests, job.start_name, exported.start_sha256, job.settings)

    if student.processes.first:
        if summary.added_ends:
            model.generation_config.eos_token_id = [*start.eos_ids, *summary.added_ends]
        export(model, start.tokenizer, job.student_dir, exported.dtype, job.settings.lora, card_of)
        write_summary(job.student_dir, summary)
    _drop_checkpoints(job, student.processes)
    student.processes.wait()
    return summary


def _say_rounding(name: str, trained: Mapping[str, Any], exported: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Warn of a student that, once it is rounded, no longer answers what is to be forgotten as it did in training."""
    before, after = (found[f"agreement.{SUBSETS[FORGET]}"] for found in (trained, exported))
    if before is not None and before - after > ROUNDED_OFF:
        note(
            f"student {name}: {100 * before:.1f} % of the forget rows began as the teacher's in training, {100 * after:.1f} % "
            f"do in {str(dtype).removeprefix('torch.')}, as the model is written: what it learned is smaller than the "
            "rounding; train.export_dtype: float32 keeps it, or a larger rate"
        )


def _drop_checkpoints(job: StudentJob, processes: Processes) -> None:
    if processes.first:
        shutil.rmtree(job.student_dir / CHECKPOINTS_NAME, ignore_errors=True)
