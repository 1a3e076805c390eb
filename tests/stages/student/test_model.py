"""What is trained, in which dtype, with which options, and that the exported model is the trained one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from student_jobs import ONE, job, train
from support import LAB_SMALL
from test_passes import targets

from duet.cache.errors import UserError
from duet.stages.models.layers import decoder_layers
from duet.stages.models.loading import load_model
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.student import FREE_TRAIN, LOSS_OPTIONS, TrainSettings
from duet.stages.student.checks import check_settings
from duet.stages.student.head import losses_at
from duet.stages.student.losses import LOSSES
from duet.stages.student.model import Student, load_trainable, trained
from duet.stages.student.passes import passes_of

PARTS = {
    "lora": {"lora": {"rank": 4}},
    "frozen embeddings": {"freeze_embeddings": True},
    "last layer": {"last_layers": 1},
}


def student(**train) -> Student:
    return Student.of(job(Path("unused"), lr=1e-2, **train), "huber_centred", pad_id=0, processes=ONE)


def step(a_student: Student) -> None:
    for one in passes_of(targets(8), a_student.settings, a_student.pad_id):
        loss_N, _ = losses_at(one, a_student.module, a_student.loss, a_student.autocast())
        loss_N.sum().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", [*PARTS, "whole"])
def test_gradients_reach_what_is_trained_and_nothing_else(part, checkpointing):
    """With gradient checkpointing too: adapters under frozen embeddings are where reentrant checkpoints lose gradients."""
    a_student = student(**PARTS.get(part, {}), gradient_checkpointing=checkpointing)
    step(a_student)
    for name, parameter in a_student.model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:  # B starts at 0, so A has no gradient in the first step
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        assert parameter.requires_grad or parameter.grad is None, name
    expected = {
        "lora": lambda name: "lora_" in name,
        "frozen embeddings": lambda name: "embed_tokens" not in name and "lm_head" not in name,
        "last layer": lambda name: ".layers.2." in name,
        "whole": lambda name: True,
    }[part]
    assert set(trained(a_student.model)) == {n for n, _ in a_student.model.named_parameters() if expected(n)}


@pytest.mark.parametrize("part", [*PARTS, "whole"])
def test_gradient_checkpointing_changes_no_gradient(part):
    gradients = []
    for checkpointing in (False, True):
        a_student = student(**PARTS.get(part, {}), gradient_checkpointing=checkpointing)
        step(a_student)
        assert a_student.model.is_gradient_checkpointing == checkpointing
        gradients.append({n: p.grad for n, p in trained(a_student.model).items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_frozen_matrices_have_the_forward_passs_dtype_and_trained_weights_float32():
    model = load_trainable(LAB_SMALL, "s", TrainSettings(lora={"rank": 2}), torch.bfloat16, False, uniform=False)
    dtypes = {(p.requires_grad, p.ndim > 1): set() for p in model.parameters()}
    for p in model.parameters():
        dtypes[p.requires_grad, p.ndim > 1].add(p.dtype)
    assert dtypes == {(True, True): {torch.float32}, (False, True): {torch.bfloat16}, (False, False): {torch.float32}}
    uniform = load_trainable(LAB_SMALL, "s", TrainSettings(lora={"rank": 2}), torch.bfloat16, False, uniform=True)
    assert {p.dtype for p in uniform.parameters()} == {torch.float32}


@pytest.mark.parametrize("option", [*PARTS, "adamw8bit", "bfloat16", "gradient_checkpointing", "whole"])
def test_each_option_learns_and_exports_what_it_learned(tmp_path, store, option):
    options = PARTS | {
        "adamw8bit": {"optimizer": "adamw8bit"},
        "bfloat16": {"dtype": "bfloat16"},
        "gradient_checkpointing": {"gradient_checkpointing": True},
    }
    a_job = job(tmp_path / "s", lr=1e-2, export_dtype="float32", **options.get(option, {}))
    losses = train(a_job, store)
    assert losses[-1] < losses[0]
    summary = json.loads((tmp_path / "s/training.json").read_text())
    whole = option in ("adamw8bit", "bfloat16", "gradient_checkpointing", "whole")
    assert (summary["trained_parameters"] == summary["parameters"]) == whole
    before, after = load_model(LAB_SMALL, "float32"), load_model(tmp_path / "s/model", "float32")
    assert {n for n, _ in after.named_parameters()} == {n for n, _ in before.named_parameters()}
    changed = {
        n
        for (n, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed
    assert whole or "model.embed_tokens.weight" not in changed
    assert option != "last layer" or all(".layers.2." in name for name in changed)


def test_the_merged_model_is_the_base_with_its_adapter(tmp_path, store):
    from peft import PeftModel

    lora = {"rank": 4, "save_adapter": True, "dropout": 0.1}
    train(job(tmp_path / "s", lr=1e-2, export_dtype="float32", lora=lora), store)
    merged = load_model(tmp_path / "s/model", "float32")
    adapted = PeftModel.from_pretrained(load_model(LAB_SMALL, "float32"), tmp_path / "s/adapter").eval()
    ids_BT = torch.arange(5, 25)[None]
    with torch.no_grad():
        base, ours, theirs = (m(ids_BT).logits for m in (load_model(LAB_SMALL, "float32"), merged, adapted))
    assert torch.allclose(ours, theirs, atol=1e-3)
    assert (ours - base).abs().max() > 0.1
    config = json.loads((tmp_path / "s/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small", "a private path was written"
    assert str(LAB_SMALL) not in (tmp_path / "s/adapter/README.md").read_text()


@pytest.mark.parametrize("part", PARTS)
def test_frozen_weights_are_exported_as_they_were_whatever_the_forward_passs_dtype(tmp_path, store, part):
    start = load_model(LAB_SMALL, "float32")
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(1.001)  # no longer exact in bfloat16
    start.save_pretrained(tmp_path / "start")
    load_tokenizer(LAB_SMALL).save_pretrained(tmp_path / "start")
    train(job(tmp_path / "s", tmp_path / "start", dtype="bfloat16", epochs=1, **PARTS[part]), store)
    exported = load_model(tmp_path / "s/model", "float32")
    assert torch.equal(exported.get_input_embeddings().weight, start.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "options",
    [{"lora": {"rank": 4, "dropout": 0.3}}, {"lora": {"rank": 4, "base_bits": 4}}, {"optimizer": "adamw8bit"}],
)
def test_resume_is_exact_with_dropout_a_packed_base_and_eight_bit_states(tmp_path, store, options):
    whole = train(job(tmp_path / "whole", lr=1e-2, **options), store)
    broken = job(tmp_path / "broken", lr=1e-2, **options)
    with pytest.raises(BaseException, match="step 4 of 9"):
        train(broken, store, stop_after=4)
    assert train(broken, store) == whole[4:]
    a, b = (load_file(tmp_path / d / "model/model.safetensors") for d in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_compiled_layers_give_the_same_losses(tmp_path, store):
    plain = train(job(tmp_path / "plain", epochs=1), store)
    compiled = train(job(tmp_path / "compiled", epochs=1, compile=True), store)
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_lora_that_cannot_be_is_refused(tmp_path):
    def load(**lora: object) -> None:
        load_trainable(Path(LAB_SMALL), "s", TrainSettings(lora={"rank": 2, **lora}), torch.float32, False, False)

    with pytest.raises(UserError, match="targets: the model has no module 'c_attn'") as found:
        load(targets=["c_attn"])
    assert "q_proj" in found.value.hint
    for tied in ({"targets": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}):
        with pytest.raises(UserError, match="tied to its embeddings"):
            load(**tied)
    with pytest.raises(UserError, match="last_layers is 9, the model has 3"):
        load_trainable(Path(LAB_SMALL), "s", TrainSettings(last_layers=9), torch.float32, False, False)


def test_decoder_layers_are_found_through_adapters():
    model = load_trainable(LAB_SMALL, "s", TrainSettings(lora={"rank": 2}), torch.float32, False, False)
    assert len(decoder_layers(model)) == 3
    assert all("DecoderLayer" in type(layer).__name__ for layer in decoder_layers(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 2.0}, "temperature does nothing with loss auto"),
        ({"loss": "mse", "huber_delta": 1.0}, "huber_delta does nothing with loss mse"),
        ({"lora": {"rank": 2}, "last_layers": 1}, "last_layers does nothing with lora"),
        ({"lora": {"rank": 2}, "freeze_embeddings": True}, "freeze_embeddings does nothing with lora"),
        ({"last_layers": 2, "freeze_embeddings": True}, "freeze_embeddings does nothing with last_layers"),
        ({"probe": {"steps": 5, "patience": 2}}, "patience does nothing without held-out rows"),
        ({"lora": {"alpha": 4.0}}, "rank"),
        ({"forget_share": 1.0, "retain_weight": 2.0}, "retain_weight does nothing with forget_share 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 6}, "top_k is 6, the store has 5"),
        ({"parallel": "fsdp"}, "fsdp does nothing with one process"),
    ],
)
def test_settings_that_the_store_cannot_serve_are_refused(tmp_path, store, settings, message):
    with pytest.raises(UserError, match=message):
        train(job(tmp_path / "s", **settings), store)
    assert not (tmp_path / "s").exists()


def test_a_store_without_log_sum_exps_is_refused_by_losses_that_need_them(store):
    manifest = replace(store[0].manifest, logsumexp=False)
    for loss in ("forward_kl_tail", "reverse_kl_tail"):
        with pytest.raises(UserError, match="needs the teacher's log-sum-exp"):
            check_settings(TrainSettings(loss=loss), loss, [manifest], None, ONE)
    check_settings(TrainSettings(loss="jsd_topk"), "jsd_topk", [manifest], None, ONE)


def test_weights_that_would_do_nothing_are_refused(store):
    one_subset = replace(store[0].manifest, subsets={"forget": 20, "retain": 0})
    with pytest.raises(UserError, match="forget_weight does nothing"):
        check_settings(TrainSettings(forget_weight=2.0), "mse", [one_subset], None, ONE)
    one_position = replace(store[0].manifest, positions=20)
    with pytest.raises(UserError, match="position_decay does nothing"):
        check_settings(TrainSettings(position_decay=0.5), "mse", [one_position], None, ONE)


def test_settings_name_the_losses_that_there_are_and_their_options():
    names = set(get_args(TrainSettings.model_fields["loss"].annotation)) - {"auto"}
    assert names == LOSSES.keys()
    for option, losses in LOSS_OPTIONS.items():
        assert set(losses) - {"auto"} == {name for name, loss in LOSSES.items() if loss.option == option}
    assert set(TrainSettings.model_fields) >= set(FREE_TRAIN)
