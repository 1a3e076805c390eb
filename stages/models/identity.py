"""Which model a directory holds: a hash of its weights and of all settings that change what they compute."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from duet.cache.files import sha256_file, sha256_json
from duet.stages.models.directory import described, load_config, text_config
from duet.stages.models.files import ADAPTER_CONFIG_NAME, ADAPTER_NAME, ModelFiles, digest, read_object, tensors_of
from duet.stages.models.loading import DTYPES, loaded
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_sha256

# What a config says of a model's origin and form on disk, not of what it computes. Its dtype counts, in one spelling.
_VOLATILE_CONFIG_KEYS = (
    "_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache", "transformers_weights",
)  # fmt: skip
_VOLATILE_ADAPTER_KEYS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


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
    if "auto_map" in files.config:  # understood by its own code only, which decides the numbers as much as the weights
        code = {path.name: sha256_file(path) for path in sorted(files.folder.glob("*.py"))}
        return {key: value for key, value in files.config.items() if key not in _VOLATILE_CONFIG_KEYS} | {".py": code}
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
    floating = (tensor.dtype for _, (_, tensor) in sorted(files.tensors().items()) if tensor.dtype in DTYPES)
    return str(named).removeprefix("torch.") if named else DTYPES[next(floating, "F32")]


def _tensors_sha256(files: ModelFiles) -> str:
    prefix = _base_prefix(files)
    rows = [
        [name.removeprefix(prefix), tensor.dtype, tensor.shape, digest(path, name)]
        for name, (path, tensor) in loaded(files).items()
    ]
    return sha256_json(sorted(rows, key=lambda row: row[0]))


def _base_prefix(files: ModelFiles) -> str:
    """What stands before the names of a causal language model's inner model ("transformer."), which some files leave out."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if "auto_map" in files.config:
        return ""
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(load_config(files.folder)), None)
    return f"{getattr(cls, 'base_model_prefix', '')}." if cls else ""


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
