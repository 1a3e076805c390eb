"""The files that training ends with: the exported model, tried out before the first step so that the last is not in vain.

The trial is made of a model without weights: adapters are merged, and all files but the weights are written.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from duet.cache.errors import UserError
from duet.cache.files import publishing_dir
from duet.stages.models.directory import config_folder
from duet.stages.models.sizes import meta_model
from duet.stages.settings.lora import LoraSettings
from duet.stages.settings.student import MODEL_DIR, TrainSettings
from duet.stages.student.model import made_trainable

# Flags of generation that only sampling, or only beam search, reads.
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def export(
    model: Any,
    tokenizer: Any,
    student_dir: Path,
    dtype: torch.dtype,
    lora: LoraSettings | None,
    card_of: Callable[[Any], str],
) -> None:
    """Write `model/` in one rename: safetensors weights, config and tokenizer, as transformers and vLLM load them.

    Adapters are merged; with `lora.save_adapter`, `adapter/` holds them as peft loads them. `card_of` gets the model as it is
    written, in `dtype`, and gives the text of its card. The model is used up.
    """
    adapter = student_dir / "adapter" if lora and lora.save_adapter else None
    if adapter:
        with publishing_dir(adapter) as folder, disk_errors():
            # Not "auto", which would look for the base model on the hub; modules_to_save are saved all the same.
            model.save_pretrained(folder, save_embedding_layers=False)
    if lora:
        # In float32, and rounded below: added to rounded weights, small changes would be lost.
        model = model.merge_and_unload()
    unset_unread(model.generation_config)
    _cast(model, dtype)
    card = card_of(model)
    if adapter:
        (adapter / "README.md").write_text(card, encoding="utf-8")  # peft's own names the base's directory
    with publishing_dir(student_dir / MODEL_DIR) as folder, disk_errors():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast what is written, as loading does. `model.to` would also round buffers that are never written: the frequencies of
    rotary positions, and with them the angle of every position far along.
    """
    written, wide = model.state_dict(), _kept_wide(model, dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in written and tensor.is_floating_point() and not any(re.search(part, name) for part in wide):
            tensor.data = tensor.data.to(dtype)


def _kept_wide(model: Any, dtype: torch.dtype) -> list[str]:
    """Patterns of the names of what transformers leaves in float32 when it loads the model in `dtype`, as a router's biases."""
    always, in_float16 = (getattr(model, f"_keep_in_fp32_modules{kind}", None) or () for kind in ("_strict", ""))
    return [part.replace("*", ".*") for part in (*always, *(in_float16 if dtype == torch.float16 else ()))]


def try_export(model_dir: Path, settings: TrainSettings, tokenizer: Any, trust_remote_code: bool) -> list[str]:
    """Do all of training and export that needs no weights; a UserError says what would fail.

    Returns the flags of generation_config.json that the export leaves out.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = meta_model(model_dir, trust_remote_code)
    whole = config_folder(model_dir)  # an adapter is loaded with its base's flags
    try:
        if (whole / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(whole)
        left_out = unset_unread(model.generation_config)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{whole}: its generation_config.json cannot be saved again: {_reason(error)}",
            "correct the flag in that file, or take it out",
        ) from error
    model = made_trainable(model, "", settings, torch.float32, uniform=True)
    try:
        if settings.lora:
            model = model.merge_and_unload()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{model_dir}: transformers could not save the trained model: {_reason(error)}",
            "correct the model's config.json; with train.lora, leave out the modules that cannot be merged",
        ) from error
    return left_out


def unset_unread(generation: Any) -> list[str]:
    """Unset flags that generation does not read; returns their names. ValueError where transformers would not save the rest.

    transformers refuses to save, for example, a temperature beside do_sample false, which many models ship. None of these
    flags decides an answer: sampling is off.
    """
    if generation is None:  # of a model that only code of its own makes generate
        return []
    try:
        generation.validate(strict=True)
        return []
    except ValueError:
        unread = [name for name in _unread(generation) if getattr(generation, name, None) not in (None, False)]
        for name in unread:
            setattr(generation, name, None)
        generation.validate(strict=True)
        return unread


def _unread(generation: Any) -> Iterator[str]:
    if generation.do_sample is not True:
        yield from SAMPLING
    if generation.num_beams in (None, 1):
        yield from BEAMS
    if generation.return_dict_in_generate is not True:
        yield from generation.extra_output_flags
    if generation.use_cache is False:
        yield "cache_implementation"
    if (generation.pad_token_id or 0) < 0:
        yield "pad_token_id"


def _reason(error: Exception) -> str:
    """The first informative line: transformers begins with a heading."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), repr(error))


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the error that safetensors raises on a full disk, which has its number in the text only, into an OSError."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
