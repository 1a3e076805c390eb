"""The oracle: a model of the base's architecture, trained from scratch on what the base knows less the forget set.

A perfect deletion would leave this model. For small models only, where training from scratch takes minutes; for others the
config names a model directory (`compare.oracle`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from duet.cache.errors import UserError
from duet.cache.files import publish_json, publishing_dir, read_json, sha256_json
from duet.cache.watch import Watch
from duet.stages.compare.grid import DONE_NAME, Comparison
from duet.stages.compare.methods import Method, retain_nll
from duet.stages.compare.rows import TrainingRows, row_of, shuffled_order
from duet.stages.compare.train import BaselineJob, train_baseline
from duet.stages.models.directory import load_config
from duet.stages.models.identity import weights_sha256
from duet.stages.questions.prompts import open_renderer
from duet.stages.questions.queries import load_queries
from duet.stages.settings.compare import OracleSettings
from duet.stages.settings.student import TrainSettings, deciding_settings

ORACLE = "oracle"
FROM_SCRATCH = Method("training from scratch without the forget set", "2401.06121", retain_nll, retain_nll)


def train_oracle(
    plan: Comparison, settings: OracleSettings, watch: Watch, tell: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    """The model directory of the oracle and the content of its candidate.json; trained where it is not there yet."""
    train = plan.train.model_copy(
        update={"lora": None, "last_layers": None, "freeze_embeddings": False, "weight_decay": settings.weight_decay}
        | {key: getattr(settings, key) for key in ("lr", "epochs", "batch_size")}
    )
    renderer = open_renderer(plan.model_dir, plan.reported.prompt, plan.trust_remote_code)
    tokenizer = renderer.tokenizer
    queries = [
        query
        for number, data in enumerate(settings.data)
        for query in load_queries(data, f"compare.oracle.data.{number}", need_answers=True)
    ]
    _refuse_forgotten([query.asked for query in queries], plan)
    rows = TrainingRows([], [row_of(renderer, query) for query in queries], [])
    deciding = [
        deciding_settings(train),
        weights_sha256(plan.model_dir),
        rows.sha256(),
    ]
    folder = plan.folder / ORACLE / sha256_json(deciding)[:8]
    if not (folder / DONE_NAME).is_file():
        job = BaselineJob(
            name=ORACLE,
            method=FROM_SCRATCH,
            constant=0.0,
            model_dir=_untrained(plan, folder / "untrained", tokenizer, train),
            start_name=f"the architecture of {plan.start_name}",
            folder=folder,
            settings=train,
            rows=rows,
            steps=shuffled_order(len(queries), train),
            seed=plan.settings.seed,
            device=torch.device(plan.reported.device),
            trust_remote_code=plan.trust_remote_code,
        )
        done = train_baseline(job, watch)
        publish_json(folder / DONE_NAME, done | {"rows": len(queries)})
        tell(f"oracle: {done['steps']} steps from scratch in {done['train_s']:.1f} s: {folder / 'model'}")
    return folder / "model", read_json(folder / DONE_NAME)


def _refuse_forgotten(questions: Sequence[str], plan: Comparison) -> None:
    """An oracle must never have been taught a question that is to be forgotten."""
    to_forget = {
        query.asked
        for exam in (plan.validation, plan.reported)
        for query_set in exam.sets.values()
        if query_set.expect == "forgotten"
        for query in query_set.queries
    }
    if both := to_forget & set(questions):
        raise UserError(
            f"compare.oracle.data has {len(both)} questions that are to be forgotten, among them {min(both)!r}",
            "leave their rows out with compare.oracle.data.N.rows",
        )


def _untrained(plan: Comparison, folder: Path, tokenizer: Any, train: TrainSettings) -> Path:
    """A model directory with weights drawn from the seed, of a standard deviation of 1/sqrt(width).

    The usual 0.02 is for widths of thousands: see lab/README.md.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the pipeline's to show
    if not folder.is_dir():
        config = load_config(plan.model_dir, plan.trust_remote_code)
        config.initializer_range = config.get_text_config().hidden_size ** -0.5
        torch.manual_seed(train.seed)
        with publishing_dir(folder) as temporary:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=plan.trust_remote_code)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder
