"""Model directories: found or fetched, checked, hashed, loaded. Safetensors only; remote code only where asked for."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.errors import UserError
from cache.files import sha256_file, sha256_json
from stages.near import near_path
from stages.tokenizer_file import as_the_file_says

# Keys of config.json that say where a model came from, not what it computes.
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version")
_DOWNLOADED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt", "*.py")


def resolve_model(name: str, where: str) -> Path:
    """The local directory of a model: `name` itself, or the hub's snapshot of it, with safetensors weights."""
    path = Path(name)
    if not path.is_dir():
        path = _fetch(name, where)
    _check_config_there(path, name, where)
    if not list(path.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise UserError(
            f"{where}: {name} has no weights: expected *.safetensors, found {found}",
            "complete the directory; convert .bin weights with transformers' save_pretrained",
        )
    return path


def is_hub_id(name: str) -> bool:
    """Has it the form of a hub id, OWNER/NAME?"""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _fetch(name: str, where: str, files: Sequence[str] = _DOWNLOADED) -> Path:
    if not is_hub_id(name):
        is_file = Path(name).is_file()
        raise UserError(
            f"{where}: {name} is a file, expected a directory" if is_file else f"{where}: no such directory: {name}",
            near_path(name) + "paths are relative to the current directory; a hub id is OWNER/NAME",
        )
    from huggingface_hub import is_offline_mode, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # hub and HTTP errors are OSErrors
        offline = is_offline_mode()
        why = "HF_HUB_OFFLINE is set, and it is not in the hub's cache" if offline else str(error).splitlines()[0]
        way = "unset HF_HUB_OFFLINE" if offline else "check the network and your hub token; `duet doctor` looks at both"
        raise UserError(
            f"{where}: {name} is neither a directory nor a model that can be fetched: {why}",
            f"{near_path(name)}check the name; {way}; or name a local directory",
        ) from None


def small_files(name: str, where: str) -> Path:
    """The directory of a model, of which only config and tokenizer are needed: of one on the hub no weights are fetched."""
    path = Path(name)
    if not path.is_dir():
        path = _fetch(name, where, [pattern for pattern in _DOWNLOADED if not pattern.endswith(".safetensors")])
    _check_config_there(path, name, where)
    return path


def _check_config_there(path: Path, name: str, where: str) -> None:
    if (path / "config.json").is_file():
        return
    inside = ", ".join(str(Path(name) / found.parent.name) for found in sorted(path.glob("*/config.json")))
    raise UserError(
        f"{where}: {name} has no config.json",
        f"name one of the models in it: {inside}" if inside else "name a model directory as save_pretrained writes it",
    )


def weights_sha256(model_dir: Path) -> str:
    """One hash over all that decides the model's numbers: config (without its origin) and weight files, by name.

    A file that has neither another size nor another time since this process last read it is not read again: several parts of
    a stage ask, and weights are large.
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    files = {path.name: _sha256_of(path) for path in sorted(model_dir.glob("*.safetensors"))}
    return sha256_json({"config": config, "files": files})


def _sha256_of(path: Path) -> str:
    stat = path.stat()
    return _sha256_once(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.cache
def _sha256_once(path: Path, *_of_this_version: int) -> str:
    return sha256_file(path)


def load_tokenizer(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer; a directory without one is a UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_dir} has no tokenizer that can be loaded: {str(error).splitlines()[0]}",
            "put the tokenizer's files beside the weights; if it needs code of its own, read it and set trust_remote_code",
        ) from None
    return as_the_file_says(tokenizer, model_dir)


def load_config(model_dir: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_dir}: config.json cannot be read: {str(error).splitlines()[0]}", "check the model directory"
        ) from None


def load_model(model_dir: Path, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode on the CPU; `dtype` "auto" is the one of its config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the pipeline's to show
    capped = getattr(text_config(load_config(model_dir, trust_remote_code)), "attn_logit_softcapping", None)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            # What transformers prefers, sdpa, silently leaves out the soft-cap of Gemma 2's attention.
            attn_implementation="eager" if capped else None,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_dir} cannot be loaded as a causal language model: {str(error).splitlines()[0]}",
            "check the directory's config.json and weights",
        ) from None
    return model.eval()


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
    return config.get_text_config()


def context_length(config: Any) -> int:
    """Tokens that the model can read, from its config."""
    return int(text_config(config).max_position_embeddings)


def vocab_width(config: Any) -> int:
    """Rows of the output head, padding included."""
    return int(text_config(config).vocab_size)


def num_parameters(model_dir: Path) -> int:
    """Numbers in the weight files, read from their headers."""
    from safetensors import safe_open

    total = 0
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def eos_ids(model_dir: Path, config: Any, tokenizer: Any) -> list[int]:
    """All ids that end a response: from config.json, generation_config.json and the tokenizer, ascending."""
    found: set[int] = set()
    sources = [text_config(config).eos_token_id, tokenizer.eos_token_id]
    path = model_dir / "generation_config.json"
    if path.is_file():
        sources.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
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
