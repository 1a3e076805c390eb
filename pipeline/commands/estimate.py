"""`duet estimate`: memory and time of each stage on a GPU that need not be here, and which settings would make it fit.

Formulas and assumptions are in `stages/cost/memory.py`, the GPUs in `stages/cost/gpus.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from duet.cache.errors import UserError
from duet.pipeline.commands.estimate_stages import Stage, stages_of
from duet.pipeline.config.chain import as_if_first, steps_of
from duet.pipeline.config.schema import Config
from duet.pipeline.run.terminal import say, say_json
from duet.stages.cost.gpus import Device, described_gpu, device_here, named_gpu
from duet.stages.cost.memory import ASSUMPTIONS, Need


def estimate(config: Config, device: Callable[[str], Device], devices: int, as_json: bool) -> None:
    """Say memory and time of teacher, students and evaluation; `device(kind)` gives a device of the config's kind."""
    from duet.stages.models.loading import pick_device

    on = device("cpu" if config.device == "cpu" else pick_device("auto"))
    stages = stages_of(config, on, devices)
    for step in steps_of(config):
        later = stages_of(as_if_first(config, step), on, devices)
        stages += [replace(stage, name=f"{step.name}: {stage.name}") for stage in later]
    fits = all(stage.need.fits(on) for stage in stages)
    if as_json:
        say_json(_as_json(stages, on, devices, fits))
    say(
        f"on {on.name}: {_gb(on.memory_bytes)}, {on.flops16 / 1e12:.3g} TFLOP/s in 16 bits, "
        f"{on.flops32 / 1e12:.3g} in float32 ({on.source})"
    )
    for stage in stages:
        for line in _lines(stage, on):
            say(line)
    for assumption in ASSUMPTIONS:
        say(f"note: {assumption}")
    total = sum(stage.need.seconds for stage in stages)
    least = ", ".join(stage.name for stage in stages if not stage.need.fits(on))
    say(f"all stages together: {_duration(total)}; " + ("every one fits" if fits else f"does NOT fit: {least}"))


def chosen_device(gpu: str | None, memory_gb: float | None, tflops: float | None) -> Callable[[str], Device]:
    """The device of the command line; without such options the one that is here."""
    if gpu is not None and (memory_gb is not None or tflops is not None):
        raise UserError("--gpu and --gpu-memory or --tflops were given", "name the GPU, or describe it")
    if (memory_gb is None) != (tflops is None):
        raise UserError("--gpu-memory and --tflops belong together", "give both, or name a GPU with --gpu")
    if gpu is not None:
        found = named_gpu(gpu)
        return lambda kind: found
    if memory_gb is not None and tflops is not None:
        described = described_gpu(memory_gb, tflops)
        return lambda kind: described
    return device_here


def _lines(stage: Stage, on: Device) -> Iterator[str]:
    need = stage.need
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in need.parts.items())
    verdict = "fits" if need.fits(on) else f"does NOT fit in {_gb(on.memory_bytes)}"
    yield f"{stage.name}: {_gb(need.total)}, {verdict}; {_duration(need.seconds)} ({parts})"
    if not need.fits(on):
        for text, other in stage.changes.items():
            yield f"  {text}: {_gb(other.total)}{', fits' if other.fits(on) else ''}; {_duration(other.seconds)}"
        if not any(other.fits(on) for other in stage.changes.values()):
            yield "  none of these is enough alone: set several, add --set of each here, or take a larger GPU"


def _as_json(stages: list[Stage], on: Device, devices: int, fits: bool) -> dict[str, Any]:
    def figures(need: Need) -> dict[str, Any]:
        return {"bytes": round(need.total), "seconds": need.seconds, "fits": need.fits(on)}

    return {
        "device": asdict(on),
        "devices_per_student": devices,
        "fits": fits,
        "stages": [
            {
                "stage": stage.name,
                **figures(stage.need),
                "parts": {name: round(size) for name, size in stage.need.parts.items()},
                "changes": {text: figures(other) for text, other in stage.changes.items()},
            }
            for stage in stages
        ],
        "assumptions": list(ASSUMPTIONS),
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


def _duration(seconds: float) -> str:
    """Rounded: no more is known."""
    if seconds < 1:
        return "under a second"
    for unit, limit in (("s", 120), ("min", 120 * 60)):
        if seconds < limit:
            return f"about {seconds / (1 if unit == 's' else 60):.0f} {unit}"
    return f"about {seconds / 3600:,.1f} h"
