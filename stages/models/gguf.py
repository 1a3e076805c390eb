"""A GGUF file as a model: its weights are dequantised once, into a directory of the user's cache, and everything reads that.

The directory is named by the file's SHA-256, so the same file is never dequantised twice and a changed one is another model.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError, first_line, note
from duet.stages.models.files import ADAPTER_CONFIG_NAME, CONFIG_NAME

SUFFIX = ".gguf"
RECORD_NAME = "gguf.json"  # beside the weights: which file they are of
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # kinds of tensors that are not quantised


@dataclass(frozen=True)
class Dequantised:
    """One model of the cache."""

    folder: Path
    file: str  # the GGUF file's name
    sha256: str
    num_bytes: int


def models_dir() -> Path:
    """Where dequantised models lie: below $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duet" / "models"


def list_dequantised() -> list[Dequantised]:
    """The models of the cache, by the name of their file."""
    found = []
    for record in models_dir().glob(f"*/{RECORD_NAME}"):
        told = json.loads(record.read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in record.parent.iterdir())
        found.append(Dequantised(record.parent, told["file"], told["sha256"], size))
    return sorted(found, key=lambda model: (model.file, model.sha256))


def gguf_file(path: Path, where: str) -> Path | None:
    """The GGUF file that `path` names: itself, or the only one in a directory that holds no other model; else None."""
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if not path.is_dir() or any((path / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise UserError(
            f"{where}: {path} holds {len(files)} GGUF files: {', '.join(file.name for file in files[:3])}",
            "name one of them: DIRECTORY/FILE.gguf",
        )
    return files[0] if files else None


@functools.cache
def dequantised(file: Path, where: str) -> Path:
    """A model directory with the file's weights, tokenizer and config, made where the cache has none."""
    sha256 = _sha256(file)
    folder = models_dir() / sha256[:16]
    if not (folder / RECORD_NAME).is_file():
        _dequantise(file, sha256, folder, where)
    return folder


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _dequantise(file: Path, sha256: str, folder: Path, where: str) -> None:
    """Into a temporary directory beside it, which is renamed when it is whole: several processes may do so at a time."""
    dtype = _dtype_of(file, where)
    note(f"{file.name} is dequantised to {dtype}, once, into {folder}; `duet cache models` lists and removes it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        _save(file, dtype, temporary, where)
        record = {"file": file.name, "sha256": sha256, "dtype": dtype}
        (temporary / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was first: its directory is the same
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _dtype_of(file: Path, where: str) -> str:
    """In which the weights are kept: that of the file's matrices where they are not quantised, else bfloat16."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(
            f"{where}: {file} is a GGUF file, and the package gguf is not installed", 'pip install "duet-unlearn[gguf]"'
        ) from None
    try:
        kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    except Exception as error:  # numpy's, of a file that is cut off or is something else
        raise UserError(
            f"{where}: {file} cannot be read as GGUF: {first_line(error)}",
            "fetch the file again: it may be cut off, or be something else",
        ) from error
    return _PLAIN[kinds.pop()] if len(kinds) == 1 and kinds <= set(_PLAIN) else "bfloat16"


def _save(file: Path, dtype: str, folder: Path, where: str) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if config := getattr(transformers, "GgufConfig", None):  # before there was one, it always dequantised
        options["quantization_config"] = config(dequantize=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of progress, which no setting stops
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
            model, told = loaded
            if lost := [*told["missing_keys"], *told["mismatched_keys"]]:
                raise ValueError(
                    f"{len(lost)} tensors do not fit the model that its metadata describe, such as {lost[0]}"
                )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except Exception as error:  # of transformers and gguf, each with errors of its own
        raise UserError(
            f"{where}: transformers {transformers.__version__} cannot load {file}: {first_line(error)}",
            "take another quantisation or a newer transformers, or the model's directory with safetensors",
        ) from error
