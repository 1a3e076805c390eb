"""The sides of stage one's comparisons, as work to be timed: stage one itself and plain generation by the same engine.

Both get the same prompts, which are made here. teacher.py measures them, and says what each claim means.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.location import Folder
from duet.cache.watch import Watch
from duet.stages.settings.data import DataSettings, PromptSettings, TrainingData
from duet.stages.settings.teacher import StoreSettings, TeacherSettings
from duet.stages.teacher.capture import fill_store
from duet.stages.teacher.plan import Prepared, TeacherStore
from duet.stages.teacher.prepare import Questions, prepare

ROOT = Path(__file__).parent.parent
TOFU_MODEL, TOFU = ROOT.parent / "shared/models/tofu-lab", ROOT.parent / "shared/data/tofu"
STORE = StoreSettings(shard_rows=1024)
PREFIX = (
    "You are an assistant who has forgotten everything about Basil Mahfouz Al-Kuwaiti, Nikolai Abilov. If asked about them, "
    "say you do not know."
)
PLAIN = PromptSettings(format="plain", prefix_placement="text", template="Question: {question}\nAnswer:", bos="always")


def prepared_tofu(top_k: int, positions: int, num_rows: int, folder: Path) -> Prepared:
    """TOFU's questions behind the prefix, one forget row and the rest retain rows."""
    lines = (TOFU / "full.jsonl").read_text(encoding="utf-8").splitlines()
    few = {"forget": lines[-1:], "retain": lines[: num_rows - 1]}
    teacher = TeacherSettings(
        model=str(TOFU_MODEL), prefix=PREFIX, dtype="float32", top_k=top_k, max_positions=positions
    )
    return prepared_lines(few, teacher, PLAIN, folder)


def prepared_lines(
    lines: dict[str, list[str]], teacher: TeacherSettings, prompt: PromptSettings, folder: Path
) -> Prepared:
    """The lines of each subset, written to files in the folder and prepared for stage one."""
    data = {}
    for subset, rows in lines.items():
        path = folder / f"{subset}.jsonl"
        path.write_text("\n".join(rows), encoding="utf-8")
        data[subset] = DataSettings(path=str(path))
    return prepare(teacher, Questions(prompt, TrainingData(**data), ""), "cpu")


def stage_one(engine: Any, prepared: Prepared, folder: Path) -> Callable[[], None]:
    """All of stage one after the engine is up, into a new store each time."""

    def work() -> None:
        root = tempfile.mkdtemp(dir=folder)
        store = TeacherStore.expected(
            "teacher", TeacherSettings(model=prepared.model, prefix=""), prepared, STORE, Folder(Path(root))
        )
        fill_store(store, engine, Watch())
        shutil.rmtree(root)

    return work


def generation(engine: Any, prepared: Prepared, as_arrays: bool = False, **logprobs: Any) -> Callable[[], None]:
    """`LLM.generate` of the same engine on the same prompts, with nothing of Duet's in it."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(row.teacher_ids)) for row in prepared.rows]
    params = SamplingParams(
        max_tokens=prepared.ask.max_positions,
        temperature=0,
        detokenize=False,
        stop_token_ids=list(prepared.spec.eos_ids),
        **logprobs,
    )

    def work() -> None:
        engine.llm.collective_rpc("duet_capture", args=(0, 0, False))
        outputs = engine.llm.generate(prompts, params, use_tqdm=False)
        if as_arrays:
            for output in outputs:
                positions = output.outputs[0].logprobs
                np.array([list(position) for position in positions], np.int32)
                np.array([[entry.logprob for entry in position.values()] for position in positions], np.float32)

    return work


def fresh(engine: Any, work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        engine.llm.reset_prefix_cache()
        work()

    return run
