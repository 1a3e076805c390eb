"""Which engine scores a teacher: the one that is named, or vLLM where it can run and transformers where it cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from duet.cache.errors import UserError
from duet.stages.engines.interface import Engine, EngineSpec


def engine_version(engine: str) -> str:
    """Engine name and installed version, without importing it."""
    for package in (engine, f"{engine}-cpu"):
        try:
            return f"{engine} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{engine} not installed"


def engine_order(engine: str) -> list[str]:
    """Engines to be tried for a setting, best first."""
    if engine != "auto":
        return [engine]
    return ["transformers"] if vllm_fault() else ["vllm", "transformers"]


def vllm_fault() -> str | None:
    """Why vLLM cannot be used here, or None. Looks for the package only; the engine's start shows the rest."""
    return None if importlib.util.find_spec("vllm") else "the package vllm is not installed"


def open_engine(spec: EngineSpec, engine: str) -> tuple[Engine, str]:
    """The engine asked for and why it was taken; "auto" is vLLM where it is installed and starts, else transformers."""
    if engine == "transformers":
        return _open_transformers(spec), "as configured"
    fault = vllm_fault()
    if fault is None:
        from duet.stages.engines.vllm_engine import VllmEngine, VllmUnusable

        try:
            return VllmEngine(spec), "as configured" if engine == "vllm" else "vLLM is installed and works here"
        except VllmUnusable as error:
            fault = str(error)
    if engine == "vllm":
        raise UserError(
            f"the engine vllm cannot be used: {fault}", "run `make setup`, or set the engine to transformers"
        )
    return _open_transformers(spec), fault


def _open_transformers(spec: EngineSpec) -> Engine:
    from duet.stages.engines.transformers_engine import TransformersEngine

    return TransformersEngine(spec)
