"""`duet estimate`: every stage of a config, on any GPU, and what to change where it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import LAB_BASE, ROOT

from duet.cache.errors import EXIT_DONE, EXIT_USER
from duet.pipeline.cli.main import main

LARGE = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A directory as of a 3B model, with the lab's tokenizer and without weights."""
    shutil.copytree(LAB_BASE, tmp_path / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "large" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LARGE))
    return str(path.parent)


def estimated(capsys, *arguments: str) -> dict:
    assert main(["estimate", "--json", *arguments]) == EXIT_DONE, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_lab_is_estimated_for_the_machine_that_is_here(lab_config, capsys):
    found = estimated(capsys, "--config", str(lab_config()))
    assert found["fits"]
    assert [stage["stage"] for stage in found["stages"]] == ["teacher", "student base", "evaluation of 3 models"]
    assert found["device"]["kind"] == "cpu"
    for stage in found["stages"]:
        assert stage["bytes"] > sum(stage["parts"].values())
        assert stage["changes"] == {}


def test_what_does_not_fit_is_told_with_what_would(lab_config, large, capsys, tmp_path):
    path = str(lab_config(teacher__model=large, evaluate__control_model=None, teacher__dtype="auto"))
    found = estimated(capsys, "--config", path, "--gpu", "L40S")
    student = next(stage for stage in found["stages"] if stage["stage"] == "student base")
    assert not found["fits"]
    assert not student["fits"]
    sizes = [change["bytes"] for change in student["changes"].values()]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) < student["bytes"]
    assert {name for name, change in student["changes"].items() if change["fits"]} >= {"train.last_layers=7"}
    changed = estimated(capsys, "--config", path, "--gpu", "L40S", "--set", "train.last_layers=7")
    now = next(stage for stage in changed["stages"] if stage["stage"] == "student base")
    assert now["bytes"] == student["changes"]["train.last_layers=7"]["bytes"]
    assert main(["estimate", "--config", path, "--gpu-memory", "4", "--tflops", "50"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "none of these is enough alone" in out
    assert "does NOT fit: teacher, student base, evaluation of 3 models" in out.splitlines()[-1]
    assert "assumed, not measured" in out
    assert not (tmp_path / "runs").exists()


def test_several_gpus_share_what_fsdp_spreads(lab_config, large, capsys):
    path = str(lab_config(teacher__model=large, evaluate__control_model=None, train__parallel="fsdp"))
    one, four = (estimated(capsys, "--config", path, "--gpu", "H100", "--gpus", count) for count in ("1", "4"))
    assert four["stages"][1]["parts"]["gradients"] == pytest.approx(one["stages"][1]["parts"]["gradients"] / 4)


def test_relearning_counts_where_it_is_asked_for(lab_config, large, capsys):
    path = str(lab_config(teacher__model=large, evaluate__control_model=None, evaluate__attacks=["reverse", "relearn"]))
    evaluation = estimated(capsys, "--config", path, "--gpu", "L40S")["stages"][-1]
    assert not evaluation["fits"]
    assert evaluation["changes"]["evaluate.attacks without relearn"]["fits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "B7"], "not in the table"),
        (["--gpu", "T4", "--tflops", "3"], "name the GPU, or describe it"),
        (["--gpu-memory", "24"], "belong together"),
        (["--gpu-memory", "0", "--tflops", "1"], "--gpu-memory"),
    ],
)
def test_faulty_options_are_refused(lab_config, capsys, options, message):
    assert main(["estimate", "--config", str(lab_config()), *options]) == EXIT_USER
    assert message in capsys.readouterr().err


def test_depth_is_counted_by_layers_models_and_tokens(lab_config, capsys):
    """The layers of base, the student and the control are read once each and put into base, L + 1 passes each."""

    def seconds(rows: list[int], **more) -> float:
        path = str(lab_config(data__forget__rows=rows, evaluate__attacks=[], **more))
        return estimated(capsys, "--config", path, "--gpu", "L40S")["stages"][-1]["seconds"]

    def added(rows: list[int], **more) -> float:
        return seconds(rows, evaluate__depth="words", **more) - seconds(rows, **more)

    whole = added([0, 15])
    assert 0 < whole == pytest.approx(added([0, 5]) + added([5, 15]), rel=0.1)
    twice = added([0, 15], students=[{"name": "base"}, {"name": "again", "start_noise": 0.1}])
    assert twice == pytest.approx(whole * 4 / 3)  # base, student, control; and one more


def test_a_chain_is_estimated_request_by_request(lab_config, capsys):
    later = {"name": "next", "topic": "X", "forget": {"path": str(ROOT / "lab/data/heldout.jsonl"), "rows": [0, 5]}}
    found = estimated(capsys, "--config", str(lab_config(chain=[later])))
    names = [stage["stage"] for stage in found["stages"]]
    assert names == ["teacher", "student base", "evaluation of 3 models", *(f"next: {name}" for name in names[:3])]
