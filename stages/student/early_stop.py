"""Probes while a student trains, and when they end its training before the last step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from duet.stages.settings.student import TrainSettings
from duet.stages.student import checkpoint
from duet.stages.student.checkpoint import TrainingState
from duet.stages.student.model import Student
from duet.stages.student.probe import Probe, ask


def probed_after(
    probe: Probe, student: Student, state: TrainingState, total: int, checkpoint_dir: Path
) -> tuple[TrainingState, dict[str, Any] | None]:
    """The state, and the result of a probe where one is due after this step."""
    settings = student.settings.probe
    if settings is None or (state.step % settings.steps and state.step != total):
        return state, None
    found = ask(probe, student.answer, student.processes.device)
    if settings.patience:
        state = _judged(state, found["loss"], checkpoint_dir, student)
    if settings.stop_within is not None and probe.watched_loss and found[probe.watched_loss] <= settings.stop_within:
        state = replace(state, is_close=True)
        if settings.patience:  # then the best are exported: these
            checkpoint.save_best(checkpoint_dir, student.model, student.processes)
    return state, found


def is_over(state: TrainingState, settings: TrainSettings) -> bool:
    """Whether the probes have ended the training."""
    patience = settings.probe.patience if settings.probe else None
    return state.is_close or (patience is not None and state.probes_since >= patience)


def _judged(state: TrainingState, loss: float, checkpoint_dir: Path, student: Student) -> TrainingState:
    """Keep the weights where the loss on held-out rows is the lowest so far, and count the probes since."""
    if state.best_loss is not None and not loss < state.best_loss:  # a loss that is not a number is not better
        return replace(state, probes_since=state.probes_since + 1)
    checkpoint.save_best(checkpoint_dir, student.model, student.processes)
    return replace(state, best_loss=loss, probes_since=0)
