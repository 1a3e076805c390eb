"""What one stream of questions and a refill of batches could save of stage three at most, and when vLLM pays on a CPU.

`--json` prints one object; `--quick` takes little data and says nothing of value. Seconds are the processor's, on one core, so
that a busy machine does not change them; those of vLLM's start and of its rates are the wall's.

Definitions
* `evaluate.refill_saves`: share of stage three's seconds that decoding would lose if every batch were always full of rows that
  go on, over everything that one engine is asked: what is computed now (prompts with their padding, a row in each step, and
  PASS_TOKENS for each pass) against the prompts without padding, the rows that go on, and the fewest passes.
* `evaluate.loads_save`, `evaluate.renders_save`: the shares of loading weights a second time and more often, and of asking for
  prompts beyond those seconds in which each is made for the first time.
* In the table: how many rows of decoding steps had ended already, engines opened, weights loaded, prompts made.
* `vllm`: seconds until the first answer and answers per second of both engines on prompts of benchmarks/evaluate.py, and the
  number of answers of one model from which vLLM is the faster one.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
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

BOUNDS = {f"evaluate.{name}": ("<=", 0.1) for name in ("refill_saves", "loads_save", "renders_save")}
CASES = {
    "lab": ("configs/lab.yaml", ("teacher.model=lab/models/base",)),
    "tofu": (
        "configs/tofu.yaml",
        (f"data_dir={TOFU}", f"teacher.model={TOFU_MODEL}", "evaluate.attacks=[reverse, prefill]"),
    ),
}


class Watched:
    """Counts what the engine computes, and the seconds of decoding, of loading and of rendering, while it is entered."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.loaded: Counter[Path] = Counter()
        self.saved = 0.0  # seconds of decoding beyond the fewest that the same rows need
        self.again = 0.0  # seconds of loading weights that were loaded before
        self.first_time = 0.0  # seconds of making prompts that were not remembered
        self._inside = 0

    def timed(self, name: str, function: Any, note: Any = None) -> Any:
        @functools.wraps(function)
        def called(*given: Any, **named: Any) -> Any:
            self.count[name] += 1
            self._inside += 1
            started = time.process_time()
            try:
                return function(*given, **named)
            finally:
                self._inside -= 1
                if not self._inside:  # the seconds of one are not those of another within it
                    self.seconds[name] += time.process_time() - started
                if note:
                    note(time.process_time() - started, *given)

        return called

    def load(self, took: float, folder: Path, *_: Any) -> None:
        folder = Path(folder).resolve()
        self.loaded[folder] += 1
        self.again += took if self.loaded[folder] > 1 else 0

    def render(self, took: float, *_: Any) -> None:
        self.first_time += took

    def answers(self, function: Any) -> Any:
        """`TransformersEngine.answers`, whose batches are the stream of one engine and one call."""

        def called(engine: TransformersEngine, prompts: list[list[int]], most: int) -> Any:
            before, started = Counter(self.count), self.seconds["decode"]
            yield from function(engine, prompts, most)
            of = Counter(self.count)
            of.subtract(before)
            real = of["prompt tokens"] + of["row steps"] + PASS_TOKENS * of["passes"]
            fewest = (of["own tokens"] + of["live row steps"]) + PASS_TOKENS * (
                of["live row steps"] / engine._spec.batch_size + len(prompts) / engine._spec.batch_size
            )
            self.saved += (self.seconds["decode"] - started) * (1 - fewest / real)

        return called

    def begin(self, _: float, engine: Any, batch: Any) -> None:
        own = [len(prompt) - batch.begins_with for prompt in batch.prompts]
        self.count.update(
            {"passes": 1, "prompt tokens": max(own) * len(own), "own tokens": sum(own), "answers": len(own)}
        )

    def go_on(self, _: float, engine: Any, so_far: Any, ids_BT: Any) -> None:
        self.count.update({"passes": 1, "row steps": len(ids_BT)})

    def decode(self, function: Any) -> Any:
        def called(engine: Any, batch: Any, most: int, choose: Any, collect: Any) -> None:
            def counted(rows: Any, steps: Any, tokens_N: Any, logits_NV: Any) -> None:
                self.count["live row steps"] += len(rows) if steps[0] else 0
                collect(rows, steps, tokens_N, logits_NV)

            function(engine, batch, most, choose, counted)

        return called

    def __enter__(self) -> Watched:
        engine = TransformersEngine
        self._kept = {name: getattr(engine, name) for name in ("answers", "_decode", "_begin", "_go_on")}
        engine.answers = self.answers(engine.answers)
        engine._decode = self.timed("decode", self.decode(engine._decode))
        engine._begin = self.timed("begin", engine._begin, self.begin)
        engine._go_on = self.timed("go on", engine._go_on, self.go_on)
        Renderer.prompt = self.timed("prompt", Renderer.prompt)
        Renderer._render = self.timed("render", Renderer._render, self.render)
        load = loading.load_model
        for module in [module for name, module in sys.modules.items() if name.startswith("duet.")]:
            if getattr(module, "load_model", None) is load:
                module.load_model = self.timed("load", load, self.load)
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._kept.items():
            setattr(TransformersEngine, name, function)


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
    ended = found.count["row steps"] - found.count["live row steps"]
    return {
        "evaluation": name,
        "seconds": total,
        "decoding, s": found.seconds["decode"],
        "answers": found.count["answers"],
        "steps' rows ended, %": 100 * ended / max(found.count["row steps"], 1),
        "refill at most, s": found.saved,
        "weights loaded": found.count["load"],
        "of them again": found.count["load"] - len(found.loaded),
        "again, s": found.again,
        "prompts asked for": found.count["prompt"],
        "of them made": found.count["render"],
        "beyond that, s": max(0.0, found.seconds["prompt"] - found.first_time),
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
    keys = {"refill_saves": "refill at most, s", "loads_save": "again, s", "renders_save": "beyond that, s"}
    claims = {f"evaluate.{name}": max(row[key] / row["seconds"] for row in rows) for name, key in keys.items() if rows}
    show({"machine": machine("torch", "transformers"), "claims": claims, "details": details}, BOUNDS, options.json)


if __name__ == "__main__":
    main()
