"""What training ends with: nothing is lost when it fails, and what would fail is found before the first step."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from student_jobs import job, train
from support import LAB_SMALL
from tiny_models import ARCHITECTURES, tiny_config, tiny_model
from warm import PROGRAM

from duet.cache.errors import UserError
from duet.cache.files import DiskFull
from duet.stages.models.layers import decoder_layers
from duet.stages.models.loading import load_model, num_parameters
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.student import TrainSettings
from duet.stages.student import train as training
from duet.stages.student.export import disk_errors, try_export


def changed(folder: Path, file: str = "generation_config.json", **entries) -> Path:
    """A copy of the lab's small model with other entries in one of its files."""
    shutil.copytree(LAB_SMALL, folder)
    raw = json.loads((folder / file).read_text()) | entries
    (folder / file).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
        ({"top_k": 10, "min_p": 0.1}, ["min_p", "top_k"]),
        ({"early_stopping": True, "length_penalty": 0.5}, ["early_stopping", "length_penalty"]),
        ({"pad_token_id": -1}, ["pad_token_id"]),
        ({"output_scores": True}, ["output_scores"]),
        ({"do_sample": True, "temperature": 0.9}, []),
    ],
)
def test_flags_that_generation_does_not_read_are_left_out_and_told(tmp_path, store, flags, left_out):
    start = changed(tmp_path / "start", eos_token_id=[2, 3], repetition_penalty=1.1, **flags)
    train(job(tmp_path / "s", start, epochs=1), store)
    assert json.loads((tmp_path / "s/training.json").read_text())["left_out"] == left_out
    exported = json.loads((tmp_path / "s/model/generation_config.json").read_text())
    assert not set(left_out) & {name for name, value in exported.items() if value is not None}
    assert exported["eos_token_id"] == [2, 3]
    assert exported["repetition_penalty"] == 1.1
    assert exported.get("do_sample") == flags.get("do_sample")
    load_model(tmp_path / "s/model")


@pytest.mark.parametrize(
    "flags", [{"num_return_sequences": 2}, {"max_new_tokens": 0}, {"cache_implementation": "shoebox"}]
)
def test_what_cannot_be_saved_again_is_refused_before_the_first_step(tmp_path, store, flags):
    with pytest.raises(UserError, match=r"generation_config\.json cannot be saved again") as found:
        train(job(tmp_path / "s", changed(tmp_path / "start", **flags)), store)
    assert next(iter(flags)) in found.value.what
    assert not (tmp_path / "s").exists()


def test_an_adapter_is_tried_out_with_the_flags_of_its_base(tmp_path, store):
    base, adapter = changed(tmp_path / "base", do_sample=False, temperature=0.9), tmp_path / "adapter"
    adapted = get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter)
    assert try_export(adapter, TrainSettings(), store[1], False) == ["temperature"]
    (base / "generation_config.json").write_text('{"num_return_sequences": 2}')
    with pytest.raises(UserError, match=r"base: its generation_config\.json cannot be saved again"):
        try_export(adapter, TrainSettings(), store[1], False)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_can_be_exported_pass_the_trial(tmp_path, name, lora):
    tiny_model(tiny_config(name, 1268)).save_pretrained(tmp_path)
    assert try_export(tmp_path, TrainSettings(lora=lora), load_tokenizer(LAB_SMALL), False) == []


def test_an_export_that_fails_loses_no_step(tmp_path, store, monkeypatch):
    """With fewer steps than checkpoint_steps, and after an early stop, whose best weights are exported."""
    stopping = {"epochs": 40, "lr": 3e-3, "probe": {"steps": 3, "holdout": 0.2, "patience": 1}}
    for name, settings in {"short": {"epochs": 1}, "stopped": stopping}.items():
        whole, broken = (job(tmp_path / name / of, **settings, checkpoint_steps=500) for of in ("whole", "broken"))
        losses = train(whole, store)

        def fail(*arguments: object) -> None:
            raise RuntimeError("the power went")

        with monkeypatch.context() as patched:
            patched.setattr(training, "export", fail)
            with pytest.raises(RuntimeError, match="the power went"):
                train(broken, store)
        assert train(broken, store) == [], "a step was made again"
        a, b = (load_file(one.student_dir / "model/model.safetensors") for one in (whole, broken))
        assert all(torch.equal(a[key], b[key]) for key in a)
        ours, theirs = (json.loads((one.student_dir / "training.json").read_text()) for one in (whole, broken))
        assert [ours[key] for key in ("curve", "steps", "probe")] == [
            theirs[key] for key in ("curve", "steps", "probe")
        ]
        assert len(ours["curve"]) == len(losses)
        assert not (broken.student_dir / "checkpoints").exists()


KILLED = """
import os, signal, sys, json
from pathlib import Path
import torch
from duet.stages.student import train as training
from duet.cache.location import Folder
from duet.cache.reader import Rank
from duet.stages.student.ranks import Processes
from duet.stages.settings.student import TrainSettings
from duet.cache.watch import Watch
from duet.stages.student.job import StudentJob
from duet.stages.student.train import open_stores, train_student
store, model, folder, settings, moment = sys.argv[1:]
kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the export":
    training.export = kill
elif moment == "in the export":
    import transformers
    saved = transformers.PreTrainedModel.save_pretrained
    def half(self, where, **more):
        saved(self, where, **more)
        if not more:
            kill()
    transformers.PreTrainedModel.save_pretrained = half
elif moment == "after the end":
    training._drop_checkpoints = kill
elif moment == "after the export":
    training.write_summary = kill
torch.set_num_threads(1)
stores, tokenizer = open_stores({"teacher": Folder(Path(store))}, verify=True)
job = StudentJob("s", Path(model), "start", Path(folder), TrainSettings(**json.loads(settings)))
alone, watch = Processes(Rank(), torch.device("cpu")), Watch(lambda report: print(report.step, flush=True))
train_student(job, stores, tokenizer, alone, watch)
"""


@pytest.mark.parametrize("moment", ["before the export", "in the export", "after the export", "after the end"])
def test_a_kill_around_the_export_ends_in_the_same_weights(tmp_path, store, moment):
    def live(folder: Path, moment: str) -> subprocess.CompletedProcess[str]:
        settings = json.dumps({"epochs": 1, "batch_size": 8, "lr": 1e-3})
        return subprocess.run(
            [*PROGRAM, "-c", KILLED, str(store[0].location), str(LAB_SMALL), str(folder), settings, moment],
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert live(tmp_path / "whole", "").returncode == 0
    killed = live(tmp_path / "killed", moment)
    assert killed.returncode == -9, killed.stderr
    assert killed.stdout.split() == ["1", "2", "3"]
    again = live(tmp_path / "killed", "")
    assert again.returncode == 0, again.stderr
    assert again.stdout == "", "a step was made again"
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    assert not (tmp_path / "killed/checkpoints").exists()


def test_a_disk_that_is_too_small_is_told_before_the_first_step(tmp_path, store, monkeypatch):
    monkeypatch.setattr(training, "free_bytes", lambda folder: 10**6)
    with pytest.raises(UserError, match=r"student 's': .* GB are needed") as found:
        train(job(tmp_path / "s"), store)
    assert "make space" in found.value.hint


def test_a_disk_has_room_for_the_checkpoint_that_is_written_before_the_last_is_removed(tmp_path, store, monkeypatch):
    """24 bytes a weight for two checkpoints; 16 for one and the model."""
    weights = num_parameters(LAB_SMALL)
    monkeypatch.setattr(training, "free_bytes", lambda folder: 20 * weights)
    train(job(tmp_path / "one", epochs=1), store)
    with pytest.raises(UserError, match=f"{24 * weights / 1e9:.2f} GB are needed"):
        train(job(tmp_path / "several", epochs=1, checkpoint_steps=1), store)


def test_a_disk_that_fills_up_while_weights_are_written_is_told_and_lost_nothing(tmp_path, store, monkeypatch):
    """A limit on the size of files, at which safetensors fails as on a full disk."""
    whole = train(job(tmp_path / "whole", epochs=1), store)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = training.export

    def limited(*arguments: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(training, "export", limited)
        with pytest.raises(DiskFull, match=r"cannot write .*model") as found:
            train(job(tmp_path / "s", epochs=1), store)
    assert "run the same command again" in found.value.hint
    assert len(whole) == 3
    assert train(job(tmp_path / "s", epochs=1), store) == []


def test_other_faults_of_safetensors_stay_what_they_are():
    from safetensors import SafetensorError

    with pytest.raises(SafetensorError), disk_errors():
        raise SafetensorError("Error while serializing: invalid shape")


def test_decoder_layers_are_the_language_models_beside_a_vision_tower_of_the_same_depth():
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(
        text_config=text | {"num_key_value_heads": 1, "vocab_size": 100}, vision_config=vision, mm_tokens_per_image=4
    )
    with torch.device("meta"):
        model = hf.Gemma3ForConditionalGeneration(config)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    assert len(lists) > 1, "the fixture must tempt the search"
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for one in (model, adapted):
        assert all("Gemma3DecoderLayer" in type(layer).__name__ for layer in decoder_layers(one))
