"""Estimates of memory against real models: what can be counted is equal, activations are as autograd keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import LAB_BASE, LAB_SMALL, ROOT

from duet.cache.errors import UserError
from duet.stages.cost.gpus import described_gpu, device_here, gpu_names, named_gpu
from duet.stages.cost.memory import Reading, StudentOnMeta, activation_bytes, kv_bytes, reading_need, student_need
from duet.stages.models.loading import load_model, num_parameters
from duet.stages.models.sizes import ModelSizes
from duet.stages.settings.student import TrainSettings
from duet.stages.student.model import autocast, load_trainable, optimizer_of

A100 = named_gpu("A100-80")
CPU = device_here("cpu")
LENGTHS = np.array([12, 20, 16, 24])
TRAINED = {
    "whole": {},
    "lora": {"lora": {"rank": 4}},
    "last layers": {"last_layers": 1},
    "frozen ends": {"freeze_embeddings": True},
}


@pytest.mark.parametrize("model", ["base", "small", "oracle"])
def test_parameters_are_counted_without_weights(model, tmp_path):
    folder = ROOT / "lab/models" / model
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    shape = ModelSizes.of(tmp_path / "m")
    assert shape.parameters == num_parameters(folder)
    real = load_model(folder)
    assert shape.embedding == real.get_input_embeddings().weight.numel()  # the head is tied
    assert shape.dtype == "bfloat16"


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_states_are_those_of_a_real_step(trained, dtype):
    settings = TrainSettings(dtype=dtype, **TRAINED[trained])
    model = load_trainable(LAB_BASE, "", settings, getattr(torch, dtype), False, uniform=False)
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], settings)
    with autocast(settings, torch.device("cpu")):
        model(input_ids=torch.arange(3, 20)[None]).logits.float().square().mean().backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [v for state in optimizer.state.values() for v in state.values()]
    need = student_need(StudentOnMeta.of(LAB_BASE, settings, CPU, 1, False), LENGTHS, CPU)
    assert need.parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert need.parts["gradients"] == sum(g.nbytes for g in gradients)
    assert need.parts["optimizer states"] == sum(value.nbytes for value in states)


def test_states_of_eight_bits_are_those_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    settings = TrainSettings(optimizer="adamw8bit", dtype="float32")
    model = load_trainable(LAB_BASE, "", settings, torch.float32, False, uniform=False)
    optimizer = optimizer_of(list(model.parameters()), settings)
    model(input_ids=torch.arange(3, 20)[None]).logits.square().mean().backward()
    optimizer.step()
    states = {
        v.data_ptr(): v.nbytes
        for state in optimizer.state.values()
        for key, v in state.items()
        if isinstance(v, torch.Tensor) and not key.startswith("qmap")  # one table of 256 values for all
    }
    need = student_need(StudentOnMeta.of(LAB_BASE, settings, CPU, 1, False), LENGTHS, CPU)
    assert need.parts["optimizer states"] == sum(states.values())


def kept_for_backward(model: torch.nn.Module, ids: torch.Tensor, bf16: bool) -> tuple[int, int]:
    """Bytes that autograd saves in a forward pass: of activations, and of copies of weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    copies = [t for t in kept.values() if tuple(t.shape) in shapes]
    sizes = [sum(t.untyped_storage().nbytes() for t in ts) for ts in (kept.values(), copies)]
    return sizes[0] - sizes[1], sizes[1]


@pytest.mark.parametrize("folder", [LAB_BASE, LAB_SMALL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(folder, dtype):
    """Within a twentieth: beside the layers, the formula leaves out the last norm and attention's row sums."""
    settings, shape = TrainSettings(dtype=dtype), ModelSizes.of(folder)
    model = load_trainable(folder, "", settings, getattr(torch, dtype), False, uniform=False)
    ids = torch.randint(3, 900, (8, 47))  # no size of a weight
    activations, copies = kept_for_backward(model, ids, dtype == "bfloat16")
    estimated = activation_bytes(shape, ids.numel(), shape.layers, dtype, False)
    assert estimated == pytest.approx(activations, rel=0.05)
    need = student_need(StudentOnMeta.of(folder, settings, CPU, 1, False), LENGTHS, CPU)
    assert need.parts.get("16-bit copies of weights", 0) == copies


def test_checkpointing_keeps_the_inputs_of_layers():
    settings, shape = TrainSettings(gradient_checkpointing=True, dtype="float32"), ModelSizes.of(LAB_BASE)
    model = load_trainable(LAB_BASE, "", settings, torch.float32, False, uniform=False)
    ids = torch.randint(3, 900, (8, 47))
    kept, _ = kept_for_backward(model, ids, bf16=False)
    inputs = activation_bytes(shape, ids.numel(), 2, "float32", True) - activation_bytes(
        shape, ids.numel(), 1, "float32", True
    )
    last_norm = 8 * shape.hidden * ids.numel()  # what it reads and the normed value
    assert kept == pytest.approx(shape.layers * inputs + last_norm, rel=0.05)


def test_the_cache_of_keys_and_values_is_that_of_a_real_pass():
    model, ids = load_model(LAB_BASE, "float32"), torch.arange(3, 53)[None]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    real = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_bytes(ModelSizes.of(LAB_BASE), ids.numel(), "float32") == real


def model_of(tmp_path: Path, **sizes: int) -> Path:
    """A large model without weights: the lab's config with other sizes."""
    config = json.loads((LAB_BASE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    return tmp_path


@pytest.fixture
def large(tmp_path) -> Path:
    """3.2 billion parameters, as Llama-3.2-3B has."""
    return model_of(
        tmp_path, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, vocab_size=128_256,
    )  # fmt: skip


def total(folder: Path, devices: int = 1, **settings: object) -> float:
    return student_need(
        StudentOnMeta.of(folder, TrainSettings(**settings), A100, devices, False), LENGTHS, A100, devices
    ).total


def test_every_saving_saves_and_nothing_else_does(large):
    assert ModelSizes.of(large).parameters == 3_212_749_824
    whole = total(large)
    held = student_need(StudentOnMeta.of(large, TrainSettings(), A100, 1, False), LENGTHS, A100).parts
    assert sum(held[name] for name in ("weights", "gradients", "optimizer states")) == pytest.approx(51.4e9, rel=0.001)
    for saving in ({"optimizer": "adamw8bit"}, {"last_layers": 7}, {"freeze_embeddings": True}, {"lora": {"rank": 16}}):
        assert total(large, **saving) < whole
    assert total(large, devices=2, parallel="fsdp") < whole < total(large, devices=2)  # DDP adds its buckets
    spread = [total(large, devices=devices, parallel="fsdp") for devices in (2, 8, 64)]
    assert spread == sorted(spread, reverse=True)  # no process holds the whole, not even while it is loaded
    rows = np.full(64, 2000)
    made = {
        flag: StudentOnMeta.of(large, TrainSettings(gradient_checkpointing=flag), A100, 1, False)
        for flag in (False, True)
    }
    plain, checkpointed = (student_need(made[flag], rows, A100) for flag in (False, True))
    assert checkpointed.parts["activations"] < plain.parts["activations"] / 4
    assert checkpointed.seconds > plain.seconds


def test_a_reader_takes_what_its_weights_and_cache_take(large):
    shape, reading = ModelSizes.of(large), Reading(longest=512, prompt_tokens=10**6, new_tokens=10**4, batch=64)
    one, two = (reading_need(shape, "bfloat16", reading, A100, devices) for devices in (1, 2))
    assert one.parts["weights"] == 2 * shape.parameters
    assert one.parts["KV cache"] == 2 * 28 * 8 * 128 * 2 * 64 * 512
    assert two.parts["weights"] == one.parts["weights"] / 2
    assert two.seconds < one.seconds
    least = 2 * shape.parameters * 10**6 / A100.flops16  # no device is faster than its peak
    assert one.seconds > least


def test_gpus_are_named_described_and_looked_up():
    for name in gpu_names():
        gpu = named_gpu(name.lower())
        assert gpu.source
        assert gpu.flops("bfloat16") == (gpu.flops16 if gpu.bf16 else gpu.flops32)
        assert gpu.flops16 > gpu.flops32
        assert 10e9 < gpu.memory_bytes < 200e9
    assert described_gpu(24, 100).memory_bytes == 24e9
    assert CPU.flops32 > 1e9
    with pytest.raises(UserError, match="not in the table") as caught:
        named_gpu("A100-90")
    assert "did you mean A100" in caught.value.hint
