"""Scores the same prompts by vLLM with each of several models: `vllm_scores.py FOLDER MODEL...`.

Reads `FOLDER/asked.json`, writes what the engine returned for each model, one list per number of positions, into
`FOLDER/scored.pickle`. One process for all models: what takes long is to import vLLM.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when it is imported

from vllm import ModelRegistry

from duet.stages.engines.interface import EngineSpec
from duet.stages.engines.vllm_engine import VllmEngine
from duet.stages.models.directory import load_config


def import_class(architecture: str) -> None:
    """What vLLM wants to know of a class it has a new process import, some 10 s each, where it has not yet done so."""
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def main(folder: Path, names: list[str]) -> None:
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    scored = {}
    for name in names:
        print(name, flush=True)  # the last one is the one that failed
        import_class(load_config(folder / name).architectures[0])
        engine = VllmEngine(EngineSpec(folder / name, "float32", asked["num_ids"], asked["context"], (), "cpu"))
        scored[name] = [engine.score(asked["prompts"], asked["top_k"], count) for count in asked["positions"]]
        engine.close()
    (folder / "scored.pickle").write_bytes(pickle.dumps(scored))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
