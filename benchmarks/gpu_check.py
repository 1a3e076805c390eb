"""What only a GPU can show, step by step: each in a process of its own, with a time limit, its result a JSON file at once.

`sh scripts/gpu_check.sh` starts it. The steps themselves are in gpu_steps.py, in order of worth; together their limits are
nine minutes, and a step that comes late gets what is left of them. `--tiny --device cpu` runs every step anywhere, with sizes
that say nothing and limits ten times as long.

A file `STEP.json` holds
* `state`: `done`, `skipped` (with `why`), `failed` (with the last lines of the error as `why`) or `out of time`;
* `seconds` that the step took, from the start of its process, and its `limit_s`;
* `machine`: device, versions; and `figures`, whose names end in their unit: `_s`, `_gib` (2^30 bytes) or `_mb` (10^6).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMITS_S = {
    "tests": 60,
    "head": 70,
    "loss": 60,
    "train_full": 130,
    "train_lora": 80,
    "batches": 20,
    "lab": 120,
}  # fmt: skip
ALL_S = 540
NEEDS_GPU = {"tests": "tests marked gpu need a GPU", "batches": "pinned memory needs a GPU"}


def run_step(name: str, options: list[str], work: Path, limit_s: float) -> dict[str, Any]:
    """One step in a process group of its own, which is ended with it; what its file shall hold."""
    command = [sys.executable, __file__, "--child", name, "--work", str(work), *options]
    started = time.monotonic()
    result: dict[str, Any] = {"step": name, "state": "failed", "limit_s": round(limit_s, 1)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=_environment()
        )
        try:
            out, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return result | {"state": "out of time", "seconds": round(time.monotonic() - started, 1)}
        finally:  # also where this process is ended itself
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result["seconds"] = round(time.monotonic() - started, 1)
        if process.returncode == 0:
            return result | json.loads(out.splitlines()[-1])
        errors.seek(0)
        return result | {"why": errors.read().splitlines()[-8:]}


def _environment() -> dict[str, str]:
    """Nothing is asked of a network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that show only that the steps run")
    parser.add_argument("--steps", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S), help="these only")
    parser.add_argument("--child", choices=list(LIMITS_S), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        import gpu_steps  # which imports torch

        print(json.dumps(gpu_steps.child(arguments.child, arguments.device, arguments.tiny, arguments.work)))
        return
    if arguments.out is None:
        parser.error("--out FOLDER is missing")
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    patience = 10 if arguments.tiny else 1  # a machine that checks other things too is slow
    end = time.monotonic() + patience * ALL_S
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        for name in arguments.steps:
            limit_s = min(patience * LIMITS_S[name], max(1.0, end - time.monotonic()))
            if arguments.device == "cpu" and name in NEEDS_GPU:
                result = {"step": name, "state": "skipped", "why": NEEDS_GPU[name]}
            else:
                result = run_step(name, options, Path(work), limit_s)
            text = json.dumps(result, indent=1)
            (arguments.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            failed += result["state"] not in ("done", "skipped")
            print(text, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
