"""What one stream of questions and a refill of batches could save of stage three, and when vLLM pays on a CPU.

`--json` prints one object; `--quick` takes little data and says nothing of value. Seconds are the processor's, on one core, so
that a busy machine does not change them; those of vLLM's start and of its rates are the wall's.

Definitions. A batch's price is its prompts with their padding, a token for each row in each further step, and PASS_TOKENS for
each pass, as `stages/engines/batches.py` has it. An engine is asked in several calls: the sets as they are, and each attack.
* `evaluate.stream_saves`: share of stage three's seconds that decoding would lose if all calls of one engine were one, by the
  prices of the batches that the engine then makes, with the answers' own lengths.
* `evaluate.refill_saves`: what it would lose beyond that if no prompt were padded and every pass full of rows that go on, save
  the longest answer's: more than any engine reaches, and without what refilling costs.
* `evaluate.loads_save`: share of the seconds of loading weights that were loaded before.
* `evaluate.renders_save`: share of asking for prompts beyond the seconds in which each is made for the first time.
* `vllm`: seconds until the first answer and answers per second of both engines on prompts of benchmarks/evaluate.py, and the
  number of answers of one model from which vLLM is the faster one.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from bench import machine, on_one_core, parser, seconds, show
from evaluate import Case, chat_case, plain_case
from teacher_sides import ROOT, TOFU, TOFU_MODEL

from duet.pipeline.commands.evaluate import evaluate
from duet.pipeline.config.load import load_config
from duet.stages.engines.batches import PASS_TOKENS
from duet.stages.engines.transformers_engine import TransformersEngine
from duet.stages.models import loading
from duet.stages.questions.prompts import Renderer

BOUNDS = {
    **{f"evaluate.{name}": ("<=", 0.1) for name in ("stream_saves", "loads_save", "renders_save")},
    "evaluate.refill_saves": ("<=", 0.35),  # to refill costs more: docs/performance.md
}
CASES = {
    "lab": ("configs/lab.yaml", ("teacher.model=lab/models/base",)),
    "tofu": (
        "configs/tofu.yaml",
        (
            f"data_dir={TOFU}",
            f"teacher.model={TOFU_MODEL}",
            "evaluate.attacks=[reverse, prefill]",
            "evaluate.likelihood=false",
            "evaluate.tofu=null",
        ),
    ),
}


@dataclass(frozen=True)
class Asked:
    """What one call had an engine answer: prompts, and the forward passes that each answer took."""

    prompts: list[list[int]]
    steps: list[int]


class Watched:
    """Counts what engines decode, and the seconds of decoding, of loading and of rendering, while it is entered."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.loaded: Counter[Path] = Counter()
        self.calls: dict[TransformersEngine, list[Asked]] = {}
        self.decoding: Counter[TransformersEngine] = Counter()  # seconds
        self.saved: Counter[str] = Counter()  # seconds
        self._kept: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, made: Callable[[Any], Any]) -> None:
        self._kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, made(getattr(owner, name)))

    def timed(self, name: str, then: Callable[..., None]) -> Callable[[Any], Any]:
        def made(function: Any) -> Any:
            @functools.wraps(function)
            def called(*given: Any, **named: Any) -> Any:
                started = time.process_time()
                result = function(*given, **named)
                took = time.process_time() - started
                self.count[name] += 1
                self.seconds[name] += took
                then(took, *given)
                return result

            return called

        return made

    def loads(self, took: float, folder: Path, *_: Any) -> None:
        folder = Path(folder).resolve()
        self.loaded[folder] += 1
        self.saved["loads"] += took if self.loaded[folder] > 1 else 0

    def decodes(self, took: float, engine: TransformersEngine, *_: Any) -> None:
        self.decoding[engine] += took

    def answers(self, function: Any) -> Any:
        def called(engine: TransformersEngine, prompts: list[list[int]], most: int) -> Any:
            asked = Asked(list(prompts), [0] * len(prompts))
            self.calls.setdefault(engine, []).append(asked)
            for number, ids in function(engine, prompts, most):
                asked.steps[number] = min(len(ids) + 1, most)
                yield number, ids

        return called

    def closes(self, function: Any) -> Any:
        def called(engine: TransformersEngine) -> None:
            calls = self.calls.pop(engine, [])
            if calls:
                one = Asked([p for of in calls for p in of.prompts], [n for of in calls for n in of.steps])
                now = sum(price(engine, of) for of in calls)
                self.count.update({"calls": len(calls), "answers": len(one.prompts), "engines": 1})
                self.saved["stream"] += self.decoding[engine] * (1 - price(engine, one) / now)
                self.saved["refill"] += self.decoding[engine] * (price(engine, one) - least(engine, one)) / now
            function(engine)

        return called

    def __enter__(self) -> Watched:
        def nothing(*_: Any) -> None:
            """Only its seconds count."""

        self.replace(TransformersEngine, "answers", self.answers)
        self.replace(TransformersEngine, "close", self.closes)
        self.replace(TransformersEngine, "_decode", self.timed("decode", self.decodes))
        self.replace(Renderer, "prompt", self.timed("prompt", nothing))
        self.replace(Renderer, "_render", self.timed("render", nothing))
        load = loading.load_model
        for module in [module for name, module in sys.modules.items() if name.startswith("duet.")]:
            if getattr(module, "load_model", None) is load:
                self.replace(module, "load_model", self.timed("load", self.loads))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, function in reversed(self._kept):
            setattr(owner, name, function)


def price(engine: TransformersEngine, asked: Asked) -> float:
    """The price of the batches that the engine makes of these prompts, in tokens."""
    total = 0
    for batch in engine._batches(asked.prompts, max(asked.steps)):
        own = max(len(prompt) for prompt in batch.prompts) - batch.begins_with
        steps = [asked.steps[row] for row in batch.rows]
        total += own * len(steps) + sum(steps) - len(steps) + PASS_TOKENS * max(steps)
    return total


def least(engine: TransformersEngine, asked: Asked) -> float:
    """The same without padding, in passes that are full but for those of the longest answer."""
    own = sum(
        len(prompt) - batch.begins_with
        for batch in engine._batches(asked.prompts, max(asked.steps))
        for prompt in batch.prompts
    )
    passes = max(*asked.steps, sum(asked.steps) / engine._spec.batch_size)
    return own + sum(asked.steps) - len(asked.steps) + PASS_TOKENS * passes


def stage_three(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """One evaluation of base, teacher and control, watched."""
    path, settings = CASES[name]
    small = ("evaluate.max_new_tokens=4", "evaluate.attacks=[reverse]") if quick else ()
    own = (*settings, f"runs_dir={folder}", "evaluate.engine=transformers", *small)
    config = load_config(str(ROOT / path), own)

    def whole() -> None:
        with redirect_stdout(StringIO()):
            evaluate(config, only_models=True)

    import duet.stages.attacks.logit_lens
    import duet.stages.attacks.quantize
    import duet.stages.attacks.relearn
    import duet.stages.exam.reading  # noqa: F401 - so that what they load is counted

    with Watched() as found:
        total = seconds(whole, time.process_time)
    return {
        "evaluation": name,
        "seconds": total,
        "decoding, s": found.seconds["decode"],
        "answers": found.count["answers"],
        "engines": found.count["engines"],
        "calls": found.count["calls"],
        "one stream saves, s": found.saved["stream"],
        "full passes save beyond, s": found.saved["refill"],
        "weights loaded": found.count["load"],
        "again, s": found.saved["loads"],
        "prompts asked for": found.count["prompt"],
        "of them made": found.count["render"],
        "beyond that, s": max(0.0, found.seconds["prompt"] - found.seconds["render"]),
    }


def engines(case: Case, name: str) -> list[dict[str, Any]]:
    """How both engines start, and how fast they answer after that."""
    from duet.stages.engines.vllm_engine import VllmEngine

    table = []
    for engine in (TransformersEngine, VllmEngine):
        started = time.perf_counter()
        opened = engine(case.spec)
        opened.generate(case.prompts[:1], 1)
        ready = time.perf_counter() - started
        took = seconds(lambda opened=opened: opened.generate(case.prompts, case.new_tokens))
        opened.close()
        rate = len(case.prompts) / took
        table.append(
            {"prompts": name, "engine": opened.name, "start, s": ready, "answers per s": rate, "pays from": ""}
        )
    ours, theirs = table
    slower = 1 / ours["answers per s"] - 1 / theirs["answers per s"]
    theirs["pays from"] = round((theirs["start, s"] - ours["start, s"]) / slower) if slower > 0 else "never"
    return table


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--part", choices=(*CASES, "vllm"), action="append", help="only this one; repeatable")
    options = command.parse_args()
    parts = options.part or (*CASES, "vllm")
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "vllm" in parts:
            few = (4, 2) if options.quick else (256, 40)
            cases = {"plain, 2.8M": plain_case(*few), "chat, 135M": chat_case(Path(folder) / "m", few[0] // 4, few[1])}
            details["vllm"] = [row for name, case in cases.items() for row in engines(case, name)]
        on_one_core()
        details["stage three"] = [
            stage_three(name, Path(folder) / name, options.quick) for name in CASES if name in parts
        ]
    rows = details["stage three"]
    keys = {
        "stream_saves": "one stream saves, s",
        "refill_saves": "full passes save beyond, s",
        "loads_save": "again, s",
        "renders_save": "beyond that, s",
    }
    claims = {f"evaluate.{name}": max(row[key] / row["seconds"] for row in rows) for name, key in keys.items() if rows}
    show({"machine": machine("torch", "transformers"), "claims": claims, "details": details}, BOUNDS, options.json)


if __name__ == "__main__":
    main()
