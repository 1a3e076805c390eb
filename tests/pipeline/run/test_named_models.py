"""Models that were made elsewhere, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import refused, small_run
from peft import LoraConfig, get_peft_model
from support import LAB_BASE, LAB_SMALL

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.pipeline.cli.main import main
from duet.pipeline.run.named_models import model_name
from duet.stages.models.identity import weights_sha256
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer

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


def test_a_model_is_called_as_its_folder_and_a_student_by_its_own_name(tmp_path):
    student = tmp_path / "first" / "model"
    student.mkdir(parents=True)
    assert model_name(str(student)) == "model"
    (student.parent / "training.json").write_text("{}")
    assert model_name(str(student)) == "first"
    assert model_name(str(student.parent)) == "first"
    assert model_name({"model": "owner/llama", "adapter": str(student)}) == "owner/llama + first"


def saved_again(folder: Path) -> Path:
    """The lab's base, in shards and with its defaults written out."""
    load_model(LAB_BASE).save_pretrained(folder, max_shard_size="200KB")
    load_tokenizer(LAB_BASE).save_pretrained(folder)
    return folder


def adapter_of_base(folder: Path) -> Path:
    adapted = get_peft_model(load_model(LAB_BASE), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(LAB_BASE)
    adapted.save_pretrained(folder)
    return folder


def test_a_student_of_the_same_weights_in_shards_is_the_bases(lab_config, tmp_path):
    students = [{"name": "again", "model": str(saved_again(tmp_path / "sharded"))}]
    few = {"evaluate__attacks": [], "evaluate__likelihood": False}
    config = str(small_run(lab_config, tmp_path, students=students, **few))
    for stage in ("teacher-logits", "distill", "evaluate"):
        assert main([stage, "--config", config]) == EXIT_DONE
    run = tmp_path / "runs/lab"
    assert json.loads((run / "again/training.json").read_text())["loss"] == "huber_raw"
    assert list(json.loads((run / "results.json").read_text())["models"]) == ["base", "teacher", "student:again"]


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_an_adapter_is_a_teacher_a_start_and_a_model(lab_config, tmp_path, lora):
    adapter = adapter_of_base(tmp_path / "tuned")
    both = {"model": str(LAB_BASE), "adapter": str(adapter)}
    few = {"evaluate__attacks": [], "evaluate__likelihood": False, "evaluate__models": {"both": both}}
    config = str(small_run(lab_config, tmp_path, teacher__model=str(adapter), train__lora=lora, **few))
    for stage in ("teacher-logits", "distill"):
        assert main([stage, "--config", config]) == EXIT_DONE
    assert main(["evaluate", "--config", config, "--model", f"named={adapter}"]) == EXIT_DONE
    run = tmp_path / "runs/lab"
    text = (run / "results.json").read_text()
    results = json.loads(text)
    assert str(tmp_path) not in text
    of_base = results["models"]["base"]
    assert results["models"]["model:both"] == results["models"]["model:named"] == of_base
    hashes = {name: of["weights_sha256"] for name, of in results["provenance"]["models"].items()}
    assert hashes["base"] == hashes["model:both"] == hashes["model:named"] == weights_sha256(adapter)
    student = next(run.glob("*/training.json")).parent
    assert json.loads((student / "training.json").read_text())["loss"] == "huber_raw"
    assert (student / "model/config.json").is_file()
    assert not (student / "model/adapter_config.json").exists()
    assert load_model(student / "model")


def test_a_base_and_an_adapter_can_be_given_for_the_teacher_and_faults_in_them_are_told(lab_config, tmp_path, capsys):
    adapter = adapter_of_base(tmp_path / "tuned")
    config = str(small_run(lab_config, tmp_path))
    both = f"teacher.model={{model: {LAB_BASE}, adapter: {adapter}}}"
    assert main(["teacher-logits", "--config", config, "--set", both, "--dry-run"]) == EXIT_DONE
    assert main(["estimate", "--config", config, "--set", both]) == EXIT_DONE
    assert main(["doctor", "--config", config, "--set", both]) == EXIT_DONE
    capsys.readouterr()
    half = f"teacher.model={{model: {LAB_BASE}}}"
    assert "teacher.model.adapter is missing" in refused(capsys, "teacher-logits", "--config", config, "--set", half)[0]
    number = ("--set", "teacher.model=5")
    assert "teacher.model: Input should be a valid string" in refused(capsys, "distill", "--config", config, *number)[0]


def quantised(folder: Path, method: str) -> Path:
    """A config that says so is enough."""
    shutil.copytree(LAB_BASE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": method, "bits": 4}})
    )
    return folder


def test_quantised_models_are_refused_before_stage_one(lab_config, tmp_path, capsys):
    gptq = str(quantised(tmp_path / "gptq", "gptq"))
    config = str(small_run(lab_config, tmp_path))
    asked = ("--config", config, "--set", f"teacher.model={gptq}", "--set", "teacher.engine=transformers")
    what, hint = refused(capsys, "teacher-logits", *asked)
    assert "gptq" in what
    assert "optimum" in what
    assert "16-bit weights" in hint
    start = ("--config", config, "--set", f"students.0.model={gptq}")
    for command in ("teacher-logits", "run"):
        assert "packed weights cannot be trained" in refused(capsys, command, *start)[0]
    assert main(["doctor", *asked]) == EXIT_USER
    assert "FAILED              teacher.model: " in capsys.readouterr().out
    assert main(["doctor", *start]) == EXIT_USER
    assert not (tmp_path / "runs/lab").exists()
