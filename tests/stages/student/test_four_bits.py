"""A base in four bits: the packed student is the one that is saved, and what cannot be packed is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from student_jobs import ONE, job, train
from support import LAB_SMALL, LAB_VOCAB_SIZE
from tiny_models import tiny_model

from duet.cache.errors import UserError
from duet.stages.cost.gpus import Device
from duet.stages.cost.memory import StudentOnMeta
from duet.stages.models.loading import load_model
from duet.stages.settings.student import TrainSettings, deciding_settings
from duet.stages.student.checks import check_settings
from duet.stages.student.export import try_export
from duet.stages.student.four_bits import num_weights, round_base
from duet.stages.student.model import Student, load_trainable

LORA = {"rank": 4, "base_bits": 4}


def loaded(packed: bool, dtype: torch.dtype = torch.float32, model_dir: Path = LAB_SMALL) -> Any:
    return load_trainable(model_dir, "s", TrainSettings(lora=LORA), dtype, False, uniform=not packed)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def test_the_packed_base_computes_with_the_values_that_are_exported():
    packed, plain = (logits(loaded(one).eval()) for one in (True, False))
    exact = logits(load_model(LAB_SMALL, "float32"))
    assert torch.allclose(packed, plain, atol=1e-4)
    assert (packed - exact).abs().max() > 0.05, "nothing was rounded"


def test_only_the_decoders_linear_layers_are_packed():
    model = loaded(packed=True)
    names = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.dtype == torch.uint8}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-3] for name in names} == set(linear)
    plain = load_model(LAB_SMALL)
    assert len(names) == len(linear) * plain.config.num_hidden_layers
    assert sum(map(num_weights, model.base_model.model.parameters())) > sum(p.numel() for p in plain.parameters())


def test_the_saved_student_is_the_trained_one(tmp_path, store):
    """Its base is the rounded one, at the weights too that have no adapter; what was trained alone differs from that."""
    lora = LORA | {"save_adapter": True, "targets": ["q_proj"]}
    losses = train(job(tmp_path / "s", lr=1e-2, export_dtype="float32", lora=lora), store)
    assert losses[-1] < losses[0]
    saved = load_file(tmp_path / "s/model/model.safetensors")
    adapter = load_file(tmp_path / "s/adapter/adapter_model.safetensors")
    base = load_model(LAB_SMALL, "float32")
    exact = {name: value.clone() for name, value in base.state_dict().items()}
    round_base(base, TrainSettings(lora=lora).lora, torch.float32, packed=False)
    for name, value in base.state_dict().items():
        if name not in saved:
            continue
        key = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = (adapter.get(f"{key}.lora_{side}.weight") for side in "AB")
        assert (down is not None) == ("q_proj" in name)
        expected = value if down is None or up is None else value + 2 * up @ down
        assert torch.allclose(saved[name], expected, atol=1e-6), name
        assert torch.equal(exact[name], value) == ("_proj" not in name), name


def test_a_whole_model_of_a_packed_student_gives_its_logits():
    a_job = job(Path("unused"), lora=LORA)
    student = Student.of(a_job, "huber_centred", pad_id=0, processes=ONE)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    whole = student.whole_model()
    assert whole is not student.model
    assert torch.allclose(logits(whole.eval()), logits(student.model.eval()), atol=1e-3)
    assert student.num_parameters == sum(p.numel() for p in whole.parameters())


def test_the_estimate_knows_the_bytes():
    device = Device("a", "cpu", 1e9, 1e12, 1e12, 1e10, False, "a test")
    on_meta = StudentOnMeta.of(LAB_SMALL, TrainSettings(lora=LORA), device, 1, False)
    held = sum(p.numel() * p.element_size() for p in loaded(packed=True).parameters())
    states = [p.quant_state for p in loaded(packed=True).parameters() if p.dtype == torch.uint8]
    held += sum(s.absmax.numel() + 4 * s.state2.absmax.numel() for s in states)
    assert on_meta.weight_bytes() == held
    plain = StudentOnMeta.of(LAB_SMALL, TrainSettings(lora={"rank": 4}), device, 1, False)
    assert on_meta.weight_bytes() < plain.weight_bytes() / 2


def test_a_student_of_before_is_found_again():
    assert "base_bits" not in deciding_settings(TrainSettings(lora={"rank": 4}))["lora"]
    assert deciding_settings(TrainSettings(lora=LORA))["lora"]["base_bits"] == 4


def test_what_cannot_be_packed_is_refused(tmp_path, store, monkeypatch):
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=LAB_VOCAB_SIZE)
    tiny_model(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"base_bits: transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        try_export(tmp_path / "gpt2", TrainSettings(lora=LORA), store[1], False)
    settings = TrainSettings(lora=LORA, parallel="fsdp")
    with pytest.raises(UserError, match="base_bits: a base in 4 bits cannot be spread"):
        check_settings(settings, "huber_raw", [store[0].manifest], None, None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="base_bits: 4 needs bitsandbytes"):
        try_export(LAB_SMALL, TrainSettings(lora=LORA), store[1], False)
