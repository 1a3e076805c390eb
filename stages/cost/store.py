"""The cost of stage one, before an engine starts: from the rendered prompts, the plan and the model's headers.

And whether there is room for its stores.
"""

from __future__ import annotations

import errno
import math
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass

from duet.cache.codec import position_columns
from duet.cache.errors import UserError
from duet.cache.files import NOT_WRITABLE_HINT, DiskFull, free_bytes, is_writable
from duet.cache.location import Folder
from duet.cache.plan import Plan
from duet.cache.writer import LEASES_NAME
from duet.stages.models.loading import num_parameters
from duet.stages.teacher.plan import Prepared

TOKEN_BYTES = 4  # of the student's prompt and the response, as they lie in a shard
LEAST_SHARE = {  # assumption, not measured: no store is smaller than that
    "none": 0.9,
    "lz4": 0.125,
    "zstd": 0.125,
}
STORE_LESS = "or store less: store.compression: zstd, store.values: linear16, a smaller teacher.top_k or max_positions"
HEADER_BYTES = 2**14  # of a shard and its side file, generously
FLOP_PER_S = 100e12  # assumption, not measured: the rate of one data-centre GPU in 16 bits while it reads prompts


@dataclass(frozen=True)
class Estimate:
    """`tokens` are of prompts. `computed` counts the prefixed ones with every shared beginning once."""

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
    positions = sum(row.positions(prepared.ask.max_positions) for row in rows)
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
    """The dtype of a kept logit: that of a 16-bit head is exact in float16."""
    if values == "lossless":
        return "float32" if dtype == "float32" else "float16"
    return values


def not_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens of all prompts, with a beginning that several share counted once."""
    left, before = 0, []
    for prompt in sorted(prompts, key=list):
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b), min(len(before), len(prompt))
        )
        left, before = left + len(prompt) - shared, prompt
    return left


def check_room(stores: Sequence[tuple[Prepared, Plan, Folder]]) -> str | None:
    """Refuse, before an engine starts, stores that cannot be written where they are to lie, in one folder of stores.

    Only their least size counts for that: every response ends with its first token, but for given ones. Returns a sentence
    where there may be too little room for their largest size.
    """
    least, most = 0, 0
    for prepared, plan, location in stores:
        _check_writable(plan, location)
        missing = _missing_rows(plan, location)
        least += _bytes(prepared, plan, missing, least=True)
        most += _bytes(prepared, plan, missing, least=False)
        _check_file_size(prepared, plan, location)
    location = stores[0][2]
    free = free_bytes(location.path)
    if least > free:
        raise DiskFull(
            f"cannot write {location}: {os.strerror(errno.ENOSPC)}; {free / 1e6:.2f} MB are free, "
            f"at least {least / 1e6:.2f} MB are needed",
            f"make space and run the same command again, or set another store.dir, {STORE_LESS}",
        )
    if most <= free:
        return None
    return (
        f"{free / 1e6:.2f} MB are free in {location.path.parent}; at least {least / 1e6:.2f} MB will be needed, at most "
        f"{most / 1e6:.2f} MB, if every response is as long as it can be"
    )


def _check_writable(plan: Plan, location: Folder) -> None:
    if all(is_writable(folder) for folder in (location.path, location.path / LEASES_NAME)):
        return
    state = ""
    if location.path.exists():
        there = plan.rows - len(_missing_rows(plan, location))
        state = f": the store is incomplete, {there} of {plan.rows} rows are there, and it is not yours to write"
    raise UserError(f"cannot write {location}{state or ': ' + os.strerror(errno.EACCES)}", NOT_WRITABLE_HINT)


def _check_file_size(prepared: Prepared, plan: Plan, location: Folder) -> None:
    """Against the limit that a shell or a batch system sets (`ulimit -f`)."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    shard = _bytes(prepared, plan, plan.shard_range(0), least=True)
    if limit != resource.RLIM_INFINITY and shard > limit:
        raise DiskFull(
            f"cannot write {location}: a shard needs at least {shard / 1e6:.2f} MB, a file may have {limit / 1e6:.2f} MB here",
            f"raise `ulimit -f`, set a smaller store.shard_rows, {STORE_LESS}",
        )


def _missing_rows(plan: Plan, location: Folder) -> list[int]:
    there = set(plan.written(location.entries()))
    return [row for index in range(plan.num_shards) if index not in there for row in plan.shard_range(index)]


def _bytes(prepared: Prepared, plan: Plan, numbers: Sequence[int], least: bool) -> int:
    """Of these rows of the plan, in a store: at least, or at most."""
    lossless = "float16" if least else "float32"
    columns = position_columns(
        plan.layout, lossless if plan.values == "lossless" else plan.values, prepared.ask.logsumexp
    )
    per_position = sum(dtype.itemsize * math.prod(shape) for dtype, shape in columns.values())
    per_token = TOKEN_BYTES // 2 if least else TOKEN_BYTES
    total = 0
    for row in (prepared.rows[number] for number in numbers):
        positions = row.positions(1 if least else prepared.ask.max_positions)
        total += positions * per_position + per_token * (len(row.student_ids) + positions) + len(row.row_id)
    return int(total * LEAST_SHARE[plan.compression]) if least else total + plan.num_shards * HEADER_BYTES
