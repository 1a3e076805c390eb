"""Models: resolved, identified, loaded. Safetensors only; remote code only where asked for.

What a directory holds is described in `model_files.py`, where it is found in `model_places.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache.errors import UserError
from cache.files import sha256_json
from stages.model_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CONFIG_NAME,
    TOKENIZER_NAMES,
    ModelFiles,
    adapter_base,
    check_whole,
    count,
    describe,
    digest,
    has_tokenizer,
    is_adapter,
    quantised_with,
    read_object,
    tensors_of,
)
from stages.model_places import find_base, find_model, is_hub_id  # noqa: F401 (asked for here, too)
from stages.settings import AdaptedModel
from stages.tokenizer_file import as_the_file_says

# What a config says of a model's origin and form on disk, not of what it computes. Its dtype counts, in one spelling.
_VOLATILE_CONFIG_KEYS = (
    "_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache", "transformers_weights",
)  # fmt: skip
_VOLATILE_ADAPTER_KEYS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_HEADS = ("lm_head.weight", "embed_out.weight")  # how output heads are called that may be tied to the embedding
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What configs call the longest input, in the order in which they are asked.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
NO_LIMIT = sys.maxsize  # context of a model whose config names none: recurrent ones, and those with ALiBi


def resolve_model(name: str | AdaptedModel, where: str) -> Path:
    """The local directory of a model, checked: `name` itself, or the hub's snapshot of it."""
    folder = find_model(name, where)
    described(folder, f"{where}: {name}")
    return folder


def small_files(name: str | AdaptedModel, where: str) -> Path:
    """The directory of a model, of which only config and tokenizer are needed: of one on the hub no weights are fetched."""
    folder = find_model(name, where, weights=False)
    read_object(_config_folder(folder) / CONFIG_NAME, f"{where}: {name}")
    return folder


def described(model_dir: Path, called: str = "") -> ModelFiles:
    """The description of a model directory; UserError says what is wrong with it."""
    return describe(model_dir, find_base, called)


def _config_folder(model_dir: Path) -> Path:
    """Where config.json lies: an adapter has its base's."""
    if not is_adapter(model_dir):
        return model_dir
    return find_base(adapter_base(model_dir, str(model_dir)), model_dir, weights=False)


def check_trainable_start(model_dir: Path, where: str) -> None:
    """Refuse a model that no student can start from, by its config alone."""
    folder = _config_folder(model_dir)
    if method := quantised_with(read_object(folder / CONFIG_NAME, str(folder))):
        raise UserError(
            f"{where}: {model_dir} is quantised with {method}: packed weights cannot be trained",
            "let the student start from the 16-bit weights that it was made of: students: [{name: …, model: DIRECTORY}]",
        )


def quantisation_fault(model_dir: Path, trust_remote_code: bool = False) -> str | None:
    """Why transformers cannot run the model's quantised weights here, in its own words; None where it can."""
    config = load_config(model_dir, trust_remote_code)
    found = getattr(config, "quantization_config", None) or getattr(text_config(config), "quantization_config", None)
    if not found:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels whenever it is imported
    try:
        AutoHfQuantizer.from_config(found, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # whatever a quantiser raises says what is missing
        return _first_line(error)
    return None


def check_quantisation(model_dir: Path, called: str, trust_remote_code: bool = False) -> None:
    """Refuse quantised weights that transformers cannot run here."""
    if fault := quantisation_fault(model_dir, trust_remote_code):
        method = quantised_with(read_object(_config_folder(model_dir) / CONFIG_NAME, str(model_dir)))
        raise UserError(
            f"{called} is quantised with {method}, which cannot run here: {fault}",
            "install what is named there, or take the model's 16-bit weights",
        )


def weights_sha256(model_dir: Path) -> str:
    """One hash over all that decides the model's numbers: the config as it is understood, and every tensor that is read.

    Equal for a copy that was saved again, with other defaults written out or in other shards; a head that is stored beside the
    embedding that it is tied to counts once, as it is loaded. An adapter's hash covers its base and its own tensors.
    """
    files = described(model_dir)
    parts: dict[str, Any] = {"config": _meaning(files), "tensors": _tensors_sha256(files)}
    if files.adapter:
        config = read_object(files.adapter / ADAPTER_CONFIG_NAME, str(files.adapter))
        path = files.adapter / ADAPTER_NAME
        parts["adapter"] = {
            "config": {
                key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
                for key, value in config.items()
                if key not in _VOLATILE_ADAPTER_KEYS
            },
            "tensors": [[name, t.dtype, t.shape, digest(path, name)] for name, t in sorted(tensors_of(path).items())],
        }
    return sha256_json(parts)


def same_model(one: Path, other: Path, trust_remote_code: bool = False) -> bool:
    """Do two directories hold the same model: weights, tokenizer and chat template?"""
    if one.resolve() == other.resolve():
        return True
    if weights_sha256(one) != weights_sha256(other):
        return False
    tokenizers = [load_tokenizer(folder, trust_remote_code) for folder in (one, other)]
    meanings = [(tokenizer_sha256(tokenizer), tokenizer.chat_template) for tokenizer in tokenizers]
    return meanings[0] == meanings[1]


def _meaning(files: ModelFiles) -> dict[str, Any]:
    """What differs from the defaults of the config's class, so that it does not matter which of them are written out."""
    if "auto_map" in files.config:  # understood by its own code only
        return {key: value for key, value in files.config.items() if key not in _VOLATILE_CONFIG_KEYS}
    config = load_config(files.folder)
    defaults = {} if config.has_no_defaults_at_init else _plain(type(config)().to_dict())
    found = {key: value for key, value in _plain(config.to_dict()).items() if value != defaults.get(key, ...)}
    return found | {"model_type": config.model_type, "dtype": _stored_dtype(files, config)}


def _plain(value: Any) -> Any:
    """A config as JSON would hold it, without what says nothing of the numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(of) for key, of in value.items() if key not in _VOLATILE_CONFIG_KEYS}
    if isinstance(value, list | tuple):
        return [_plain(of) for of in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _stored_dtype(files: ModelFiles, config: Any) -> str:
    """The dtype that "auto" stands for: the config's, else that of the weights."""
    named = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    floating = (tensor.dtype for _, (_, tensor) in sorted(files.tensors().items()) if tensor.dtype in _DTYPES)
    return str(named).removeprefix("torch.") if named else _DTYPES[next(floating, "F32")]


def _tensors_sha256(files: ModelFiles) -> str:
    prefix = _base_prefix(files)
    rows = [
        [name.removeprefix(prefix), tensor.dtype, tensor.shape, digest(path, name)]
        for name, (path, tensor) in _loaded(files).items()
    ]
    return sha256_json(sorted(rows, key=lambda row: row[0]))


def _base_prefix(files: ModelFiles) -> str:
    """What stands before the names of a causal language model's inner model ("transformer."), which some files leave out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if "auto_map" in files.config:
        return ""
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(load_config(files.folder)), None)
    return f"{getattr(cls, 'base_model_prefix', '')}." if cls else ""


def _loaded(files: ModelFiles) -> dict[str, tuple[Path, Any]]:
    """The tensors that are read, without a head that repeats the embedding to which the config ties it."""
    tensors = files.tensors()
    heads = [name for name in tensors if name.endswith(_HEADS)]
    if not heads or "auto_map" in files.config or not getattr(load_config(files.folder), "tie_word_embeddings", False):
        return tensors
    shapes = {tensors[head][1].shape for head in heads}
    others = {digest(path, name) for name, (path, t) in tensors.items() if t.shape in shapes and name not in heads}
    return {name: of for name, of in tensors.items() if name not in heads or digest(of[0], name) not in others}


def load_tokenizer(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer, or that of an adapter's base; a directory without one is a UserError."""
    from transformers import AutoTokenizer

    folder = model_dir if has_tokenizer(model_dir) else _config_folder(model_dir)
    for path in (folder / name for name in TOKENIZER_NAMES):
        if path.is_file():
            check_whole(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(
            f"{model_dir} has no tokenizer that can be loaded: {_first_line(error)}",
            "put the tokenizer's files beside the weights; a tokenizer.json of a newer release needs `pip install --upgrade "
            "tokenizers transformers`; if it needs code of its own, read it and set trust_remote_code",
        ) from error
    return as_the_file_says(tokenizer, folder)


def load_config(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """The model's config; of an adapter, its base's."""
    from transformers import AutoConfig

    folder = _config_folder(model_dir)
    read_object(folder / CONFIG_NAME, str(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configs check themselves, each with errors of its own
        raise UserError(
            f"{model_dir}: config.json cannot be read: {_first_line(error)}", "check the model directory"
        ) from error


def _first_line(error: Exception) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def load_model(model_dir: Path, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode on the CPU, an adapter merged; `dtype` "auto" is the one of its config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # progress is the pipeline's to show
    files = described(model_dir)
    check_quantisation(model_dir, str(model_dir), trust_remote_code)
    capped = getattr(text_config(load_config(model_dir, trust_remote_code)), "attn_logit_softcapping", None)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder,
            # What transformers prefers, sdpa, silently leaves out the soft-cap of Gemma 2's attention.
            attn_implementation="eager" if capped else None,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of any library that takes part: transformers, safetensors, a quantiser's package
        raise UserError(
            f"{model_dir} cannot be loaded as a causal language model: {_first_line(error)}",
            "check the directory's config.json and weights",
        ) from error
    model, told = loaded
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"{model_dir}: {len(missing)} tensors of the model are not in its weights, and would be random: "
            f"{', '.join(missing[:3])}{', …' if missing[3:] else ''}",
            "complete the weights, or correct config.json, which describes another model",
        )
    if files.quantised:
        _check_runs(model.eval(), model_dir)
    return (_merged(model, files.adapter) if files.adapter else model).eval()


def _check_runs(model: Any, model_dir: Path) -> None:
    """One token through quantised weights, where they stay on the CPU: not every kernel is there and takes every shape.

    bitsandbytes' kernel for newer CPUs is left out: it rounds scales to bfloat16 and fails at widths that are not multiples
    of 64.
    """
    import torch

    if torch.cuda.is_available():
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long))
    except Exception as error:  # of the quantiser's package
        raise UserError(
            f"{model_dir}: its quantised weights do not run on this CPU: {_first_line(error)}",
            "use a GPU, or take the model's 16-bit weights",
        ) from error


def _merged(model: Any, adapter: Path) -> Any:
    """The model with the adapter's change in its weights. Every tensor of the adapter must have its place."""
    from peft import PeftModel

    hint = "name the model that the adapter was trained on: {model: BASE, adapter: DIRECTORY}"
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        told: Any = adapted.load_adapter(str(adapter), "default")  # once more: only this tells what did not fit
        lost = [*told.missing_keys, *told.unexpected_keys]
        merged: Any = None if lost else adapted.merge_and_unload(safe_merge=True).requires_grad_(True)
    except Exception as error:  # peft's errors are of many kinds
        raise UserError(f"the adapter {adapter} cannot be merged into its base: {_first_line(error)}", hint) from error
    if lost:
        raise UserError(
            f"the adapter {adapter} does not fit its base: {len(lost)} tensors have no counterpart, such as {lost[0]}",
            hint,
        )
    return merged


@contextmanager
def whole_folder(model_dir: Path, dtype: str, trust_remote_code: bool = False) -> Iterator[Path]:
    """A directory of whole weights and no others, for a program that reads every *.safetensors of it, as vLLM does.

    The model's own where that is one; else a temporary one: links to what is read, or a copy with the adapter merged.
    """
    files = described(model_dir)
    if not files.adapter and not files.unread:
        yield files.folder
        return
    with tempfile.TemporaryDirectory(prefix="duet-model-") as name:
        folder = Path(name)
        if files.adapter:
            from transformers import GenerationConfig

            model = load_model(model_dir, dtype, trust_remote_code)
            model.generation_config = GenerationConfig()  # not used, and some cannot be saved
            model.save_pretrained(folder)
        else:
            for path in files.folder.iterdir():
                if path.is_file() and path.name not in files.unread:
                    (folder / path.name).symlink_to(path.resolve())
        yield folder


def pick_device(device: str) -> str:
    """ "auto" is the first CUDA device, else the CPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device is cuda, but torch finds no CUDA device", "set device: cpu or auto, or check the driver"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def text_config(config: Any) -> Any:
    """The language model's part of a config (multimodal ones nest it)."""
    return config.get_text_config(decoder=True)


def context_length(config: Any) -> int:
    """Tokens that the model can read, from its config; NO_LIMIT where that names no limit."""
    config = text_config(config)
    found = next(filter(None, (getattr(config, key, None) for key in _CONTEXT_KEYS)), NO_LIMIT)
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "yarn" and original:  # some configs give the length before it is stretched
        found = max(found, original * rope.get("factor", 1))
    return int(found)


def vocab_width(config: Any) -> int:
    """Rows of the output head, padding included."""
    return int(text_config(config).vocab_size)


def num_parameters(model_dir: Path) -> int:
    """Numbers in the weights that are loaded, from their headers; where they are packed, those of the model before that."""
    files = described(model_dir)
    if files.quantised:
        from stages.shapes import Shape

        return Shape.of(model_dir).parameters
    return sum(count(tensor) for _, tensor in _loaded(files).values())


def eos_ids(model_dir: Path, config: Any, tokenizer: Any) -> list[int]:
    """All ids that end a response: from config.json, generation_config.json and the tokenizer, ascending."""
    found: set[int] = set()
    sources = [text_config(config).eos_token_id, tokenizer.eos_token_id]
    path = _config_folder(model_dir) / "generation_config.json"
    if path.is_file():
        sources.append(read_object(path, str(model_dir)).get("eos_token_id"))
    for source in sources:
        found |= set(source) if isinstance(source, list) else {source} - {None}
    return sorted(found)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what the tokenizer does: id map, backend rules and special ids, not its files' layout."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for key in ("padding", "truncation", "version"):
        rules.pop(key, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return sha256_json({"vocabulary": sorted(tokenizer.get_vocab().items()), "rules": rules, "special": special})


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What `save_pretrained` writes, as `tokenizer/<name>`: it travels in the store."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {f"tokenizer/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
