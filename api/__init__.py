"""Make a language model forget a topic, with proof: what `import duet` offers to notebooks and to other trainers.

Everything is loaded at its first use: `import duet` alone imports neither torch nor numpy.

Shapes in names: N supervised positions, K kept ids per position, V vocabulary, B batch, T time.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from duet.cache.errors import Interrupted, UserError
    from duet.cache.reader import Store
    from duet.cache.record import Rows
    from duet.pipeline.config.load import load_config
    from duet.pipeline.config.schema import Config
    from duet.stages.models.alignment import AlignedBatch, align, input_ids, supervised_positions
    from duet.stages.student.head import Head, student_at
    from duet.stages.student.losses import LOSSES, TopK, loss_of

_HOMES = {
    "Interrupted": "duet.cache.errors",
    "UserError": "duet.cache.errors",
    "Store": "duet.cache.reader",
    "Rows": "duet.cache.record",
    "load_config": "duet.pipeline.config.load",
    "Config": "duet.pipeline.config.schema",
    "AlignedBatch": "duet.stages.models.alignment",
    "align": "duet.stages.models.alignment",
    "input_ids": "duet.stages.models.alignment",
    "supervised_positions": "duet.stages.models.alignment",
    "Head": "duet.stages.student.head",
    "student_at": "duet.stages.student.head",
    "LOSSES": "duet.stages.student.losses",
    "TopK": "duet.stages.student.losses",
    "loss_of": "duet.stages.student.losses",
}
__all__ = [
    "LOSSES",
    "AlignedBatch",
    "Config",
    "Head",
    "Interrupted",
    "Rows",
    "Store",
    "TopK",
    "UserError",
    "align",
    "evaluate",
    "input_ids",
    "load_config",
    "loss_of",
    "open_store",
    "run",
    "student_at",
    "supervised_positions",
    "topk_loss",
]


def __getattr__(name: str) -> Any:
    """A public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'duet' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def open_store(location: str | Path, verify: bool = True) -> Store:
    """Open a complete store of teacher logits for reading.

    Args:
        location: The store's directory, or its URL on object storage (`s3://bucket/path`, read through a local cache).
        verify: Check each shard's sha256 when it is first read.

    Raises:
        UserError: There is no complete store, or a shard is missing or damaged.
    """
    from duet.cache.location import location_of
    from duet.cache.reader import Store

    return Store(location_of(location), verify)


def topk_loss(
    name: str,
    logits_NV: torch.Tensor,
    ids_NK: torch.Tensor,
    values_NK: torch.Tensor,
    logsumexp_N: torch.Tensor | None = None,
    option: float = 1.0,
) -> torch.Tensor:
    """One of Duet's losses between a student's logits and the teacher's top-k, for training loops of your own.

    Args:
        name: A key of `LOSSES`, such as `huber_raw`.
        logits_NV: The student's raw logits over the whole vocabulary, float32 or float64.
        ids_NK: The teacher's top-k token ids, int64.
        values_NK: The teacher's raw logits at those ids.
        logsumexp_N: The teacher's log-sum-exp over the whole vocabulary, in nats; the losses with a tail need it.
        option: Huber's delta (in logits) or the temperature, where the loss has one.

    Returns:
        One value per position, [N]: divergences in nats, others in (squared) logits, summed over the K ids.
    """
    from duet.stages.student.losses import LOSSES, TopK, loss_of

    needs_tail = LOSSES[name].needs_logsumexp
    student = TopK(logits_NV.gather(-1, ids_NK), logits_NV.logsumexp(-1) if needs_tail else None)
    return loss_of(name, option, option)(student, TopK(values_NK, logsumexp_N))


def run(config: Config, overrides: Sequence[str] = ()) -> Path:
    """Run all three stages, each in a process of its own; returns the run's directory.

    It does what `duet run` does: stages that are done already are not repeated.

    Args:
        config: What `load_config` returned.
        overrides: Further changes, `KEY=VALUE`, as `--set` takes them.

    Raises:
        UserError: A setting, a file or a stage is at fault; the stage has printed why.
        Interrupted: A signal stopped it; the same call resumes.
    """
    import tempfile

    import yaml

    from duet.cache.errors import EXIT_INTERRUPTED, Interrupted, UserError
    from duet.pipeline.commands.run import run_all
    from duet.pipeline.config.selection import Selection

    with tempfile.TemporaryDirectory() as folder, _signals_put_back():
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        selection = Selection(str(path), tuple(overrides))
        run_dir, code = selection.load().run_dir, run_all(selection)
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{run_dir} is not finished")
    if code:
        raise UserError(f"{run_dir}: a stage ended with exit code {code}", "its last lines say why")
    return run_dir


def evaluate(config: Config) -> dict[str, Any]:
    """Run stage three in this process: scores base, teacher and students; returns what results.json holds.

    Scores are `{"value": ..., "ci95": [low, high], "n": ...}` by model and metric id, under `models`.

    Args:
        config: What `load_config` returned, of a run whose students are trained.

    Raises:
        UserError: A setting or a file is at fault, or an earlier stage is not done.
        Interrupted: A signal stopped it; what was answered is kept.
    """
    from duet.cache.files import read_json
    from duet.pipeline.commands.evaluate import evaluate as stage_three

    with _signals_put_back():
        stage_three(config)
    return read_json(config.run.results)


def _signals_put_back() -> Any:
    """A context after which signals are handled as before: commands install handlers that stay."""
    import contextlib
    import signal

    stack = contextlib.ExitStack()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        stack.callback(signal.signal, number, signal.getsignal(number))
    return stack
