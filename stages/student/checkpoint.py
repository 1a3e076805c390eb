"""Checkpoints of the student's loop: safetensors and JSON, written beside and renamed, the newest kept.

A checkpoint holds the trained parameters in float32, the optimizer's state, the step and the store's cursor: all that it
takes to go on bit for bit on a CPU, since each step draws its random numbers from the seed and the step's number. Tensors are
whole, so any number of processes can read it.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from duet.cache.errors import UserError
from duet.cache.files import publish_json, publishing, publishing_dir, read_json
from duet.cache.order import Cursor
from duet.stages.student.export import disk_errors
from duet.stages.student.model import trained
from duet.stages.student.ranks import Processes, like, on_first

BEST_NAME = "best.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands: optimizer steps done, the next batch, seconds trained, and how the probes went."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    train_s: float = 0.0
    stall_s: float = 0.0  # of these, waited for the store
    tokens: int = 0  # over all processes, without padding
    best_loss: float | None = None  # lowest on held-out rows so far
    probes_since: int = 0  # probes since then
    is_close: bool = False  # the loss on held-out rows is within `probe.stop_within`

    def after(self, cursor: Cursor, tokens: int, seconds: float, stall_s: float) -> TrainingState:
        """The state after one more step, with `cursor` at the next batch."""
        return replace(
            self,
            step=self.step + 1,
            cursor=cursor,
            train_s=self.train_s + seconds,
            stall_s=self.stall_s + stall_s,
            tokens=self.tokens + tokens,
        )


def save(
    checkpoint_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    processes: Processes,
    keep_last: int,
) -> None:
    """Write `step-<n>/` and remove all but the `keep_last` newest. All processes call this; the first one writes."""
    parameters = _parameters(model, processes)
    moments = _optimizer_tensors(model, optimizer, processes)
    if not processes.first:
        return
    with publishing_dir(checkpoint_dir / f"step-{state.step:09d}") as folder, disk_errors():
        save_file(parameters, folder / "model.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        publish_json(folder / "progress.json", asdict(state))
    for stale in sorted(checkpoint_dir.glob("step-*"))[:-keep_last]:
        shutil.rmtree(stale)


def load_newest(
    checkpoint_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> TrainingState | None:
    """Restore the newest checkpoint that the first process finds, in all; None where there is none.

    UserError where another process does not see it: it would begin elsewhere, and their weights would differ.
    """
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint_dir.glob("step-*")]
    newest = int(processes.tell([max(steps, default=0)])[0, 0])
    if newest == 0:
        return None
    folder = checkpoint_dir / f"step-{newest:09d}"
    if not processes.tell([folder.is_dir()]).all():
        raise UserError(
            f"the checkpoint {folder} is not there on every machine",
            "set runs_dir to a folder that all machines share; if they do, run the same command again: it may show it late",
        )
    load_parameters(folder / "model.safetensors", model)
    _restore_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
    raw = read_json(folder / "progress.json")
    return TrainingState(**{**raw, "cursor": Cursor(**raw["cursor"])})


def save_best(checkpoint_dir: Path, model: torch.nn.Module, processes: Processes) -> None:
    """Keep the trained parameters as the best so far."""
    parameters = _parameters(model, processes)
    if not processes.first:
        return
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    with publishing(checkpoint_dir / BEST_NAME) as temporary, disk_errors():
        save_file(parameters, temporary)


def load_parameters(path: Path, model: torch.nn.Module) -> None:
    """Fill the trained parameters from a safetensors file."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(like(tensors[name], parameter))


def _parameters(model: torch.nn.Module, processes: Processes) -> dict[str, torch.Tensor]:
    return {name: on_first(parameter.detach(), processes) for name, parameter in trained(model).items()}


def _optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<key>/<parameter>`; plain numbers (bitsandbytes counts steps that way) become int64."""
    tensors = {}
    for name, parameter in trained(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)
            tensors[f"{key}/{name}"] = on_first(tensor, processes)
    return tensors


def _restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    by_name = trained(model)
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        number = tensor.dtype == torch.int64 and tensor.ndim == 0
        optimizer.state[by_name[name]][key] = int(tensor) if number else like(tensor, by_name[name])
