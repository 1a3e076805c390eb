"""Which files of a model directory are loaded, what identifies them, and what is refused."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import LAB_BASE
from tiny_models import ARCHITECTURES, noisy, tiny_config, tiny_model

from duet.cache.errors import UserError
from duet.stages.engines.interface import EngineSpec
from duet.stages.engines.vllm_engine import _ENVIRONMENT, VllmEngine, VllmUnusable
from duet.stages.models.directory import check_trainable_start, described, load_config, resolve_model, small_files
from duet.stages.models.files import ADAPTER_CONFIG_NAME
from duet.stages.models.identity import same_model, weights_sha256
from duet.stages.models.limits import NO_LIMIT, context_length
from duet.stages.models.loading import load_model, num_parameters, whole_folder
from duet.stages.models.sizes import ModelSizes
from duet.stages.models.tokenizers import load_tokenizer
from duet.stages.settings.teacher import AdaptedModel

VOCABULARY = 96
IDS = torch.tensor([[5, 9, 31, 2, 7]])


def copied(folder: Path, source: Path = LAB_BASE) -> Path:
    shutil.copytree(source, folder)
    return folder


def edited(path: Path, **new: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


def saved(folder: Path, name: str = "llama", **more: Any) -> Path:
    tiny_model(tiny_config(name, VOCABULARY)).save_pretrained(folder, **more)
    return folder


def adapter_for(base: Path, folder: Path, **more: Any) -> Any:
    """A saved LoRA adapter that does something; returns the model with it on top."""
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | more
    adapted = get_peft_model(load_model(base, "float32"), LoraConfig(**settings))
    noisy(adapted)
    original = load_model(base, "float32").state_dict()
    with torch.no_grad():  # only the adapter is to differ from the base
        for parameter_name, parameter in adapted.named_parameters():
            bare = parameter_name.removeprefix("base_model.model.").replace(".base_layer", "")
            if bare in original:
                parameter.copy_(original[bare])
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted.eval()


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as told:
        call(*arguments)
    assert "\n" not in told.value.what + told.value.hint
    assert told.value.hint
    return f"{told.value.what} | {told.value.hint}"


@pytest.mark.parametrize("extra", ["consolidated.safetensors", "model-bnb-4bit.safetensors", "model.fp16.safetensors"])
def test_only_what_is_loaded_is_counted_and_hashed(tmp_path, extra):
    folder = copied(tmp_path / "m")
    shutil.copy(folder / "model.safetensors", folder / extra)
    files = described(folder)
    assert [path.name for path in files.weights] == ["model.safetensors"]
    assert files.unread == [extra]
    assert num_parameters(folder) == num_parameters(LAB_BASE)
    assert weights_sha256(folder) == weights_sha256(LAB_BASE)
    with whole_folder(folder, "auto") as given:  # for vLLM, which reads every *.safetensors
        assert [path.name for path in given.glob("*.safetensors")] == ["model.safetensors"]
        assert (given / "config.json").is_file()
    with whole_folder(LAB_BASE, "auto") as given:
        assert given == LAB_BASE


def test_one_whole_file_comes_before_an_index_as_in_from_pretrained(tmp_path):
    folder = saved(tmp_path / "m", max_shard_size="20KB")
    assert len(described(folder).weights) > 2
    other = tiny_model(tiny_config("llama", VOCABULARY))
    torch.nn.init.ones_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", folder)
    assert [path.name for path in described(folder).weights] == ["model.safetensors"]
    assert torch.equal(load_model(folder).model.norm.weight, torch.ones(32))
    assert weights_sha256(folder) == weights_sha256(tmp_path / "other")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_copy_saved_again_in_shards_is_the_same_model(tmp_path, name):
    folder = saved(tmp_path / "m", name)
    load_model(folder).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(described(tmp_path / "again").weights) > 1
    assert weights_sha256(tmp_path / "again") == weights_sha256(folder)
    assert num_parameters(tmp_path / "again") == num_parameters(folder) == ModelSizes.of(folder).parameters


def test_defaults_written_out_old_spellings_and_names_without_the_prefix_change_nothing(tmp_path):
    folder = copied(tmp_path / "m")
    before = weights_sha256(folder)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    for key in ("attention_bias", "mlp_bias", "architectures", "use_cache", "pretraining_tp"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps({"transformers_version": "4.40.0", "return_dict": True} | config))
    assert weights_sha256(folder) == before
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2))
    gpt2.save_pretrained(tmp_path / "prefixed")
    bare = {
        name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "prefixed/model.safetensors").items()
    }
    copied(tmp_path / "bare", tmp_path / "prefixed")
    save_file(bare, tmp_path / "bare/model.safetensors", metadata={"format": "pt"})
    assert weights_sha256(tmp_path / "bare") == weights_sha256(tmp_path / "prefixed")


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-3},
        {"dtype": "float32"},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"num_key_value_heads": 1},
    ],
)
def test_what_decides_the_numbers_changes_the_identity(tmp_path, change):
    folder = copied(tmp_path / "m")
    edited(folder / "config.json", **change)
    assert weights_sha256(folder) != weights_sha256(LAB_BASE)


def test_a_tied_head_counts_once_and_another_head_counts(tmp_path):
    folder = saved(tmp_path / "m", "llama-tied")
    before = weights_sha256(folder), num_parameters(folder)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (weights_sha256(folder), num_parameters(folder)) == before
    tensors["lm_head.weight"] *= 2  # transformers does not tie these
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights_sha256(folder) != before[0]
    assert torch.equal(load_model(folder).lm_head.weight, tensors["lm_head.weight"])


def test_another_template_is_another_model(tmp_path):
    folder = copied(tmp_path / "m")
    assert same_model(folder, LAB_BASE)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert not same_model(folder, LAB_BASE)


def broken(folder: Path, kind: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    weights = folder / "model.safetensors"
    if kind.startswith("lfs "):
        (folder / kind.removeprefix("lfs ")).write_text(pointer)
    elif kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no header":
        weights.write_text("<!DOCTYPE html><html>not found</html>")
    elif kind.startswith("empty "):
        (folder / kind.removeprefix("empty ")).write_text("")
    elif kind == "bin":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "gguf":
        weights.rename(folder / "model-q4.gguf")
    elif kind == "variant":
        weights.rename(folder / "model.fp16.safetensors")
    elif kind == "shard":
        load_model(folder).save_pretrained(folder, max_shard_size="300KB")
        weights.unlink(missing_ok=True)
        sorted(folder.glob("model-*.safetensors"))[1].unlink()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("lfs model.safetensors", "git lfs pull"),
        ("lfs config.json", "git lfs pull"),
        ("cut off", "its header says"),
        ("no header", "not a safetensors file"),
        ("empty model.safetensors", "is empty"),
        ("empty config.json", "is empty"),
        ("bin", "convert .bin weights"),
        ("gguf", "GGUF only"),
        ("variant", "rename its weights"),
        ("shard", "1 of 6 weight files that model.safetensors.index.json names are missing"),
    ],
)
def test_files_that_cannot_be_loaded_are_named(tmp_path, kind, told):
    broken(copied(tmp_path / "m"), kind)
    assert told in refused(resolve_model, str(tmp_path / "m"), "teacher.model")


def test_tensors_that_are_missing_would_be_random(tmp_path):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "would be random: model.layers.1.mlp.up_proj.weight" in refused(load_model, folder)


@pytest.mark.parametrize("kind", ["lfs", "newer", "empty"])
def test_tokenizers_that_cannot_be_read_are_named(tmp_path, kind):
    folder = copied(tmp_path / "m")
    if kind == "newer":
        found = json.loads((folder / "tokenizer.json").read_text())
        edited(folder / "tokenizer.json", model=found["model"] | {"type": "Trie9", "merges": [["x", "y"]]})
    else:
        broken(folder, f"{kind} tokenizer.json")
    expected = {"lfs": "git lfs pull", "newer": "newer release", "empty": "is empty"}[kind]
    assert expected in refused(load_tokenizer, folder)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "gptqmodel"),
        ({"quant_method": "no-such-method"}, "no-such-method"),
    ],
)
def test_quantised_weights_that_cannot_run_say_what_to_install(tmp_path, method, told):
    folder = copied(tmp_path / "m")
    edited(folder / "config.json", quantization_config=method)
    message = refused(load_model, folder)
    assert told in message
    assert "16-bit weights" in message
    assert "cannot be trained" in refused(check_trainable_start, folder, "students.s.model")


def packed(base: Path, folder: Path) -> Path:
    """The model in bitsandbytes' 4 bits."""
    in_4_bits = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    hf.AutoModelForCausalLM.from_pretrained(base, quantization_config=in_4_bits).save_pretrained(folder)
    return folder


def test_a_bitsandbytes_checkpoint_runs_and_is_no_start(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    tiny_model(tiny_config("llama", VOCABULARY, **sizes)).save_pretrained(tmp_path / "base")
    folder = packed(tmp_path / "base", tmp_path / "m")
    assert described(folder).quantised == "bitsandbytes"
    assert num_parameters(folder) == num_parameters(tmp_path / "base")
    with torch.no_grad():
        assert torch.isfinite(load_model(folder, "float32")(IDS).logits).all()
    assert "bitsandbytes" in refused(check_trainable_start, folder, "students.s.model")
    check_trainable_start(tmp_path / "base", "students.s.model")
    with torch.no_grad():  # at widths that are not multiples of 64, too
        assert torch.isfinite(load_model(packed(LAB_BASE, tmp_path / "lab"), "float32")(IDS).logits).all()


def test_quantised_weights_whose_kernels_fail_are_refused_when_they_are_loaded(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("this shape is not for this kernel")

    folder = packed(saved(tmp_path / "base"), tmp_path / "m")
    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this shape is not for this kernel" in refused(load_model, folder)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_an_adapter_directory_is_a_model(tmp_path, more):
    base = saved(tmp_path / "base")
    adapted = adapter_for(base, tmp_path / "tuned", **more)
    folder = resolve_model(str(tmp_path / "tuned"), "teacher.model")
    with torch.no_grad():
        theirs, ours, plain = (m(IDS).logits for m in (adapted, load_model(folder), load_model(base)))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-2)
    assert len({weights_sha256(folder), weights_sha256(base)}) == 2
    assert num_parameters(folder) == num_parameters(base)
    assert all(parameter.requires_grad for parameter in load_model(folder).parameters())  # a student may start from it
    with whole_folder(folder, "float32") as whole:
        assert not (whole / ADAPTER_CONFIG_NAME).exists()
        assert torch.equal(load_model(whole)(IDS).logits, ours)
    assert not whole.exists()


def test_the_base_is_found_beside_the_adapter_or_given(tmp_path, monkeypatch):
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other", "llama")
    adapter_for(base, tmp_path / "tuned")
    expected = weights_sha256(tmp_path / "tuned")
    edited(tmp_path / "tuned" / ADAPTER_CONFIG_NAME, base_model_name_or_path="../base")
    monkeypatch.chdir("/")
    assert weights_sha256(tmp_path / "tuned") == expected
    edited(tmp_path / "tuned" / ADAPTER_CONFIG_NAME, base_model_name_or_path="somewhere/else/base")
    assert "{model: BASE, adapter: DIRECTORY}" in refused(resolve_model, str(tmp_path / "tuned"), "teacher.model")
    edited(tmp_path / "tuned" / ADAPTER_CONFIG_NAME, base_model_name_or_path=None)
    assert "does not say for which model" in refused(resolve_model, str(tmp_path / "tuned"), "teacher.model")
    both = AdaptedModel(model=str(base), adapter=str(tmp_path / "tuned"))
    assert weights_sha256(resolve_model(both, "teacher.model")) == expected
    with torch.no_grad():
        torch.nn.init.ones_((changed := load_model(other)).model.norm.weight)
    changed.save_pretrained(other)
    on_other = AdaptedModel(model=str(other), adapter=str(tmp_path / "tuned"))
    assert weights_sha256(resolve_model(on_other, "teacher.model")) != expected
    swapped = AdaptedModel(model=str(tmp_path / "tuned"), adapter=str(base))
    assert "is not an adapter" in refused(resolve_model, swapped, "teacher.model")


def test_an_adapter_has_the_tokenizer_of_its_base_unless_it_has_one(tmp_path):
    adapter_for(LAB_BASE, tmp_path / "tuned")
    assert load_tokenizer(tmp_path / "tuned").chat_template == load_tokenizer(LAB_BASE).chat_template
    own = load_tokenizer(LAB_BASE)
    own.chat_template = "{{ messages }}"
    own.save_pretrained(tmp_path / "tuned")
    assert load_tokenizer(tmp_path / "tuned").chat_template == "{{ messages }}"


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    base = saved(tmp_path / "base")
    adapter_for(base, tmp_path / "tuned")
    beside = copied(tmp_path / "beside", tmp_path / "tuned")
    shutil.copy(base / "model.safetensors", beside)
    shutil.copy(base / "config.json", beside)
    assert "lies beside whole weights" in refused(resolve_model, str(beside), "evaluate.models.x")
    edited(copied(tmp_path / "task", tmp_path / "tuned") / ADAPTER_CONFIG_NAME, task_type="SEQ_CLS")
    assert "SEQ_CLS" in refused(resolve_model, str(tmp_path / "task"), "evaluate.models.x")
    get_peft_model(load_model(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "prompt"
    )
    assert "PROMPT_TUNING" in refused(resolve_model, str(tmp_path / "prompt"), "evaluate.models.x")
    twice = copied(tmp_path / "twice", tmp_path / "tuned")
    edited(twice / ADAPTER_CONFIG_NAME, base_model_name_or_path=str(tmp_path / "tuned"))
    assert "an adapter itself" in refused(resolve_model, str(twice), "evaluate.models.x")
    edited(base / "config.json", quantization_config={"quant_method": "fp8"})
    assert "cannot be merged exactly" in refused(resolve_model, str(tmp_path / "tuned"), "evaluate.models.x")


def test_an_adapter_for_another_model_is_refused_not_left_out(tmp_path):
    adapter_for(saved(tmp_path / "base"), tmp_path / "tuned")
    edited(tmp_path / "tuned" / ADAPTER_CONFIG_NAME, base_model_name_or_path=str(LAB_BASE))
    assert "cannot be merged" in refused(load_model, tmp_path / "tuned")
    weights = tmp_path / "tuned/adapter_model.safetensors"
    renamed = {re.sub(r"layers\.1\.", "layers.7.", name): tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights)
    edited(tmp_path / "tuned" / ADAPTER_CONFIG_NAME, base_model_name_or_path=str(tmp_path / "base"))
    assert "does not fit its base" in refused(load_model, tmp_path / "tuned")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hf.GPT2Config(n_positions=77), 77),
        (hf.MptConfig(max_seq_len=88), 88),
        (hf.BloomConfig(), NO_LIMIT),
        (hf.MambaConfig(), NO_LIMIT),
        (hf.RwkvConfig(context_length=99), 99),
        (hf.Gemma3Config(text_config={"max_position_embeddings": 66}), 66),
        (hf.LlamaConfig(max_position_embeddings=55), 55),
        (
            hf.Qwen2Config(
                max_position_embeddings=100,
                rope_parameters={
                    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100,
                },
            ),
            400,
        ),
        (
            hf.Phi3Config(
                max_position_embeddings=128, original_max_position_embeddings=64, num_attention_heads=2, hidden_size=8,
                pad_token_id=0,
                rope_parameters={
                    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
                    "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0],
                },
            ),
            64,
        ),
    ],
)  # fmt: skip
def test_every_family_says_how_long_its_context_is(config, expected):
    assert context_length(config) == expected


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (hf.MambaConfig, {}),
        (hf.BloomConfig, {"n_head": 2}),
        (hf.FalconConfig, {"num_attention_heads": 2, "alibi": True}),
        (hf.MptConfig, {"n_heads": 2}),
    ],
)
def test_families_without_the_usual_names_have_shapes(tmp_path, config, heads):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    model = hf.AutoModelForCausalLM.from_config(config(**sizes, **heads))
    model.save_pretrained(tmp_path / "m")
    assert ModelSizes.of(tmp_path / "m").parameters == num_parameters(tmp_path / "m")
    assert context_length(load_config(tmp_path / "m")) > 0


def test_a_model_with_code_of_its_own_is_another_where_that_differs(tmp_path):
    folder, code = saved(tmp_path / "m"), tmp_path / "m" / "modeling_own.py"
    edited(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    found = []
    for text in ("SCALE = 1\n", "SCALE = 2\n", "SCALE = 1\n"):
        code.write_text(text)
        found.append(weights_sha256(folder))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_model_on_the_hub_only_what_is_loaded_is_fetched(tmp_path, monkeypatch, sharded):
    hub, here = tmp_path / "hub", tmp_path / "here"
    load_model(LAB_BASE).save_pretrained(hub, max_shard_size="300KB" if sharded else "1GB")
    for extra in ("consolidated.safetensors", "original/model.safetensors", "model.fp16.safetensors", "model.gguf"):
        (hub / extra).parent.mkdir(exist_ok=True)
        (hub / extra).write_text("large")

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        for path in (path for path in hub.rglob("*") if path.is_file()):
            inside = path.relative_to(hub)
            if any(fnmatch.fnmatch(str(inside), pattern) for pattern in allow_patterns):
                (here / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, here / inside)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    small = small_files("owner/name", "teacher.model")
    assert not list(small.rglob("*.safetensors"))
    assert weights_sha256(resolve_model("owner/name", "teacher.model")) == weights_sha256(LAB_BASE)
    assert described(here).unread == []
    assert not list(here.rglob("consolidated*")) + list(here.glob("original/*")) + list(here.glob("*.gguf"))


def test_vllm_is_given_whole_weights_and_no_others(tmp_path, monkeypatch):
    given: list[tuple[Path, list[str]]] = []

    def start(model: str, **_: Any) -> None:
        given.append((Path(model), sorted(path.name for path in Path(model).glob("*.safetensors"))))
        raise RuntimeError("not today")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    base = saved(tmp_path / "base")
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    adapter_for(base, tmp_path / "tuned")
    for folder in (base, tmp_path / "tuned"):
        with pytest.raises(VllmUnusable, match="not today"):
            VllmEngine(EngineSpec(folder, "float32", VOCABULARY, 32, (2,), "cpu"))
    assert [names for _, names in given] == [["model.safetensors"]] * 2
    assert not any(folder.exists() for folder, _ in given)  # temporary ones are removed
