"""Models that were made elsewhere, through the command line."""

from __future__ import annotations

import json

import pytest
from conftest import LAB_BASE, LAB_SMALL
from test_cli import refused, small_run

from cache.errors import EXIT_DONE
from pipeline.cli import main

pytestmark = pytest.mark.usefixtures("_restore_signals")


@pytest.fixture(name="_restore_signals")
def restore_signals(monkeypatch):
    import signal

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_any_checkpoint_is_scored_without_a_stage_before(lab_config, tmp_path):
    config = str(small_run(lab_config, tmp_path, evaluate__attacks=[], evaluate__likelihood=False))
    assert main(["evaluate", "--config", config, "--model", str(LAB_SMALL), "--model", f"same={LAB_BASE}"]) == EXIT_DONE
    text = (tmp_path / "runs/lab/results.json").read_text()
    results = json.loads(text)
    assert list(results["models"]) == ["base", "teacher", "model:small", "model:same"]
    assert results["models"]["model:same"] == results["models"]["base"]
    assert results["performance_shift"]["model:same"]["value"] == 0
    assert str(LAB_SMALL) not in text
    assert "model:small" in (tmp_path / "runs/lab/report.html").read_text()


def test_a_name_given_twice_and_students_beside_models_are_refused(lab_config, capsys):
    config = str(lab_config())
    twice = ("--model", f"a={LAB_SMALL}", "--model", f"a={LAB_BASE}")
    assert "there is a model 'a' already" in refused(capsys, "evaluate", "--config", config, *twice)[0]
    both = ("--model", str(LAB_SMALL), "--only", "base")
    assert "leaves the students out" in refused(capsys, "evaluate", "--config", config, *both)[0]
    assert "evaluate.models.x" in refused(capsys, "evaluate", "--config", config, "--model", "x=/nowhere")[0]
