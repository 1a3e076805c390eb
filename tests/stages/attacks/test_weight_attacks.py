"""Attacks on weights: rounding, fine-tuning and reading layers, each against a calculation of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, SIZES, tiny_config, tiny_model
from transformers import GPT2Config, MixtralConfig

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.attacks import quantize as attack
from duet.stages.attacks.logit_lens import final_norm, token_ranks
from duet.stages.attacks.quantize import VARIANTS, inputs_of_layers, is_reached, quantize, untouched
from duet.stages.attacks.rounding import NF4_LEVELS, rounded, rounded_nf4, scaled
from duet.stages.attacks.teaching import Teaching, add_adapters
from duet.stages.attacks.validity import attacks_work
from duet.stages.exam.exam import Exam, QuerySet, Subject
from duet.stages.models.layers import decoder_layers
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.evaluate import EvaluateSettings

VOCAB = 60
PROMPTS = [[1, 5, 9, 11], [1, 7], [1, 3, 4, 8, 20]]


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 64), (4, 7)])
def test_rounding_moves_no_weight_by_more_than_half_a_step(bits, group):
    torch.manual_seed(0)
    weight_OI = torch.randn(5, 100) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 2.0])[:, None]
    found = rounded(weight_OI, bits, group)
    for start in range(0, 100, group or 100):
        part, told = weight_OI[:, start : start + (group or 100)], found[:, start : start + (group or 100)]
        scale_O = part.abs().amax(1) / (2 ** (bits - 1) - 1)
        assert ((part - told).abs() <= scale_O[:, None] * (0.5 + 1e-5)).all()
        for row in told:
            assert len(row.unique()) <= 2**bits - 1
        assert torch.allclose(told.abs().amax(1), part.abs().amax(1)), "the largest weight stays"
    assert torch.allclose(rounded(found, bits, group), found, rtol=1e-6, atol=0), "rounded again it stays as it is"


def test_a_quantised_model_has_rounded_linear_weights_and_nothing_else():
    model, before = (tiny_model(tiny_config("llama", VOCAB)) for _ in range(2))
    changed = {
        name
        for (name, new), old in zip(_quantized(model).named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert changed == linear - {"lm_head.weight"}
    assert [len(variants) for variants in VARIANTS.values()] == [1, 2, 1, 1]


def _quantized(model):
    assert quantize(model, 4, 32) == sum(
        module.weight.numel() for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )  # fmt: skip
    return model


def test_a_model_that_is_quantised_already_stays_as_it_is_and_that_is_said():
    model, before = (tiny_model(tiny_config("llama", VOCAB)) for _ in range(2))
    model.config.quantization_config = {"quant_method": "gptq"}
    assert quantize(model, 4, 32) == 0
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    assert untouched({"rounded.quantize_nf4": False, "rounded.quantize_int8": True}) == ["quantize_nf4"]
    assert untouched({"attack.quantize_nf4.forget": {}}) == [], "answers that were kept before"
    settings = EvaluateSettings(attacks=("quantize_nf4",))
    exam = Exam({"forget": QuerySet([], "forgotten")}, "t", PromptSettings(), settings, "cpu")
    work = attacks_work([Subject("base", Path("b"), "", "base")], exam, {"base": {}}, {}, ["quantize_nf4"])
    assert work["quantize_nf4"] == {
        "works": False,
        "on": "base",
        "text": "base's weights are quantised already, or most are not in linear layers: rounding left it as it is",
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_reaches_every_architecture_with_linear_layers(name):
    model = tiny_model(tiny_config(name, VOCAB))
    assert is_reached(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    assert not is_reached(model)


def test_a_model_whose_matrices_are_not_linear_layers_is_not_shown_to_withstand_rounding(monkeypatch, tmp_path):
    """GPT-2's are of a class of their own, and a mixture's experts are stored together: rounding leaves them as they are."""
    gpt2 = tiny_model(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB))
    gpt2.save_pretrained(tmp_path)
    assert not is_reached(gpt2)
    assert not is_reached(tiny_model(MixtralConfig(**SIZES, num_local_experts=4, vocab_size=VOCAB)))
    monkeypatch.setattr(attack, "quantized_answers", lambda *_: {"blocks_64": ["no"]})
    exam = Exam({"forget": QuerySet([], "forgotten")}, "t", PromptSettings(), EvaluateSettings(), "cpu")
    base = Subject("base", Path("b"), "", "base")
    found = attack.run(SimpleNamespace(exam=exam, model_dir=tmp_path), base, "quantize_nf4", Watch())  # type: ignore[arg-type]
    assert untouched(found) == ["quantize_nf4"]


def test_nf4_has_the_quantiles_of_a_normal_distribution_for_levels():
    """As the paper derives them: evenly spread probabilities on either side of 0, then scaled to 1."""
    most = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above, below = (torch.linspace(most, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8))
    levels = torch.cat([torch.special.ndtri(above), torch.zeros(1), -torch.special.ndtri(below)]).sort().values
    assert torch.allclose(levels / levels.max(), torch.tensor(NF4_LEVELS, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 128), (5, 100), (3, 7)])
def test_nf4_is_what_bitsandbytes_makes_of_the_weights(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight_OI = torch.randn(shape)
    weight_OI[0] *= 40
    weight_OI[-1, :5] = 0
    packed, state = functional.quantize_4bit(weight_OI, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.allclose(rounded_nf4(weight_OI, 64), functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7)


def test_scaling_by_what_a_layer_reads_keeps_its_outputs_nearer_than_rounding_alone():
    torch.manual_seed(0)
    weight_OI, read_NI = torch.randn(40, 96), torch.randn(60, 96)
    read_NI[:, :4] *= 50  # a few inputs are far larger, as in real models
    outputs = read_NI @ weight_OI.T
    errors = [
        (read_NI @ found.T - outputs).square().mean()
        for found in (scaled(weight_OI, read_NI, 4, 32), rounded(weight_OI, 4, 32))
    ]
    assert errors[0] < errors[1] / 2
    even = torch.ones(60, 96)
    assert torch.equal(scaled(weight_OI, even, 4, 32), rounded(weight_OI, 4, 32)), "nothing to be scaled"
    assert torch.equal(scaled(weight_OI, read_NI[:0], 4, 32), rounded(weight_OI, 4, 32)), "nothing was read"


def test_layers_are_calibrated_on_what_they_read_of_every_text():
    model, before = (tiny_model(tiny_config("llama", VOCAB)) for _ in range(2))
    read = inputs_of_layers(model, PROMPTS, per_text=2)
    normed = [model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(ids))) for ids in PROMPTS]
    expected = torch.stack([text[at] for text in normed for at in (0, -1)])
    assert torch.allclose(read["model.layers.0.self_attn.q_proj"], expected, atol=1e-6)
    assert "lm_head" not in read
    quantize(model, 4, 32, read)
    name = "model.layers.1.mlp.down_proj"
    weight = before.get_submodule(name).weight
    assert torch.equal(model.get_submodule(name).weight, scaled(weight, read[name], 4, 32))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_lens_reads_every_layer_as_the_model_reads_its_last(name):
    """Ranks from the outputs of the decoder layers themselves, one prompt at a time; the last layer's are the model's own."""
    model = tiny_model(tiny_config(name, VOCAB))
    tokens = [[13], [2], [40]]
    found = np.array(token_ranks(model, PROMPTS, tokens, VOCAB - 3))
    layers, norm, head = decoder_layers(model), final_norm(model), model.get_output_embeddings()
    assert found.shape == (1 + len(layers), len(PROMPTS))
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for number, (prompt, (token,)) in enumerate(zip(PROMPTS, tokens, strict=True)):
        outputs.clear()
        with torch.no_grad():
            own = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            read = [head(norm(output[:, -1:]))[0, -1] for output in outputs]
        ranks = [1 + int((logits[: VOCAB - 3] > logits[token]).sum()) for logits in (*read, own)]
        assert ranks[-2] == ranks[-1], "read through norm and head, the last layer is the model"
        assert found[1:, number].tolist() == ranks[:-1]


def test_a_model_whose_norm_is_not_what_the_head_reads_is_refused():
    model = tiny_model(tiny_config("llama", VOCAB))
    model.model.final_norm = torch.nn.Identity()  # later by name than the real one, and never called
    with pytest.raises(UserError, match="is not what its output head reads"):
        token_ranks(model, PROMPTS, [[1], [2], [3]], VOCAB)


def test_teaching_lowers_the_loss_of_the_answers_and_of_nothing_else():
    model = tiny_model(tiny_config("llama", VOCAB))
    pairs = [(prompt, [30 + number, 31, 2]) for number, prompt in enumerate(PROMPTS)]
    teach = Teaching(model, pairs, lr=1e-2, batch_size=8, seed=0)
    before = _answer_loss(model, pairs)
    assert teach.step() == pytest.approx(before, rel=1e-5), (
        "the first loss is that of the untouched model, over answers alone"
    )
    for _ in range(20):
        last = teach.step()
    assert last < before / 4
    assert teach.done == 21


def test_teaching_takes_every_pair_once_an_epoch():
    pairs = [([1, 5], [30 + number]) for number in range(5)]
    teach = Teaching(tiny_model(tiny_config("llama", VOCAB)), pairs, 2e-5, batch_size=5, seed=3)
    same = Teaching(tiny_model(tiny_config("llama", VOCAB)), pairs[::-1], 2e-5, batch_size=5, seed=8)
    assert teach.step() == pytest.approx(same.step(), rel=1e-5)


def test_adapters_begin_where_the_model_is_and_are_all_that_learns():
    model, before = (tiny_model(tiny_config("llama", VOCAB)) for _ in range(2))
    pairs = [(prompt, [30 + number, 31, 2]) for number, prompt in enumerate(PROMPTS)]
    adapted = add_adapters(model, rank=4, seed=0)
    assert _answer_loss(adapted, pairs) == pytest.approx(_answer_loss(before, pairs), rel=1e-6)
    teach = Teaching(adapted, pairs, lr=1e-2, batch_size=3, seed=0)
    first = teach.step()
    for _ in range(20):
        last = teach.step()
    assert last < first / 2
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    linear = {name for name, module in before.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert {name.split(".lora_")[0] for name in trained} == linear
    own = dict(before.named_parameters())
    for name, weight in adapted.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, own[name.replace(".base_layer", "")]), name
    again = add_adapters(tiny_model(tiny_config("llama", VOCAB)), rank=4, seed=0)
    assert Teaching(again, pairs, lr=1e-2, batch_size=3, seed=0).step() == first


def _answer_loss(model, pairs) -> float:
    """Mean negative log-probability of the answers' tokens, one pair at a time."""
    losses = []
    for prompt, answer in pairs:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-logprobs[len(prompt) - 1 + j, token].item() for j, token in enumerate(answer)]
    return sum(losses) / len(losses)
