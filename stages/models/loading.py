"""A model's weights, loaded onto a device. Safetensors only; remote code only where the user asked for it."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError, first_line
from duet.stages.models.directory import check_quantisation, described, load_config, text_config
from duet.stages.models.files import ModelFiles, count, digest

_HEADS = ("lm_head.weight", "embed_out.weight")  # how output heads are called that may be tied to the embedding
# Of a model of fewer parameters the matrices are so small that a CPU's second thread is waited for longer than it works.
THREADED_FROM = 10_000_000
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def loaded(files: ModelFiles) -> dict[str, tuple[Path, Any]]:
    """The tensors that are read, without a head that repeats the embedding to which the config ties it."""
    tensors = files.tensors()
    heads = [name for name in tensors if name.endswith(_HEADS)]
    if not heads or "auto_map" in files.config or not getattr(load_config(files.folder), "tie_word_embeddings", False):
        return tensors
    shapes = {tensors[head][1].shape for head in heads}
    others = {digest(path, name) for name, (path, t) in tensors.items() if t.shape in shapes and name not in heads}
    return {name: of for name, of in tensors.items() if name not in heads or digest(of[0], name) not in others}


def load_model(model_dir: Path, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode on the CPU, an adapter merged; `dtype` "auto" is the one of its config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    _threads_at_first()
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
            f"{model_dir} cannot be loaded as a causal language model: {first_line(error)}",
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
    model = (_merged(model, files.adapter) if files.adapter else model).eval()
    _set_threads(model.num_parameters())
    return model


def _set_threads(parameters: int) -> None:
    """How many threads torch uses on a CPU from now on: one for a small model, unless OMP_NUM_THREADS says how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if parameters < THREADED_FROM else _threads_at_first())


@functools.cache
def _threads_at_first() -> int:
    import torch

    return torch.get_num_threads()


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
            f"{model_dir}: its quantised weights do not run on this CPU: {first_line(error)}",
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
        raise UserError(f"the adapter {adapter} cannot be merged into its base: {first_line(error)}", hint) from error
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


def num_parameters(model_dir: Path) -> int:
    """Numbers in the weights that are loaded, from their headers; where they are packed, those of the model before that."""
    files = described(model_dir)
    if files.quantised:
        from duet.stages.models.sizes import ModelSizes

        return ModelSizes.of(model_dir).parameters
    return sum(count(tensor) for _, tensor in loaded(files).values())
