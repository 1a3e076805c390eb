"""How fast stage one writes its rows on the transformers engine, beside that engine as it was; and whether logits are the same.

`make bench-teacher-engine` prints the tables; `--json` prints one object; `--quick` takes little data and says nothing of
value. All ratios are of two things measured in turns in one run; each time is the processor's, on one core, and the least of
its rounds.

Models and prompts: tofu-lab (2.8M parameters, ../shared/models) on TOFU's questions in plain form, one of them behind an
unlearning prefix; the lab's base on its questions in chat form, five of them behind one.

Definitions
* `capture.rate_vs_before.plain.pP`, `.chat.pP`: rows per processor second of all of stage one after the engine is up (requests
  in, top-20 and log-sum-exp out, checked, packed, written, synced, manifest), up to P positions a row, over those of the engine
  when it grouped prompts by their first 16 tokens and decoded at most 64 together.
* `capture.logits_vs_before`: the largest difference between the two engines' kept logits and log-sum-exps, of all cases, in
  float32.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from before import Before
from bench import machine, on_one_core, parser, rounds, show
from teacher_sides import ROOT, prepared_lines, prepared_tofu, stage_one

from duet.stages.engines.interface import Engine
from duet.stages.engines.transformers_engine import TransformersEngine
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.teacher import TeacherSettings
from duet.stages.teacher.plan import Prepared

LAB = ROOT / "lab"
CASES = (("plain", 1, 1000), ("plain", 16, 200), ("chat", 1, 445))  # form, positions, rows
BOUNDS = {
    "capture.rate_vs_before.plain.p1": (">=", 4.0),
    "capture.rate_vs_before.plain.p16": (">=", 4.0),
    "capture.rate_vs_before.chat.p1": (">=", 4.0),  # their head is shorter than 16 tokens
    "capture.logits_vs_before": ("<=", 1e-4),
}


def prepared_chat(positions: int, num_rows: int, folder: Path) -> Prepared:
    """The lab's questions: five to be forgotten, the rest about everybody else."""
    files = {"forget": "forget", "retain": "heldout"}
    lines = {subset: (LAB / f"data/{name}.jsonl").read_text("utf-8").splitlines() for subset, name in files.items()}
    few = {"forget": lines["forget"][:5], "retain": lines["retain"][: num_rows - 5]}
    teacher = TeacherSettings(
        model=str(LAB / "models/base"), prefix="You have forgotten everything about Dugira Duchok.", dtype="float32",
        max_positions=positions,
    )  # fmt: skip
    return prepared_lines(few, teacher, PromptSettings(), folder)


def kept(engine: Engine, prepared: Prepared) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """What the engine makes of all rows: responses, kept ids, and logits with their log-sum-exp as a last column."""
    requests = (prepared.request(number) for number in range(len(prepared.rows)))
    found = dict(engine.stream(requests, prepared.ask))
    rows = [found[number] for number in range(len(prepared.rows))]
    logits = [np.column_stack([row.topk_logits_PK, row.logsumexp_P]) for row in rows]
    return (
        [list(row.response_ids) for row in rows],
        np.concatenate([r.topk_ids_PK for r in rows]),
        np.concatenate(logits),
    )


def measured(
    form: str, positions: int, num_rows: int, folder: Path, count: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Rows per second of both engines on one kind of prompt, and how far their numbers are apart."""
    prepared = (
        prepared_tofu(20, positions, num_rows, folder)
        if form == "plain"
        else prepared_chat(positions, num_rows, folder)
    )
    engines = {"now": TransformersEngine(prepared.spec), "before": Before(replace(prepared.spec, batch_size=64))}
    times = rounds(
        {name: stage_one(engine, prepared, folder) for name, engine in engines.items()}, count, time.process_time
    )
    now, before = (kept(engine, prepared) for engine in engines.values())
    if now[0] != before[0]:
        raise ValueError(
            f"{form}, {positions} positions: the two engines' responses differ, so their logits do not compare"
        )
    apart = float(np.abs(now[2] - before[2]).max())
    row = {
        "form": form, "positions": positions, "rows": num_rows,
        "rows per s": num_rows / times["now"], "before": num_rows / times["before"],
        "same ids, %": 100 * float((now[1] == before[1]).mean()), "logits apart, at most": f"{apart:.1e}",
    }  # fmt: skip
    return {f"capture.rate_vs_before.{form}.p{positions}": times["before"] / times["now"], "apart": apart}, row


def main() -> None:
    options = parser(__doc__).parse_args()
    on_one_core()
    claims, table = {}, []
    for form, positions, num_rows in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found, row = measured(
                form, positions, 20 if options.quick else num_rows, Path(folder), 1 if options.quick else 3
            )
        claims["capture.logits_vs_before"] = max(claims.get("capture.logits_vs_before", 0.0), found.pop("apart"))
        claims |= found
        table.append(row)
    details = {"all of stage one, top-20 and log-sum-exp": table}
    show({"machine": machine("torch", "transformers"), "claims": claims, "details": details}, BOUNDS, options.json)


if __name__ == "__main__":
    main()
