"""`duet evaluate --jobs`: models that are asked at the same time, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import small_run
from support import LAB_ORACLE, LAB_SMALL, run_duet

from duet.cache.errors import EXIT_DONE, EXIT_USER


@pytest.fixture
def command(lab_config, tmp_path) -> list[str]:
    """Base, its teacher, another model and a control, under an attack by prompts and one on the weights."""
    relearn = {"pairs": [1], "benign": 0, "lrs": [1e-3], "steps": [1]}
    config = small_run(
        lab_config, tmp_path, evaluate__attacks=["reverse", "relearn"], evaluate__relearn=relearn,
        evaluate__control_model=str(LAB_ORACLE), evaluate__sets={}, evaluate__likelihood=True,
    )  # fmt: skip
    return ["evaluate", "--config", str(config), "--model", f"other={LAB_SMALL}"]


def results_in(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "lab" / "results.json").read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if key not in ("created", "environment", "provenance")}


def test_models_asked_at_a_time_say_what_they_say_one_after_the_other(command, tmp_path):
    alone = run_duet(*command, "--set", f"runs_dir={tmp_path / 'alone'}")
    assert alone.returncode == EXIT_DONE, alone.stderr
    together = run_duet(*command, "--set", f"runs_dir={tmp_path / 'together'}", "--jobs", "2")
    assert together.returncode == EXIT_DONE, together.stderr
    assert "asking 3 models, 2 at a time" in together.stdout
    assert results_in(tmp_path / "together") == results_in(tmp_path / "alone")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("together/lab/answers/**/*.json")}
    assert {path.stem for path in written} >= {"base", "teacher", "model-other", "control"}
    again = run_duet(*command, "--set", f"runs_dir={tmp_path / 'together'}")
    assert again.returncode == EXIT_DONE
    assert {path: path.stat().st_mtime_ns for path in written} == written, "nobody was asked again"


def test_a_model_that_cannot_be_asked_ends_the_command(command, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in LAB_SMALL.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    found = run_duet(*command, "--model", f"broken={broken}", "--jobs", "2", "--set", f"runs_dir={tmp_path / 'runs'}")
    assert found.returncode == EXIT_USER
    assert "broken" in found.stderr
    assert not (tmp_path / "runs/lab/results.json").exists()
