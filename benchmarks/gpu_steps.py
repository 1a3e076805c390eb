"""The steps of gpu_check.py, each a function of a Setting that returns figures, or raises Skipped with the reason.

* `tests`: the tests marked `gpu`.
* `head`: the student's output head, forward and backward on 2,048 positions as in student.py: whole, whole compiled,
  gathered; beside them Liger's fused linear cross-entropy where it is installed, which is another loss: one id a position.
  Seconds are the least of several turns, after a first that is not counted.
* `loss`: the loss alone at 32,768 positions, k = 100, 201,088 ids, width 2,880, bf16, head trained: `peak_gib` is the most
  memory allocated, hidden states, weights and both gradients included.
* `train_full`, `train_lora`: a random model of Llama-3.2-3B's shape, 200 queries of 48 to 96 tokens, k = 100, one position
  each, ten epochs; full with 8-bit AdamW (plain AdamW where bitsandbytes is missing, and it says so). Beside them what
  `duet estimate` says of such a training.
* `batches`: seconds to move a pass to the device, from pinned memory and from ordinary memory.
* `lab`: `duet run` on the lab, all three stages.

Shapes: N supervised positions, K kept ids, V vocabulary, D width.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import machine
from store import make_rows
from torch.nn.functional import linear

from duet.stages.student.gather import Parts, gathered_logits, logsumexp
from duet.stages.student.losses import TopK, forward_kl_tail, huber_raw

ROOT = Path(__file__).parent.parent
GIB = 2**30


class Skipped(Exception):
    """A step that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    tiny: bool
    work: Path  # a folder that the steps share

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full


def child(name: str, device: str, tiny: bool, work: Path) -> dict[str, Any]:
    """A step's state, figures and machine."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"state": "skipped", "why": "torch sees no GPU here", "machine": machine("torch")}
    described = machine("torch", "transformers") | {"device": device}
    if device == "cuda":
        described |= {"device": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
    try:
        figures = STEPS[name](Setting(torch.device(device), tiny, work))
    except Skipped as why:
        return {"state": "skipped", "why": str(why), "machine": described}
    return {"state": "done", "machine": described, "figures": figures}


def gpu_tests(setting: Setting) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed: run scripts/gpu_wheels.sh first")
    marked = [
        str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *marked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:] + done.stderr[-500:])
    return {"pytest": done.stdout.strip().splitlines()[-1]}


def measured(setting: Setting, work: Callable[[], Any], turns: int = 3) -> dict[str, Any]:
    """`seconds`, the least of some turns, and on a GPU `peak_gib` with all that is there; or `why` it could not be done.

    The reason is kept instead of raised: one way that does not work here, or does not fit, shall not hide the others.
    """
    gpu = setting.device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        times = []
        for _ in range(1 + turns):
            started = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    except Exception as error:
        return {"why": f"{type(error).__name__}: {str(error)[:300]}"}
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / GIB} if gpu else {}
    return {"first_s": times[0], "seconds": min(times[1:]), **memory}


def head_tensors(setting: Setting, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [N, D], weight [V, D], both bf16 with gradients, ids [N, K]) of shape (N, D, V, K), drawn on the device."""
    num_rows, width, vocab_size, top_k = shape
    torch.manual_seed(0)
    like = {"device": setting.device, "dtype": torch.bfloat16}
    hidden_ND = torch.randn(num_rows, width, **like)
    weight_VD = torch.randn(vocab_size, width, **like).mul_(width**-0.5)
    ids = make_rows(min(num_rows, 4096), 16, vocab_size, top_k).topk_ids_NK
    ids_NK = torch.from_numpy(ids.astype("int64")).repeat(-(-num_rows // len(ids)), 1)[:num_rows]
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), ids_NK.to(setting.device)


def fresh(work: Callable[..., None], *tensors: torch.Tensor) -> Callable[[], None]:
    """The work on these, without gradients of an earlier turn."""

    def run() -> None:
        for tensor in tensors:
            tensor.grad = None
        work(*tensors)

    return run


def huber(logits_NK: torch.Tensor) -> torch.Tensor:
    return huber_raw(TopK(logits_NK), TopK(torch.zeros_like(logits_NK)), 1.0).sum()


def whole_logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    return linear(hidden_ND, weight_VD).gather(1, ids_NK).float()


def whole_head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> None:
    huber(whole_logits(hidden_ND, weight_VD, ids_NK)).backward()


def gathered_head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> None:
    huber(gathered_logits([(hidden_ND, weight_VD)], ids_NK)).backward()


def head(setting: Setting) -> dict[str, Any]:
    tensors = head_tensors(setting, setting.size((2048, 2048, 128_256, 64), (32, 16, 512, 8)))

    def liger(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore

        LigerFusedLinearCrossEntropyLoss()(weight_VD, hidden_ND, ids_NK[:, 0]).backward()

    missing = {"liger_cross_entropy": {"why": "not installed"}, "whole_compiled": {"why": "takes a minute on a CPU"}}
    ways: dict[str, Callable[..., None]] = {"whole": whole_head, "gathered": gathered_head}
    if setting.device.type == "cuda":
        compiled = torch.compile(lambda *given: huber(whole_logits(*given)))
        ways["whole_compiled"] = lambda *given: compiled(*given).backward()
    if importlib.util.find_spec("liger_kernel"):
        ways["liger_cross_entropy"] = liger
    return missing | {name: measured(setting, fresh(work, *tensors)) for name, work in ways.items()}


def loss(setting: Setting) -> dict[str, Any]:
    tensors = head_tensors(setting, setting.size((32_768, 2880, 201_088, 100), (64, 16, 1024, 10)))
    teacher = TopK(torch.zeros(tensors[2].shape, device=setting.device), torch.full(tensors[2].shape[:1], 20.0))
    teacher = TopK(teacher.logits_NK, teacher.logsumexp_N.to(setting.device))  # pyright: ignore

    def kl_whole(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> None:
        logits_NV = linear(hidden_ND, weight_VD).float()
        student = TopK(logits_NV.gather(1, ids_NK), logits_NV.logsumexp(-1))
        forward_kl_tail(student, teacher).sum().backward()

    def kl_blocked(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> None:
        parts: Parts = [(hidden_ND, weight_VD)]
        logits_NK = gathered_logits(parts, ids_NK)
        student = TopK(logits_NK, logsumexp(parts, lambda logits: logits, ids_NK, logits_NK))
        forward_kl_tail(student, teacher).sum().backward()

    ways = {"raw_logits_gathered": gathered_head, "kl_blocked": kl_blocked, "kl_whole": kl_whole}
    return {name: measured(setting, fresh(work, *tensors), turns=1) for name, work in ways.items()}


def train_full(setting: Setting) -> dict[str, Any]:
    from gpu_training import training

    eight_bits = setting.device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None
    return training(setting, "full", optimizer="adamw8bit" if eight_bits else "adamw")


def train_lora(setting: Setting) -> dict[str, Any]:
    from gpu_training import training

    return training(setting, "lora", lora={"rank": 16})


def batches(setting: Setting) -> dict[str, Any]:
    from gpu_training import passes, store_of

    found = passes(store_of(setting), 16)
    pinned = [one.pin_memory() for one in found]
    return {
        name: measured(setting, lambda some=some: [one.to(setting.device) for one in some], turns=10)
        for name, some in (("ordinary", found), ("pinned", pinned))
    }


def lab(setting: Setting) -> dict[str, Any]:
    """Seconds of all stages and the verdicts; a tiny one only teaches and trains, a student for an epoch."""
    runs = setting.work / "runs"
    options = ["--config", "configs/lab.yaml", "--set", f"runs_dir={runs}", "--set", f"device={setting.device.type}"]
    options += ["--set", "teacher.engine=transformers"]
    few = ["--set", "train.epochs=1", "--set", "students=[{name: base}]"]
    commands = setting.size([["run", *options]], [["teacher-logits", *options, *few], ["distill", *options, *few]])
    started = time.perf_counter()
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", "duet", *command], cwd=ROOT, env=dict(os.environ), check=True, stdout=sys.stderr
        )
    figures: dict[str, Any] = {"seconds": time.perf_counter() - started}
    for path in sorted(runs.rglob("training.json")):
        training = json.loads(path.read_text(encoding="utf-8"))
        names = ("steps", "train_s", "stall_share", "peak_memory_gb", "head")
        figures[f"student_{path.parent.name}"] = {name: training[name] for name in names}
    for path in itertools.islice(runs.rglob("results.json"), 1):
        outcomes = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
        figures["verdicts"] = {name: outcome["verdict"] for name, outcome in outcomes.items()}
    return figures


STEPS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "tests": gpu_tests,
    "head": head,
    "loss": loss,
    "train_full": train_full,
    "train_lora": train_lora,
    "batches": batches,
    "lab": lab,
}
