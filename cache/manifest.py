"""The plan, written before any work, and the manifest, written last: what a store holds and where it came from.

`manifest.json` is the only sign of completeness. Its fields are a contract with other programs (docs/store-format.md).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import UserError
from cache.files import read_json, sha256_json

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Everything fixed before the first row: shard i holds rows `i*shard_rows` up to the next shard's first row."""

    rows: int
    shard_rows: int
    top_k: int
    max_positions: int
    vocab_size: int
    provenance: dict[str, Any]  # every setting that can change the stored numbers, readable
    format: str = "arrow"
    value_dtype: str = "float32"
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        return sha256_json(self.provenance)

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard_range(self, index: int) -> range:
        """The plan's row numbers in shard `index`."""
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows))


@dataclass(frozen=True)
class Shard:
    """One immutable file of the store; `positions` counts supervised positions."""

    name: str
    rows: int
    positions: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The single description of a complete store."""

    format_version: int
    format: str
    complete: bool
    rows: int
    positions: int
    top_k: int
    max_positions: int
    vocab_size: int
    value_dtype: str
    fingerprint: str
    provenance: dict[str, Any]
    shards: tuple[Shard, ...]
    environment: dict[str, Any]  # versions of what wrote it; not part of the fingerprint

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def shard_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def store_dir_of(root: Path, fingerprint: str) -> Path:
    """Where a store lies under a folder of stores: one directory per fingerprint."""
    return root / fingerprint[:16]


def read_manifest(store_dir: Path) -> Manifest:
    """Read a complete store's manifest; anything else in its place is a UserError that says what was found."""
    path = store_dir / MANIFEST_NAME
    if not path.is_file():
        raise UserError(*_no_manifest(store_dir))
    raw = read_json(path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path} has no format_version", "this is not a store of ours, or it is damaged")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}, this program reads up to {FORMAT_VERSION}",
            "upgrade with: pip install --upgrade duet-unlearn",
        )
    try:
        manifest = Manifest(**{**raw, "shards": tuple(Shard(**shard) for shard in raw["shards"])})
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{path} has missing or unknown fields: {error}", "make the store anew, or restore the file"
        ) from None
    if manifest.fingerprint != sha256_json(manifest.provenance):
        raise UserError(
            f"{path}: the provenance does not give the fingerprint {manifest.fingerprint[:16]}",
            "the manifest was edited or damaged: restore it, or make the store anew",
        )
    if not manifest.complete or manifest.rows != sum(shard.rows for shard in manifest.shards):
        raise UserError(f"{path} does not describe a complete store", "run `duet teacher-logits` again: it resumes")
    return manifest


def _no_manifest(store_dir: Path) -> tuple[str, str]:
    if (store_dir / PLAN_NAME).is_file():
        done = len(list(store_dir.glob("shard-*.json")))
        planned = Plan(**read_json(store_dir / PLAN_NAME)).num_shards
        return (
            f"the store {store_dir} is incomplete: {done} of {planned} shards are written and there is no {MANIFEST_NAME}",
            "run `duet teacher-logits` with the same config: it resumes at the next shard",
        )
    return f"{store_dir} is not a store: it has no {MANIFEST_NAME}", "make one with `duet teacher-logits`"
