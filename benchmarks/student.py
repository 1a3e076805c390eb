"""What the student's training loop costs: its output head beside the whole one, a whole step, waiting for the store.

`make bench-student` prints the tables; `--json` prints one object; `--quick` takes tiny sizes and says nothing of value. All
ratios are of two things measured in turns in one run on one core.

Here is the output head; the rest, with its definitions, is in student_loop.py.

Data: 2,048 supervised rows of width 2,048, a vocabulary of 128,256, k = 64 ids of each row that follow Zipf's law as those
of a tokenizer do. The whole head is a matrix product to [rows, vocabulary] in the weights' dtype and a gather at the ids,
as DistillKit and others have it; the gathered head is that of stages/student/gather.py. Both: forward, the same Huber loss on
float32 logits at the ids, backward to the hidden states and, where the head is trained, to its weights.

Definitions, each for bf16 and fp32 weights and hidden states, `trained` and `frozen` heads
* `head.speedup.*`: seconds of the whole head over those of the gathered one; the least of each. The whole head is bound by
  arithmetic, the gathered one by memory, so the ratio says as much of the processor: matrix units for bf16 (AMX) make the
  whole head several times faster, and the ratio as much smaller. The table gives the whole head's rate beside that of a
  product of two 2,048 x 2,048 matrices, which is about what the core can do.
* `head.memory_ratio.*`: peak memory of the gathered head over that of the whole one, each beyond hidden states and weights,
  gradients included, in a process of its own (the kernel's VmHWM, reset, less VmRSS before).
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench import machine, on_one_core, parser, reset_peak, rounds, show, status_mb
from store import make_rows
from torch.nn.functional import linear

from duet.stages.student.gather import Parts, gathered_logits, logsumexp
from duet.stages.student.losses import TopK, huber_raw

BOUNDS = {
    "head.speedup.bf16.trained": (">=", 8),
    "head.speedup.bf16.frozen": (">=", 12),
    "head.speedup.fp32.trained": (">=", 9),
    "head.speedup.fp32.frozen": (">=", 20),
    "head.memory_ratio.bf16.trained": ("<=", 0.34),
    "head.memory_ratio.bf16.frozen": ("<=", 0.1),
    "student.tokens_per_s_vs_trainer": (">=", 1.0),
    "student.peak_memory_vs_trainer": ("<=", 1.0),
    "student.stall_share": ("<=", 0.02),
    "student.step_time_1e6_vs_1e3_rows": ("<=", 1.05),
}
K = 64
# rows, width, vocabulary
FULL_SIZE, QUICK_SIZE, WARMUP_SIZE = (2048, 2048, 128_256), (256, 64, 32_768), (16, 64, 1024)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = ("bf16.trained", "bf16.frozen", "fp32.trained", "fp32.frozen")


def head_inputs(case: str, size: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [N, D], weight [V, D], ids [N, K]), the first two with gradients as the case says."""
    num_rows, width, vocab_size = size
    dtype, _, training = case.partition(".")
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_rows, width, dtype=DTYPES[dtype])
    weight_VD = torch.randn(vocab_size, width, dtype=DTYPES[dtype]).mul_(width**-0.5)
    ids_NK = torch.from_numpy(make_rows(num_rows, 16, vocab_size).topk_ids_NK).long()
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(training == "trained"), ids_NK


def whole_head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> None:
    _huber(linear(hidden_ND, weight_VD).gather(1, ids_NK).float()).backward()


def gathered_head(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, ids_NK: torch.Tensor) -> None:
    _huber(gathered_logits([(hidden_ND, weight_VD)], ids_NK)).backward()


def whole_logsumexp(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, _: torch.Tensor) -> None:
    linear(hidden_ND, weight_VD).float().logsumexp(-1).sum().backward()


def blocked_logsumexp(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, _: torch.Tensor) -> None:
    parts: Parts = [(hidden_ND, weight_VD)]
    logsumexp(parts, lambda logits: logits).sum().backward()


def _huber(logits_NK: torch.Tensor) -> torch.Tensor:
    return huber_raw(TopK(logits_NK), TopK(torch.zeros_like(logits_NK)), 1.0).sum()


HEADS: dict[str, Callable[..., None]] = {"whole": whole_head, "gathered": gathered_head}
LOGSUMEXPS: dict[str, Callable[..., None]] = {"whole": whole_logsumexp, "blocked": blocked_logsumexp}
CHILDREN = {f"head.{name}": work for name, work in HEADS.items()}
CHILDREN |= {f"logsumexp.{name}": work for name, work in LOGSUMEXPS.items()}


def heads(quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The gathered head against the whole one."""
    claims, table = {}, []
    for case in CASES:
        line = _compared("head", HEADS, case, quick)
        claims[f"head.speedup.{case}"] = line["whole, s"] / line["gathered, s"]
        if f"head.memory_ratio.{case}" in BOUNDS:
            claims[f"head.memory_ratio.{case}"] = line["gathered, MB"] / line["whole, MB"]
        products = 3 if case.endswith("trained") else 2  # logits, dH and, of a trained head, dW
        line["whole, GFLOP/s"] = products * 2 * math.prod(size_of(quick)) / line["whole, s"] / 1e9
        line["square product, GFLOP/s"] = product_rate(DTYPES[case.partition(".")[0]])
        table.append(line)
    return claims, table


def logsumexps(quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The log-sum-exp over the vocabulary in blocks, against one over [N, V]; no claims."""
    cases = ("bf16.trained",) if quick else ("bf16.trained", "bf16.frozen")
    return {}, [_compared("logsumexp", LOGSUMEXPS, case, quick) for case in cases]


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two square matrices."""
    side = 2048
    left, right = torch.randn(2, side, side).to(dtype)
    return 2 * side**3 / rounds({"product": lambda: left @ right}, 3)["product"] / 1e9


def size_of(quick: bool) -> tuple[int, int, int]:
    return QUICK_SIZE if quick else FULL_SIZE


def _compared(what: str, works: dict[str, Callable[..., None]], case: str, quick: bool) -> dict[str, Any]:
    """A line of a table: least seconds of each, in turns, and peak MB of each, each in a process of its own."""
    line: dict[str, Any] = {"case": case}
    if not quick or f"{what}.memory_ratio.{case}" in BOUNDS:  # a process takes seconds to start
        line |= {f"{name}, MB": peak_mb(f"{what}.{name}", case, quick) for name in works}
    inputs = head_inputs(case, size_of(quick))

    def one(work: Callable[..., None]) -> Callable[[], None]:
        def run() -> None:
            inputs[0].grad = inputs[1].grad = None
            work(*inputs)

        return run

    times = rounds({name: one(work) for name, work in works.items()}, 1 if quick else 2)
    return line | {f"{name}, s": time for name, time in times.items()}


def peak_mb(work: str, case: str, quick: bool) -> float:
    """What the work allocates at its peak, in MB, in a process of its own."""
    command = [sys.executable, __file__, "--child", work, "--case", case, *(["--quick"] if quick else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(work: Callable[..., None], case: str, quick: bool) -> None:
    """Do the work and print what it allocated. It is done on tiny inputs first: libraries and kernels are then loaded."""
    work(*head_inputs(case, WARMUP_SIZE))
    inputs = head_inputs(case, size_of(quick))
    gc.collect()
    reset_peak()
    before = status_mb("VmRSS")
    work(*inputs)
    print(status_mb("VmHWM") - before)


SECTIONS: dict[str, Callable[[bool], tuple[dict[str, float], list[dict[str, Any]]]]] = {
    "output head, forward and backward": heads,
    "log-sum-exp over the vocabulary, forward and backward": logsumexps,
}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    command.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = command.parse_args()
    on_one_core()
    torch.set_num_threads(1)
    if arguments.child:
        child(CHILDREN[arguments.child], arguments.case, arguments.quick)
        return
    import student_loop  # which imports much that a child does not need

    claims: dict[str, float] = {}
    details: dict[str, Any] = {}
    for title, measure in (SECTIONS | student_loop.SECTIONS).items():
        found, details[title] = measure(arguments.quick)
        claims |= found
    show({"machine": machine("torch", "transformers"), "claims": claims, "details": details}, BOUNDS, arguments.json)


if __name__ == "__main__":
    main()
