"""The processes that train one student, one or several: their ranks, their messages, and how the model is spread.

Every process runs the same loop on its own part of each batch. With one process, everything here is a no-op.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from duet.cache.reader import Rank


@dataclass(frozen=True)
class Processes:
    """The processes that share the work, and the device of this one."""

    rank: Rank
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank.number == 0

    def tell(self, values: Sequence[float]) -> torch.Tensor:
        """Give these values to all processes; returns the values of each, float64 [world, values], in the order of ranks."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.rank.world == 1:
            return mine[None]
        # Gloo and NCCL both move float32 and float64; NCCL only from its own device.
        mine = mine.to(self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.rank.world)]
        dist.all_gather(all_of_them, mine)
        return torch.stack(all_of_them).cpu()

    def wait(self) -> None:
        """Wait until every process is here."""
        self.tell([0.0])

    @contextmanager
    def first_first(self) -> Iterator[None]:
        """The first process goes through the block before any other enters it; its error reaches all.

        For files that the first writes and the others then find.
        """
        if self.first:
            try:
                yield
            except BaseException:
                self.tell([1.0])
                raise
            self.tell([0.0])
            return
        if self.tell([0.0])[0, 0]:
            raise FirstFailed
        yield

    def spread(
        self,
        module: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        parallel: str,
        ready: Callable[[torch.nn.Module], None],
    ) -> torch.nn.Module:
        """The module with its gradients averaged over the processes: whole in each ("ddp"), or in parts ("fsdp").

        `ready` brings the weights of a module into memory, those that are spread already left out. In parts, it is called for
        one layer after the other, so that no process ever holds more than one whole, or what lies outside of the layers.
        """
        if self.rank.world == 1 or parallel == "ddp":
            ready(module)
            return module if self.rank.world == 1 else DistributedDataParallel(module)
        # A separate group: torch keeps a mesh and its group to the end of the process, which `joined` must not wait for.
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)  # not the mark of a process outside the group: all are in it
        mesh = DeviceMesh.from_group(group, self.device.type)
        for layer in layers:
            ready(layer)
            fully_shard(layer, mesh=mesh)
        ready(module)
        fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(module, "try_head")
        return module


class FirstFailed(Exception):
    """The first process has ended with an error, which that process reports."""


@contextmanager
def joined(rank: Rank, device: torch.device) -> Iterator[Processes]:
    """This process among the others; they find each other through the environment that torchrun sets."""
    if rank.world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The first one fetches models and writes them while the others wait.
        patience = timedelta(hours=6)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield Processes(rank, device)
    finally:
        if rank.world > 1:
            dist.destroy_process_group()
            # Gloo's threads need the interpreter to drop the last message's tensors: a thread that does so while the
            # interpreter is ending aborts the process. Collecting the group here waits for them.
            gc.collect()


def without_sync(module: torch.nn.Module) -> Any:
    """A context in which a backward pass leaves the exchange of gradients to a later one, where that saves time."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def in_parts_again(module: torch.nn.Module) -> None:
    """After a forward pass without a backward one: weights outside of the layers stay whole until there is one."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which every process may hold a part; all must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_first(tensor: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The whole of a tensor, copied to the CPU of the first process; elsewhere an empty one. All must ask together."""
    found = whole(tensor)
    return found.to("cpu", copy=True).contiguous() if processes.first else torch.empty(0)


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`tensor`, on the parameter's device and, where the parameter is spread, spread as it is."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)
