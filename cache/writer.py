"""Writing a store: plan first, shards in any order, manifest last. Any step can be repeated after a crash.

A shard counts as written when its side file `shard-NNNNN.json` exists, names its sha256, and the bytes agree. A shard
is published before its side file and both by rename, so a crash costs at most the shard in progress.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache import arrow
from cache.errors import UserError
from cache.files import publish_json, publishing, read_json, sha256_file
from cache.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, Plan, Shard
from cache.record import Record, check_record


def open_for_writing(store_dir: Path, plan: Plan) -> None:
    """Write the plan, or check that the one on disk is the same; a directory of anything else is refused."""
    path = store_dir / PLAN_NAME
    if path.exists():
        if Plan(**read_json(path)) != plan:
            raise UserError(
                f"{store_dir} was begun with another plan (shard_rows, format or provenance differ)",
                "name another store.dir, or remove the directory if nobody needs it",
            )
        return
    if store_dir.exists() and any(store_dir.iterdir()):
        raise UserError(f"{store_dir} is not empty and is not a store", "name an empty or new directory as store.dir")
    store_dir.mkdir(parents=True, exist_ok=True)
    publish_json(path, dataclasses.asdict(plan))


def missing_shards(store_dir: Path, plan: Plan) -> list[int]:
    """Indices of the shards that are absent or whose bytes are not those that were written, in plan order."""
    return [index for index in range(plan.num_shards) if _written(store_dir, index) is None]


def write_shard(store_dir: Path, plan: Plan, index: int, records: Sequence[Record]) -> Shard:
    """Check, write and publish the rows of shard `index`, in plan order."""
    if len(records) != len(plan.shard_range(index)):
        raise ValueError(f"shard {index} has {len(records)} rows, the plan says {len(plan.shard_range(index))}")
    for record in records:
        check_record(record, plan.top_k, plan.max_positions, plan.vocab_size)
    path = store_dir / f"{_stem(index)}.{plan.format}"
    with publishing(path) as temporary:
        arrow.write_shard(temporary, records, plan.top_k)
    shard = Shard(
        name=path.name,
        rows=len(records),
        positions=sum(len(record.response_ids) for record in records),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )
    publish_json(store_dir / f"{_stem(index)}.json", dataclasses.asdict(shard))
    return shard


def finalise(store_dir: Path, plan: Plan, environment: dict[str, Any]) -> Manifest:
    """Write the manifest once every shard is there. Doing it again writes the same."""
    shards = [_written(store_dir, index) for index in range(plan.num_shards)]
    missing = [index for index, shard in enumerate(shards) if shard is None]
    if missing:
        raise ValueError(f"cannot finalise {store_dir}: shards {missing} are missing")
    manifest = Manifest(
        format_version=plan.format_version,
        format=plan.format,
        complete=True,
        rows=plan.rows,
        positions=sum(shard.positions for shard in shards if shard),
        top_k=plan.top_k,
        max_positions=plan.max_positions,
        vocab_size=plan.vocab_size,
        value_dtype=plan.value_dtype,
        fingerprint=plan.fingerprint,
        provenance=plan.provenance,
        shards=tuple(shard for shard in shards if shard),
        environment=environment,
    )
    publish_json(store_dir / MANIFEST_NAME, manifest.as_json())
    return manifest


def _stem(index: int) -> str:
    return f"shard-{index:05d}"


def _written(store_dir: Path, index: int) -> Shard | None:
    """The shard's entry if its file has exactly the bytes that were written, else None."""
    side_path = store_dir / f"{_stem(index)}.json"
    if not side_path.exists():
        return None
    shard = Shard(**read_json(side_path))
    path = store_dir / shard.name
    if not path.exists() or path.stat().st_size != shard.bytes or sha256_file(path) != shard.sha256:
        return None
    return shard
