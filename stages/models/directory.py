"""A model directory: found, read, and refused where its quantisation or its config do not fit what is asked of it.

What its files hold is described in `files.py`, where it lies in `locations.py`; `loading.py` loads its weights.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError, first_line
from duet.stages.models.files import (
    CONFIG_NAME,
    ModelFiles,
    adapter_base,
    describe,
    is_adapter,
    quantised_with,
    read_object,
)
from duet.stages.models.locations import find_base, find_model
from duet.stages.settings.teacher import AdaptedModel


def resolve_model(name: str | AdaptedModel, where: str) -> Path:
    """The local directory of a model, checked: `name` itself, or the hub's snapshot of it."""
    folder = find_model(name, where)
    described(folder, f"{where}: {name}")
    return folder


def small_files(name: str | AdaptedModel, where: str) -> Path:
    """The directory of a model, of which only config and tokenizer are needed: of one on the hub no weights are fetched."""
    folder = find_model(name, where, weights=False)
    read_object(config_folder(folder) / CONFIG_NAME, f"{where}: {name}")
    return folder


def described(model_dir: Path, called: str = "") -> ModelFiles:
    """The description of a model directory; UserError says what is wrong with it."""
    return describe(model_dir, find_base, called)


def config_folder(model_dir: Path) -> Path:
    """Where config.json lies: an adapter has its base's."""
    if not is_adapter(model_dir):
        return model_dir
    return find_base(adapter_base(model_dir, str(model_dir)), model_dir, weights=False)


def check_trainable_start(model_dir: Path, where: str) -> None:
    """Refuse a model that no student can start from, by its config alone."""
    folder = config_folder(model_dir)
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
        return first_line(error)
    return None


def check_quantisation(model_dir: Path, called: str, trust_remote_code: bool = False) -> None:
    """Refuse quantised weights that transformers cannot run here."""
    if fault := quantisation_fault(model_dir, trust_remote_code):
        method = quantised_with(read_object(config_folder(model_dir) / CONFIG_NAME, str(model_dir)))
        raise UserError(
            f"{called} is quantised with {method}, which cannot run here: {fault}",
            "install what is named there, or take the model's 16-bit weights",
        )


def load_config(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """The model's config; of an adapter, its base's."""
    from transformers import AutoConfig

    folder = config_folder(model_dir)
    read_object(folder / CONFIG_NAME, str(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configs check themselves, each with errors of its own
        raise UserError(
            f"{model_dir}: config.json cannot be read: {first_line(error)}", "check the model directory"
        ) from error


def text_config(config: Any) -> Any:
    """The language model's part of a config (multimodal ones nest it)."""
    return config.get_text_config(decoder=True)
