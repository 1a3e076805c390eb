"""How fast stage three's answers come, beside `transformers.generate` and others, and what the rest of stage three costs.

`make bench-evaluate` prints the tables; `--json` prints one object; `--quick` takes little data and says nothing of value. All
ratios are of things measured in turns in one run on the cores of this process; each time is the least of its rounds.

Models and prompts: tofu-lab (2.8M parameters, ../shared/models) on TOFU's questions in plain form, 40 new tokens; a random
Llama of SmolLM2-135M's shape on the same number of prompts that begin with a chat's head of 37 tokens and end in 6 to 40 of
their own, 16 new tokens.

Definitions
* `evaluate.rate_vs_generate.plain`, `.chat`: answers per second of the transformers engine over those of
  `transformers.generate`, greedy, with the same ids to stop at, on left-padded batches of prompts that are sorted by length, at
  the fastest of its batch sizes in the table.
* `evaluate.rate_vs_before.plain`, `.chat`: the same over this engine when it grouped prompts by their first 16 tokens and
  decoded at most 64 together.
* `evaluate.overhead`: seconds of all of stage three on TOFU (two models, the sets of configs/tofu.yaml in generated answers,
  prompt attacks, scores, intervals, report) over those of the engine alone that makes the same answers, model loaded.
* In the tables only: transformers' `generate_batch` (continuous batching), vLLM and lm-evaluation-harness on the same prompts,
  where they are installed, and the share of answers that are the same.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from before import Before
from bench import machine, parser, rounds, show
from teacher_sides import ROOT, TOFU, TOFU_MODEL
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from duet.stages.engines.interface import EngineSpec
from duet.stages.engines.transformers_engine import TransformersEngine
from duet.stages.models.tokenizers import load_tokenizer

SIZES = (64, 256)  # of generate's batches; 16 was measured to be slower on both forms
BOUNDS = {
    **{f"evaluate.rate_vs_generate.{form}": (">=", 0.9) for form in ("plain", "chat")},
    "evaluate.rate_vs_before.plain": (">=", 4.0),
    "evaluate.rate_vs_before.chat": (">=", 0.85),  # these shared their head, and so were decoded together, before
    "evaluate.overhead": ("<=", 1.3),
}
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and what it is asked."""

    spec: EngineSpec
    prompts: list[list[int]]
    new_tokens: int


def plain_case(count: int, new_tokens: int) -> Case:
    tokenizer = load_tokenizer(TOFU_MODEL)
    lines = (TOFU / "full.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    prompts = [
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in (f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines)
    ]
    context = max(map(len, prompts)) + new_tokens
    return Case(spec_of(TOFU_MODEL, len(tokenizer), tokenizer.eos_token_id, context), prompts, new_tokens)


def chat_case(folder: Path, count: int, new_tokens: int) -> Case:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(folder)
    rng = np.random.default_rng(0)
    head = rng.integers(3, 49_152, 37).tolist()
    prompts = [[*head, *rng.integers(3, 49_152, rng.integers(6, 41)).tolist()] for _ in range(count)]
    return Case(spec_of(folder, 49_152, 2, 128), prompts, new_tokens)


def spec_of(folder: Path, num_ids: int, end: int, context: int) -> EngineSpec:
    return EngineSpec(folder, "float32", num_ids, context, (end,), "cpu")


@torch.inference_mode()
def generated(model: Any, case: Case, size: int) -> list[list[int]]:
    """`transformers.generate` on batches of that size, the answers without the end."""
    order = sorted(range(len(case.prompts)), key=lambda row: len(case.prompts[row]))
    found: dict[int, list[int]] = {}
    [end] = case.spec.eos_ids
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = max(len(case.prompts[row]) for row in rows)
        ids = torch.tensor([[0] * (width - len(case.prompts[row])) + case.prompts[row] for row in rows])
        mask = torch.tensor([[int(at >= width - len(case.prompts[row])) for at in range(width)] for row in rows])
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=case.new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        for row, answer in zip(rows, out[:, width:].tolist(), strict=True):
            found[row] = answer[: answer.index(end)] if end in answer else answer
    return [found[row] for row in range(len(order))]


def sides(case: Case, with_others: bool) -> dict[str, Callable[[], list[list[int]]]]:
    """By name, what answers all prompts."""
    ours, before = TransformersEngine(case.spec), Before(replace(case.spec, batch_size=64))
    model = ours._model
    works: dict[str, Callable[[], list[list[int]]]] = {
        "this engine": lambda: ours.generate(case.prompts, case.new_tokens),
        "this engine, before": lambda: before.generate(case.prompts, case.new_tokens),
        **{f"generate, batches of {size}": lambda size=size: generated(model, case, size) for size in SIZES},
    }
    if with_others:
        works["generate_batch, 64 tokens a pass"] = refilled(case)
    if with_others and find_spec("lm_eval"):
        works["lm-evaluation-harness, batches of 64"] = harness(model, case)
    if with_others and find_spec("vllm"):
        from duet.stages.engines.vllm_engine import VllmEngine

        vllm = VllmEngine(case.spec)
        works["vLLM"] = lambda: vllm.generate(case.prompts, case.new_tokens)
    return works


def refilled(case: Case) -> Callable[[], list[list[int]]]:
    """transformers' continuous batching, the answers without the end: a waiting prompt takes the place of one that has ended.

    The keys and values have room for 100 prompts; with 128 to 512 tokens a pass it was measured to be slower. It changes the
    model's attention, so it has a model of its own.
    """
    model = AutoModelForCausalLM.from_pretrained(
        case.spec.model_dir, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    [end] = case.spec.eos_ids
    how = GenerationConfig(max_new_tokens=case.new_tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
    page = 32
    room = ContinuousBatchingConfig(
        page_size=page, num_blocks=100 * -(-case.spec.context // page), max_batch_tokens=64, use_cuda_graph=False
    )

    def work() -> list[list[int]]:
        found = model.generate_batch(case.prompts, how, continuous_batching_config=room, progress_bar=False)
        answers = [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[1]))]
        return [ids[: ids.index(end)] if end in ids else ids for ids in answers]

    return work


def harness(model: Any, case: Case) -> Callable[[], list[list[int]]]:
    """lm-evaluation-harness's `generate_until` on the same model; its prompts are texts, so only a tokenizer's own count."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(case.spec.model_dir)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64, max_length=case.spec.context, add_bos_token=False)
    end = tokenizer.eos_token
    how = {"until": [end], "max_gen_toks": case.new_tokens, "do_sample": False}
    asked = [
        Instance("generate_until", {}, (tokenizer.decode(ids), dict(how)), number)
        for number, ids in enumerate(case.prompts)
    ]

    def work() -> list[list[int]]:
        texts = lm.generate_until(asked, disable_tqdm=True)
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    return work


def rates(form: str, case: Case, with_others: bool, count: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    works, answers = sides(case, with_others), {}

    def kept(name: str) -> Callable[[], None]:
        return lambda: answers.__setitem__(name, works[name]())

    times = rounds({name: kept(name) for name in works}, count)
    ours = times["this engine"]
    best = min(seconds for name, seconds in times.items() if name.startswith("generate"))
    table = [
        {
            "side": name,
            "answers per s": len(case.prompts) / took,
            "seconds over ours": took / ours,
            "same answers, %": 100
            * np.mean([a == b for a, b in zip(answers[name], answers["this engine"], strict=True)]),
        }
        for name, took in times.items()
    ]
    claims = {
        f"evaluate.rate_vs_generate.{form}": best / ours,
        f"evaluate.rate_vs_before.{form}": times["this engine, before"] / ours,
    }
    return claims, table


def overhead(folder: Path, quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """All of stage three, then the engine alone on the prompts of both models."""
    from duet.pipeline.commands.evaluate import evaluate
    from duet.pipeline.config.load import load_config
    from duet.pipeline.run.exam import exam_of, subjects_of
    from duet.stages.evaluate.answers import session_of

    settings = ["evaluate.engine=transformers", "evaluate.likelihood=false", "evaluate.tofu=null"]
    settings += ["evaluate.attacks=[reverse, prefill]"]
    settings += [f"data_dir={TOFU}", f"teacher.model={TOFU_MODEL}"]
    small = ["evaluate.max_new_tokens=4", "data.retain.sample=8", "evaluate.sets.neighbours.sample=8"] if quick else []
    config = load_config(str(ROOT / "configs/tofu.yaml"), (*settings, *small, f"runs_dir={folder}"))
    exam, subjects = exam_of(config), subjects_of(config, ())
    session = session_of(subjects[0].model_dir, exam, subjects)
    prompts = [ids for s in subjects for task in session.tasks(s) for ids in session.prompts(s, task)]
    engine = TransformersEngine(session.spec())
    names = iter(range(99))

    def whole() -> None:
        with redirect_stdout(StringIO()):
            evaluate(config.model_copy(update={"name": f"run{next(names)}"}), only_models=True)

    works = {"stage three": whole, "engine alone": lambda: engine.generate(prompts, config.evaluate.max_new_tokens)}
    times = rounds(works, 1 if quick else 2)
    table = [{"work": name, "answers": len(prompts), "seconds": took} for name, took in times.items()]
    return {"evaluate.overhead": times["stage three"] / times["engine alone"]}, table


def plain(folder: Path, quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    return rates("plain", plain_case(24 if quick else 1500, 4 if quick else 40), not quick, 1 if quick else 3)


def chat(folder: Path, quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One round: a side takes minutes."""
    return rates("chat", chat_case(folder / "model", 4 if quick else 1500, 2 if quick else 16), False, 1)


PARTS = {"plain": plain, "chat": chat, "overhead": overhead}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--part", choices=PARTS, action="append", help="only this one; repeatable")
    options = command.parse_args()
    claims, details = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.part or PARTS:
            found, details[name] = PARTS[name](Path(folder), options.quick)
            claims |= found
    show({"machine": machine("torch", "transformers"), "claims": claims, "details": details}, BOUNDS, options.json)


if __name__ == "__main__":
    main()
