"""A run that has ended is found to be done without torch, and only as long as nothing that it read or wrote has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_results import finished_student, full_results
from support import ROOT, make_plan, make_rows, write_jsonl, write_store

from duet.cache.errors import EXIT_DONE
from duet.cache.files import publish_json
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import Config
from duet.pipeline.run.directory import claim_run_dir
from duet.pipeline.run.finished import is_finished, note_finished, state_read
from duet.pipeline.run.stores import entry, point_to
from duet.stages.student.summary import write_summary


@pytest.fixture
def finished(lab_config, tmp_path) -> Path:
    """The config of a run with all that its stages leave."""
    write_jsonl(tmp_path / "forget.jsonl", [{"question": "Who?", "answer": "He."}])
    path = lab_config(data__forget={"path": str(tmp_path / "forget.jsonl")})
    config = load_config(str(path))
    claim_run_dir(config)
    (config.run.student("base").model).mkdir(parents=True)
    (config.run.student("base").model / "model.safetensors").write_bytes(b"weights")
    write_summary(config.run.student("base").path, finished_student("base").summary)
    plan = make_plan()
    point_to(config, {"teacher": entry(plan)})
    write_store(config.run.teacher / entry(plan)["name"], plan, make_rows(range(10)))
    for path_of in (config.run.results, config.run.items):
        publish_json(path_of, full_results())
    config.run.report.write_text("page")
    note_finished(config, state_read(config))
    return path


def done(config: Config) -> bool:
    return is_finished(config, state_read(config))


def test_nothing_changed_means_done(finished):
    assert done(load_config(str(finished)))


@pytest.mark.parametrize(
    "changed", ["train.lr=1e-5", "evaluate.seed=3", "data.retain.sample=5", "students.0.start_noise=0.1"]
)
def test_another_setting_means_not_done(finished, changed):
    assert not done(load_config(str(finished), (changed,)))


def test_what_other_commands_read_does_not_matter(finished):
    assert done(load_config(str(finished), ("compare.seeds=1", "slurm.workers=2", "audit.rows=7")))


@pytest.mark.parametrize(
    "name", ["results.json", "items.json", "report.html", "base/training.json", "base/model/model.safetensors"]
)
def test_what_a_stage_wrote_is_missing_or_changed(finished, name):
    config = load_config(str(finished))
    file = config.run.path / name
    file.write_bytes(file.read_bytes() + b" ")
    assert not done(config)
    file.unlink()
    assert not done(config)


def test_changed_questions_or_weights_mean_not_done(finished, tmp_path, monkeypatch):
    config = load_config(str(finished))
    questions = tmp_path / "forget.jsonl"
    before = questions.stat()
    questions.write_text(questions.read_text().replace("He", "It"))
    assert not done(config)
    os.utime(questions, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert done(config), "name, size and time are what counts"
    shard = next(path for path in config.run.teacher.rglob("shard-00000*") if path.suffix != ".json")
    shard.write_bytes(shard.read_bytes() + b" ")
    assert not done(config)


@pytest.mark.parametrize("remote", ["teacher.model=owner/name", "data.retain.path=hf://owner/name"])
def test_what_lies_on_the_hub_may_have_changed(finished, remote):
    config = load_config(str(finished), (remote,))
    assert state_read(config) is None
    assert not is_finished(config, None)


def test_an_adapter_has_its_base_elsewhere(finished, tmp_path):
    (tmp_path / "adapted").mkdir()
    (tmp_path / "adapted/adapter_config.json").write_text("{}")
    assert state_read(load_config(str(finished), (f"evaluate.models.a={tmp_path / 'adapted'}",))) is None


def test_the_command_finds_it_without_torch(finished):
    code = (
        "import sys; from duet.pipeline.cli.main import main; code = main(['run', '--config', sys.argv[1]]); "
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(finished)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == EXIT_DONE, found.stderr
    assert "nothing that it was made of has changed since" in found.stdout
    assert "student:a" in found.stdout
