"""Checkpoints of the student's loop: safetensors and JSON, written beside and renamed, the newest kept.

A checkpoint holds the trained parameters in float32, AdamW's state, torch's random state, the step, and the store's
cursor: what it takes to go on bit for bit on a CPU.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cache.files import publish_json, read_json, sync_dir
from cache.order import Cursor


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, the next batch, and seconds trained so far."""

    step: int
    cursor: Cursor
    train_s: float


def save(checkpoint_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Publish a checkpoint as `step-NNNNNN` and remove older ones."""
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    final = checkpoint_dir / f"step-{progress.step:06d}"
    temporary = checkpoint_dir / f".{final.name}.tmp"
    for stale in (temporary, final):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, temporary / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
    publish_json(temporary / "progress.json", asdict(progress))
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_dir(temporary)
    os.replace(temporary, final)
    sync_dir(checkpoint_dir)
    for path in checkpoint_dir.glob("step-*"):
        if path != final:
            shutil.rmtree(path)


def load_newest(checkpoint_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restore the newest checkpoint into model, optimizer and torch's random state; None where there is none."""
    found = sorted(checkpoint_dir.glob("step-*"))
    if not found:
        return None
    parameters = load_file(found[-1] / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    tensors = load_file(found[-1] / "optimizer.safetensors")
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    _restore_optimizer(model, optimizer, tensors)
    raw = read_json(found[-1] / "progress.json")
    return Progress(raw["step"], Cursor(**raw["cursor"]), raw["train_s"])


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, `adamw.<key>.<name>`, and the random states."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adamw.{key}.{name}"] = value.detach().contiguous()
    return tensors


def _restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    by_name = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        if full_name.startswith("adamw."):
            _, key, name = full_name.split(".", 2)
            parameter = by_name[name]
            optimizer.state[parameter][key] = tensor if key == "step" else tensor.to(parameter.device)
