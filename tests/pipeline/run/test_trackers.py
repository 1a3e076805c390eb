"""Trackers: what TensorBoard's own reader finds in the files, and a package that is not there."""

from __future__ import annotations

import pytest
from support import ROOT

from duet.cache.errors import UserError
from duet.pipeline.run.trackers import check_trackers, flat, tracking
from duet.stages.settings.student import TrainSettings
from duet.stages.student.loop import StepReport

PROBE = {"agreement.forget": 0.5, "agreement.retain": None, "rows": 8, "held_out": True}


def report(step: int, loss: float, probe: dict | None = None) -> StepReport:
    return StepReport(
        step=step, total_steps=3, epoch=step / 3, loss=loss, loss_forget=loss + 1, loss_retain=None, lr=0.1, grad_norm=2.0,
        rows_per_s=10.0, tokens_per_s=100.0, stall_share=0.25, memory_gb=1.5, probe=probe,
    )  # fmt: skip


def test_a_tensorboard_file_holds_every_number_by_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    facts = {"run": "lab", "student": "s", "train": TrainSettings(trackers=("tensorboard",)).model_dump(mode="json")}
    with tracking(("tensorboard",), "lab", "s", tmp_path, facts) as track:
        assert not list(tmp_path.iterdir()), "a student that is done leaves nothing behind"
        for step, loss in ((1, 3.0), (2, 2.0)):
            track(report(step, loss))
        track(report(3, 1.0, PROBE))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def found(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert found("loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert found("loss_forget") == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert found("stall_share") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert found("probe/agreement.forget") == [(3, 0.5)]
    assert "loss_retain" not in events.Tags()["scalars"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"train/lr" in written
    assert str(ROOT).encode() not in written
    assert str(tmp_path).encode() not in written


def test_without_trackers_nothing_is_written(tmp_path):
    with tracking((), "lab", "s", tmp_path, {}) as track:
        track(report(1, 3.0))
    assert not list(tmp_path.iterdir())


def test_nested_values_are_flat_and_what_is_none_is_left_out():
    assert flat({"a": {"b": {"c": 1}, "d": None}, "e": (1, "x"), "f": True}) == {"a/b/c": 1, "e": "1, x", "f": True}


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(())
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(UserError) as caught:
            check_trackers((name,))
        assert name in caught.value.what
        assert caught.value.hint == f"pip install 'duet-unlearn[{name}]'"
