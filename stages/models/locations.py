"""Where a model is: a directory, a GGUF file, the hub's snapshot of one, or an adapter on a base of the user's choice."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from duet.cache.errors import UserError, nearest_path
from duet.stages.models.files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    is_adapter,
)
from duet.stages.models.gguf import dequantised, gguf_file
from duet.stages.settings.teacher import AdaptedModel

_SMALL = ("*.json", "*.model", "*.jinja", "*.txt", "*.py")  # everything but weights


def find_model(name: str | AdaptedModel, where: str, weights: bool = True) -> Path:
    """The local directory of a model: `name` itself, or the hub's snapshot of it, with its weights if they are asked for."""
    if isinstance(name, AdaptedModel):
        base, adapter = (find_model(part, where, weights) for part in (name.model, name.adapter))
        if not is_adapter(adapter):
            raise UserError(
                f"{where}: {name.adapter} is not an adapter: it has no {ADAPTER_CONFIG_NAME}",
                "adapter is a directory as peft's save_pretrained writes it",
            )
        return _with_base(adapter.resolve(), base.resolve())
    return _here(Path(name), where) or _fetch(name, where, weights)


def _here(path: Path, where: str) -> Path | None:
    """The model directory that lies there, made of a GGUF file where that is what lies there."""
    if file := gguf_file(path, where):
        return dequantised(file, where)
    return path if path.is_dir() else None


def find_base(name: str, adapter: Path, weights: bool = True) -> Path:
    """The base that an adapter names: a path relative to the adapter or to the current directory, or a hub id."""
    of = f"the base of the adapter {adapter}"
    for path in (adapter / name, Path(name)):
        if here := _here(path, of):
            return here
    if is_hub_id(name):
        return _fetch(name, of, weights)
    raise UserError(
        f"{of} is not here: {name}",
        f"{nearest_path(name)}correct base_model_name_or_path in its {ADAPTER_CONFIG_NAME}, or name both: "
        "{model: BASE, adapter: DIRECTORY}",
    )


@functools.cache
def _with_base(adapter: Path, base: Path) -> Path:
    """A directory of links that is this adapter with that base; it lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="duet-adapter-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in adapter.iterdir():
        if path.name != ADAPTER_CONFIG_NAME:
            (folder / path.name).symlink_to(path)
    config = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    changed = json.dumps(config | {"base_model_name_or_path": str(base)})
    (folder / ADAPTER_CONFIG_NAME).write_text(changed, encoding="utf-8")
    return folder


def is_hub_id(name: str) -> bool:
    """Has it the form of a hub id, OWNER/NAME?"""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _fetch(name: str, where: str, weights: bool) -> Path:
    """The hub's snapshot of a model; of its weights no more than from_pretrained reads."""
    if not is_hub_id(name):
        is_file = Path(name).is_file()
        raise UserError(
            f"{where}: {name} is a file, expected a directory or .gguf"
            if is_file
            else f"{where}: no such directory: {name}",
            nearest_path(name) + "paths are relative to the current directory; a hub id is OWNER/NAME",
        )
    folder = _snapshot(name, where, _SMALL)
    return _snapshot(name, where, [*_SMALL, *_weights_of(folder)]) if weights else folder


def _weights_of(folder: Path) -> list[str]:
    """The weight files to fetch, of a model whose small files are here."""
    names = [WEIGHTS_NAME, ADAPTER_NAME]
    for path, key in ((folder / CONFIG_NAME, "transformers_weights"), (folder / INDEX_NAME, "weight_map")):
        found = json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
        names += [found] if isinstance(found, str) else sorted(set((found or {}).values()))
    return names


def _snapshot(name: str, where: str, files: Sequence[str]) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # hub and HTTP errors are OSErrors
        offline = is_offline_mode()
        why = "HF_HUB_OFFLINE is set, and it is not in the hub's cache" if offline else str(error).splitlines()[0]
        way = "unset HF_HUB_OFFLINE" if offline else "check the network and your hub token; `duet doctor` looks at both"
        raise UserError(
            f"{where}: {name} is neither a directory nor a model that can be fetched: {why}",
            f"{nearest_path(name)}check the name; {way}; or name a local directory",
        ) from None
