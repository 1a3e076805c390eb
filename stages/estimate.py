"""What stage one will cost, told before an engine starts: from the rendered prompts, the plan and the model's headers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cache.codec import position_columns
from cache.manifest import Plan
from stages.models import num_parameters
from stages.teacher import Prepared

TOKEN_BYTES = 4  # of the student's prompt and the response, as they lie in a shard
FLOP_PER_S = 100e12  # assumption, not measured: what one data-centre GPU does in 16 bits while it reads prompts


@dataclass(frozen=True)
class Estimate:
    """`tokens` are of prompts. `computed` is what is left of the prefixed ones where all that they share is computed once."""

    rows: dict[str, int]
    tokens_prefixed: int
    tokens_bare: int
    tokens_computed: int
    positions: int  # at most
    store_bytes: int  # at most, uncompressed
    parameters: int
    flop: float  # 2 per parameter and token

    @property
    def seconds(self) -> float:
        return self.flop / FLOP_PER_S


def estimate(prepared: Prepared, plan: Plan) -> Estimate:
    """Positions are counted as if no response ended early, but for given ones, whose length is known."""
    rows = prepared.rows
    positions = sum(len(row.given_ids) if row.given_ids else plan.max_positions for row in rows)
    parameters = num_parameters(prepared.spec.model_dir)
    computed = not_shared([row.teacher_ids for row in rows])
    columns = position_columns(plan.layout, _value_dtype(plan.values, prepared.spec.dtype), prepared.ask.logsumexp)
    per_position = sum(dtype.itemsize * math.prod(shape) for dtype, shape in columns.values())
    tokens_bare = sum(len(row.student_ids) for row in rows)
    return Estimate(
        rows=plan.subsets,
        tokens_prefixed=sum(len(row.teacher_ids) for row in rows),
        tokens_bare=tokens_bare,
        tokens_computed=computed,
        positions=positions,
        store_bytes=positions * per_position
        + TOKEN_BYTES * (tokens_bare + positions)
        + sum(len(row.row_id) for row in rows),
        parameters=parameters,
        flop=2.0 * parameters * (computed + positions),
    )


def _value_dtype(values: str, dtype: str) -> str:
    """How a logit will be kept: what a 16-bit head gives is exact in float16."""
    if values == "lossless":
        return "float32" if dtype == "float32" else "float16"
    return values


def not_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens left when whatever a prompt begins with in common with another is counted once."""
    left, before = 0, []
    for prompt in sorted(prompts, key=list):
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), min(len(before), len(prompt))
        )
        left, before = left + len(prompt) - shared, prompt
    return left
