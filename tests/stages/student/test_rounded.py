"""What is said of a student is true of the model that is written, whose weights are rounded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from peft import PeftModel
from student_jobs import TINY, job, train
from support import LAB_SMALL
from tiny_models import noisy, tiny_model
from transformers import AutoModelForCausalLM

from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.lora import LoraSettings
from duet.stages.student import train as training
from duet.stages.student.export import export
from duet.stages.student.probe import Probe, ask_exported
from duet.stages.student.targets import Teachers
from duet.stages.student.train import ROUNDED_OFF, _say_rounding


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, save_adapter=True)])
def test_agreement_is_that_of_the_written_model(tmp_path, store, lora):
    student = job(tmp_path / "student", export_dtype="bfloat16", loss="forward_kl_tail", lr=1e-2, epochs=40, lora=lora)
    train(student, store)
    found = json.loads((student.student_dir / "training.json").read_text())["probe"]
    model = AutoModelForCausalLM.from_pretrained(student.student_dir / "model")
    assert model.dtype == torch.bfloat16
    teachers = Teachers.of({"teacher": store[0]}, student.settings)
    agree: dict[int, list[bool]] = {0: [], 1: []}
    probe = Probe.of(teachers, teachers.order(student.settings), student.settings, 0)
    of_the_written = ask_exported({"loss": found["loss"], "agreement.forget": -1.0}, probe, model, torch.device("cpu"))
    shares = {key: value for key, value in found.items() if key.startswith(("agreement.", "refusal."))}
    assert of_the_written == shares | {"loss": found["loss"]}
    for one in probe.passes:
        batch, first_N = one.batch, one.is_first_N
        with torch.no_grad():
            logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        top1_N = logits_BTV[batch.batch_index_N, batch.position_N].argmax(-1)
        for subset, same in zip(one.subset_N[first_N], (top1_N == one.topk_ids_NK[:, 0])[first_N], strict=True):
            agree[int(subset)].append(bool(same))
    assert found["agreement.forget"] == pytest.approx(sum(agree[0]) / len(agree[0]))
    assert found["agreement.retain"] == pytest.approx(sum(agree[1]) / len(agree[1]))
    assert any(agree[0] + agree[1])
    assert (student.student_dir / "adapter" / "README.md").is_file() == bool(lora)


@pytest.mark.parametrize("frozen", [{"lora": {"rank": 4}}, {"last_layers": 1}, {"lora": {"rank": 4, "base_bits": 4}}])
def test_a_student_with_frozen_weights_is_asked_as_it_is_written(tmp_path, store, monkeypatch, frozen):
    asked = {"agreement.forget": 0.25, "agreement.retain": 0.75}
    monkeypatch.setattr(training, "ask_exported", lambda trained, *of_the_written: {**trained, **asked})
    train(job(tmp_path / "s", epochs=1, dtype="bfloat16", export_dtype="bfloat16", **frozen), store)
    assert asked.items() <= json.loads((tmp_path / "s/training.json").read_text())["probe"].items()
    assert "forget 25.0 %, retain 75.0 %" in (tmp_path / "s/model/README.md").read_text()


def test_adapters_and_their_base_are_rounded_together(tmp_path, store):
    """Of a start in float32. Small changes are lost where the base is rounded before: the sum then rounds back to it."""
    start, lora = tmp_path / "start", LoraSettings(rank=4, save_adapter=True)
    shutil.copytree(LAB_SMALL, start)
    noisy(load_model(LAB_SMALL, "float32")).save_pretrained(start)
    train(job(tmp_path / "s", start, export_dtype="bfloat16", epochs=1, lora=lora), store)
    written = load_model(tmp_path / "s/model").state_dict()
    exact = PeftModel.from_pretrained(load_model(start), tmp_path / "s/adapter").merge_and_unload().state_dict()
    assert exact["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    assert [name for name, weight in written.items() if not torch.equal(weight, exact[name].bfloat16())] == []


def test_what_transformers_keeps_in_float32_is_not_rounded(tmp_path):
    """The bias by which a router of DeepSeek's chooses experts."""
    widths = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    model = tiny_model(hf.DeepseekV3Config(**TINY, **widths, **experts, first_k_dense_replace=1))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = model.state_dict()[name].normal_().clone()
    export(model, load_tokenizer(LAB_SMALL), tmp_path, torch.bfloat16, None, lambda model: "")
    written = load_model(tmp_path / "model")
    assert written.dtype == torch.bfloat16
    assert torch.equal(written.state_dict()[name], exact)


def test_a_student_that_is_rounded_off_is_said(caplog):
    caplog.set_level("INFO")
    asked = [{"agreement.forget": share} for share in (1.0, 0.25, 1 - ROUNDED_OFF / 2)]
    _say_rounding("full", asked[0], asked[2], torch.bfloat16)
    assert not caplog.text
    _say_rounding("full", asked[0], asked[1], torch.bfloat16)
    assert (
        "student full: 100.0 % of the forget rows began as the teacher's in training, 25.0 % do in bfloat16"
        in caplog.text
    )
