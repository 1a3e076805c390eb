"""The rates and memory of a device: of a named GPU from its data sheet (`gpus.yaml`), of the one here looked up or measured."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from duet.cache.errors import UserError, did_you_mean

GPUS_PATH = Path(__file__).with_name("gpus.yaml")
FLOP_PER_BYTE = 150  # assumption, not measured: of a GPU whose bandwidth is not given, as an A100 has it
SIDE = 1024  # of the matrices whose product is timed, and 4 MB each in float32
REPEATS = 5


@dataclass(frozen=True)
class Device:
    """Peak rates; `memory.py` assumes the share of them that a program reaches."""

    name: str
    kind: str  # "cuda" or "cpu"
    memory_bytes: float
    flops16: float  # FLOP/s of 16-bit products
    flops32: float
    bytes_per_s: float
    bf16: bool
    source: str

    def flops(self, dtype: str) -> float:
        """FLOP/s in this dtype; bfloat16 without hardware for it is computed in float32."""
        fast = dtype == "float16" or (dtype == "bfloat16" and self.bf16)
        return self.flops16 if fast else self.flops32


def gpu_names() -> list[str]:
    return list(_table())


def named_gpu(name: str) -> Device:
    """A GPU of the table; upper and lower case do not matter."""
    table = _table()
    found = next((key for key in table if key.lower() == name.lower()), None)
    if found is None:
        hint = did_you_mean(name.upper(), table)
        raise UserError(
            f"--gpu {name}: not in the table", f"{hint}It has {', '.join(table)}; or say --gpu-memory GB --tflops X"
        )
    return _of_sheet(found)


def described_gpu(memory_gb: float, tflops: float) -> Device:
    """A GPU of known memory and 16-bit rate; float32 counts as a quarter of that rate, and the bandwidth is assumed."""
    rate = tflops * 1e12
    source = "as the command line says; float32 rate and bandwidth assumed"
    return Device(
        f"a GPU of {memory_gb:g} GB", "cuda", memory_gb * 1e9, rate, rate / 4, rate / FLOP_PER_BYTE, True, source
    )


def device_here(kind: str) -> Device:
    """The first GPU, or this machine's CPU, whose rates are measured in a fraction of a second."""
    import torch

    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        for name, row in _table().items():
            if re.search(row["seen_as"], properties.name):
                return replace(_of_sheet(name), memory_bytes=float(properties.total_memory))
        bf16 = properties.major >= 8
        flops32, speed = _measured("cuda", "float32")
        flops16, _ = _measured("cuda", "bfloat16" if bf16 else "float16")
        return Device(
            properties.name, "cuda", float(properties.total_memory), flops16, flops32, speed, bf16, "measured here"
        )
    flops32, speed = _measured("cpu", "float32")
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device("this machine's CPU", "cpu", memory, flops32, flops32, speed, False, "measured here")


def _measured(kind: str, dtype: str) -> tuple[float, float]:
    """FLOP/s of a product of square matrices and bytes per second of a copy (read and written), the best of a few."""
    import torch

    a = torch.ones((SIDE, SIDE), dtype=getattr(torch, dtype), device=kind)
    large = torch.ones(32 * SIDE * SIDE, dtype=torch.uint8, device=kind)
    product = min(_seconds(lambda: a @ a, kind) for _ in range(REPEATS))
    target = torch.zeros_like(large)
    copy = min(_seconds(lambda: target.copy_(large), kind) for _ in range(REPEATS))
    return 2 * SIDE**3 / product, 2 * large.numel() / copy


def _seconds(work: Callable[[], object], kind: str) -> float:
    import torch

    started = time.perf_counter()
    work()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _of_sheet(name: str) -> Device:
    row = _table()[name]
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=row["memory"] * 1e9,
        flops16=row["tflops16"] * 1e12,
        flops32=row["tflops32"] * 1e12,
        bytes_per_s=row["bandwidth"] * 1e9,
        bf16=row.get("bf16", True),
        source=row["source"],
    )


def _table() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(GPUS_PATH.read_text(encoding="utf-8"))
