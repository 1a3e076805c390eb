"""What a model directory holds: one description that loading, hashing, counting, `duet doctor` and errors share.

Needs neither torch nor transformers. Described is what `from_pretrained` reads and nothing else: `model.safetensors`, or else
the shards that `model.safetensors.index.json` names. A PEFT adapter is a model as well: its base's files, and the adapter's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from duet.cache.errors import UserError

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG_NAME, ADAPTER_NAME = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_LFS = b"version https://git-lfs.github.com/spec/"
_TORN = "the download did not finish, or the file was damaged: fetch it again"
# Kinds of adapters that add tokens or modules instead of changing weights, so that nothing can be merged.
_NOT_MERGED = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "XLORA",
)


class Tensor(NamedTuple):
    """One tensor of a safetensors file: `start` and `end` are places in the file."""

    dtype: str  # as safetensors calls it: BF16, F32, …
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class ModelFiles:
    """A model as it is loaded: the whole model's directory and, where there is one, the adapter that is merged into it."""

    folder: Path  # config.json and whole weights
    config: Mapping[str, Any]  # config.json as it stands
    weights: tuple[Path, ...]  # what from_pretrained reads, by name
    adapter: Path | None = None  # the adapter's directory

    @property
    def quantised(self) -> str | None:
        """The method with which the stored weights are quantised."""
        return quantised_with(self.config)

    @property
    def unread(self) -> list[str]:
        """Weight files beside those that are read: other formats, copies, what an earlier save left."""
        return sorted(path.name for path in self.folder.glob("*.safetensors") if path not in self.weights)

    def tensors(self) -> dict[str, tuple[Path, Tensor]]:
        """Every tensor that is read, by name."""
        return {name: (path, tensor) for path in self.weights for name, tensor in tensors_of(path).items()}


def quantised_with(config: Mapping[str, Any]) -> str | None:
    """The method of a config.json's `quantization_config`, of a nested language model's too."""
    of_text = config.get("text_config") or {}
    found = config.get("quantization_config") or of_text.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    return str(found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "an unnamed method"))


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_NAME).is_file()


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_NAMES)


def describe(folder: Path, find_base: Callable[[str, Path], Path], called: str = "") -> ModelFiles:
    """The description of a directory, every file of it checked by its header; UserError says what is wrong with it.

    `find_base(name, adapter)` finds the base that an adapter names. `called` is what errors call the directory.
    """
    called = called or str(folder)
    if not is_adapter(folder):
        config = read_object(folder / CONFIG_NAME, called)
        return ModelFiles(folder, config, _checked(_weights(folder, config, called)))
    check_adapter(folder, called)
    base = find_base(adapter_base(folder, called), folder)
    if is_adapter(base):
        raise UserError(
            f"{called} is an adapter for {base}, which is an adapter itself",
            "merge the first into its base and save that, then name {model: MERGED, adapter: DIRECTORY}",
        )
    config = read_object(base / CONFIG_NAME, str(base))
    if method := quantised_with(config):
        raise UserError(
            f"{called} is an adapter for {base}, which is quantised ({method}): it cannot be merged exactly",
            "name the 16-bit weights that the base was made of: {model: BASE, adapter: DIRECTORY}",
        )
    return ModelFiles(base, config, _checked(_weights(base, config, str(base))), folder)


def check_adapter(folder: Path, called: str) -> None:
    """Refuse an adapter that cannot be merged, and one beside whole weights."""
    for name in (WEIGHTS_NAME, INDEX_NAME):
        if (folder / name).is_file():
            raise UserError(
                f"{called}: {ADAPTER_CONFIG_NAME} lies beside whole weights ({name}), and would be put on top of them",
                f"if the adapter is merged into them already, move {ADAPTER_CONFIG_NAME} and its weights away; if not, move "
                "the adapter to a directory of its own and name {model: DIRECTORY, adapter: DIRECTORY}",
            )
    config = read_object(folder / ADAPTER_CONFIG_NAME, called)
    kind, task = str(config.get("peft_type")).upper(), config.get("task_type")
    if kind in _NOT_MERGED or task not in (None, "CAUSAL_LM"):
        what = f"an adapter of the kind {kind}" if kind in _NOT_MERGED else f"an adapter for the task {task}"
        raise UserError(
            f"{called} is {what}, which cannot be merged into a causal language model",
            "take an adapter that changes weights, such as LoRA, with task_type CAUSAL_LM",
        )
    if not (folder / ADAPTER_NAME).is_file():
        raise UserError(
            f"{called} is an adapter without {ADAPTER_NAME}",
            "its .bin weights are not read: load it with peft and save it again"
            if list(folder.glob("*.bin"))
            else "complete the directory",
        )
    tensors_of(folder / ADAPTER_NAME)


def adapter_base(folder: Path, called: str) -> str:
    """What an adapter says that it was trained on."""
    name = read_object(folder / ADAPTER_CONFIG_NAME, called).get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{called} is an adapter that does not say for which model (base_model_name_or_path)",
            "name both in the config: {model: BASE, adapter: DIRECTORY}",
        )
    return str(name)


def read_object(path: Path, called: str) -> dict[str, Any]:
    """The JSON object in a file of the directory `called`."""
    if not path.is_file():
        raise UserError(*_no_config(path.parent, called))
    check_whole(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is not JSON: {error}", _TORN) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, expected an object", "check the model directory")
    return found


def check_whole(path: Path) -> None:
    """Refuse a file that is empty or a Git LFS pointer in the place of one."""
    with path.open("rb") as file:
        begins = file.read(len(_LFS))
    if begins == _LFS:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself",
            f"run `git lfs install` and `git lfs pull` in {path.parent}, or fetch the model with `hf download`",
        )
    if not begins:
        raise UserError(f"{path} is empty", _TORN)


def _no_config(folder: Path, called: str) -> tuple[str, str]:
    if list(folder.glob("*.gguf")):
        return _only_gguf(folder, called)
    inside = ", ".join(sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG_NAME}")))
    return (
        f"{called} has no {CONFIG_NAME}",
        f"name one of the models in it: {inside}" if inside else "name a model directory as save_pretrained writes it",
    )


def _only_gguf(folder: Path, called: str) -> tuple[str, str]:
    names = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
    return (
        f"{called} has its weights as GGUF only, which is not read: {names}",
        "take the model's safetensors; or convert: AutoModelForCausalLM.from_pretrained(DIRECTORY, gguf_file=NAME, "
        "quantization_config=GgufConfig(dequantize=True)), delete its config.quantization_config, save_pretrained",
    )


def _weights(folder: Path, config: Mapping[str, Any], called: str) -> tuple[Path, ...]:
    """The files that from_pretrained reads: as it does, one whole file before an index."""
    named = config.get("transformers_weights")
    name = str(named) if named else WEIGHTS_NAME if (folder / WEIGHTS_NAME).is_file() else INDEX_NAME
    path = folder / name
    if not path.is_file():
        raise UserError(*_no_weights(folder, called))
    if not name.endswith(".index.json"):
        return (path,)
    shards = sorted(set(read_object(path, called).get("weight_map", {}).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise UserError(
            f"{called}: {len(missing)} of {len(shards)} weight files that {name} names are missing: "
            f"{', '.join(missing[:3])}{', …' if missing[3:] else ''}",
            "complete the directory: fetch it again",
        )
    return tuple(folder / shard for shard in shards)


def _no_weights(folder: Path, called: str) -> tuple[str, str]:
    if list(folder.glob("*.gguf")):
        return _only_gguf(folder, called)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    what = f"{called} has no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}, found {found}"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        return what, "convert .bin weights with transformers' save_pretrained"
    if list(folder.glob("*.safetensors")):
        return (
            what,
            f"from_pretrained reads none of these: save the model again, or rename its weights to {WEIGHTS_NAME}",
        )
    return what, "complete the directory"


def _checked(weights: tuple[Path, ...]) -> tuple[Path, ...]:
    for path in weights:
        tensors_of(path)
    return weights


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file from its header; UserError where the file is not what the header says."""
    return _header(*_version(path))


def _version(path: Path) -> tuple[Path, int, int, int]:
    stat = path.stat()
    return path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino


@functools.cache
def _header(path: Path, size: int, *_of_this_version: int) -> dict[str, Tensor]:
    check_whole(path)
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(data - 8)) if data <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: it has no header of one", _TORN)
    header.pop("__metadata__", None)
    found = {
        name: Tensor(one["dtype"], tuple(one["shape"]), data + one["data_offsets"][0], data + one["data_offsets"][1])
        for name, one in header.items()
    }
    expected = max((tensor.end for tensor in found.values()), default=data)
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, and its header says {expected:,}", _TORN)
    return found


def count(tensor: Tensor) -> int:
    """Numbers in a tensor."""
    return math.prod(tensor.shape)


def digest(path: Path, name: str) -> str:
    """sha256 of a tensor's bytes. A file of the same size, time and inode is read only once: weights are large."""
    return _digest(*_version(path), name)


@functools.cache
def _digest(path: Path, size: int, mtime: int, inode: int, name: str) -> str:
    tensor = _header(path, size, mtime, inode)[name]
    found = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left and (block := file.read(min(left, 2**22))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()
