"""An entry per shard and the manifest, which is written last: what a store holds and how it was made.

`manifest.json` is the only sign of completeness. Its fields are a contract with other programs (docs/store-format.md).
Everything in it is checked before it is used: a store may come from somebody else. The plan, each entry and the manifest carry
their own hash. Plan and entries stay in a complete store, where only `duet cache repair` reads them: to write the manifest
again. It restores them from the manifest in turn.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from duet.cache.codec import MAX_VOCAB_SIZE, VALUE_DTYPES, Layout, common_dtype
from duet.cache.errors import DamagedStore, IncompleteStore, UserError
from duet.cache.files import NotAsWritten, read_signed, sha256_json, signed
from duet.cache.location import Location
from duet.cache.plan import FORMATS, REPAIR_HINT, SELF_HASH, Plan, check_version, is_drawn, read_plan, shard_name
from duet.cache.record import MAIN_SUBSETS, SUBSETS

MANIFEST_NAME = "manifest.json"
_ATTACHMENT = re.compile(r"[a-z]+/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One immutable file of the store; `positions` counts supervised positions."""

    name: str
    rows: int
    positions: int
    bytes: int
    sha256: str
    value_dtype: str
    value_error: float  # largest absolute error of a stored logit
    longest: int  # tokens of the longest prompt with its response
    logsumexp: bool

    def as_json(self) -> dict[str, Any]:
        """What its side file holds."""
        return signed(dataclasses.asdict(self), SELF_HASH)


@dataclass(frozen=True)
class Manifest:
    """The single description of a complete store."""

    format_version: int
    format: str
    complete: bool
    rows: int
    positions: int
    subsets: dict[str, int]
    top_k: int
    max_positions: int
    vocab_size: int
    value_dtype: str  # float32 where a shard of a lossless store needed it
    value_error: float
    logsumexp: bool
    compression: str
    shard_rows: int
    block_rows: int
    fingerprint: str
    provenance: dict[str, Any]
    shards: tuple[Shard, ...]
    attachments: dict[str, str]
    environment: dict[str, Any]  # versions of what wrote it; not part of the fingerprint

    @property
    def layout(self) -> Layout:
        return Layout(self.top_k, self.vocab_size, is_drawn(self.provenance))

    @property
    def shard_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its response."""
        return max(shard.longest for shard in self.shards)

    def as_json(self) -> dict[str, Any]:
        """What its file holds: the fields and, as `sha256`, the hash of their canonical JSON."""
        return signed(dataclasses.asdict(self), "sha256")


def manifest_of(plan: Plan, shards: list[Shard], environment: dict[str, Any]) -> Manifest:
    """The manifest of a store whose shards are all written."""
    if len({shard.logsumexp for shard in shards}) > 1:
        raise UserError("some shards have a log-sum-exp and some have none", "write the store again with one engine")
    return Manifest(
        format_version=plan.format_version,
        format=plan.format,
        complete=True,
        rows=plan.rows,
        positions=sum(shard.positions for shard in shards),
        subsets=plan.subsets,
        top_k=plan.top_k,
        max_positions=plan.max_positions,
        vocab_size=plan.vocab_size,
        value_dtype=common_dtype(shard.value_dtype for shard in shards),
        value_error=max(shard.value_error for shard in shards),
        logsumexp=shards[0].logsumexp,
        compression=plan.compression,
        shard_rows=plan.shard_rows,
        block_rows=plan.block_rows,
        fingerprint=plan.fingerprint,
        provenance=plan.provenance,
        shards=tuple(shards),
        attachments=plan.attachments,
        environment=environment,
    )


def read_manifest(location: Location) -> Manifest:
    """Read a complete store's manifest; anything else in its place is a UserError that says what was found."""
    name = location.name_of(MANIFEST_NAME)
    raw = location.read(MANIFEST_NAME)
    if raw is None:
        raise no_manifest(location)
    value = read_signed(raw, name, "sha256", REPAIR_HINT)
    check_version(value, name)
    hint = "whoever signed it changed it: write the store again"
    try:
        manifest = Manifest(**{**value, "shards": tuple(Shard(**shard) for shard in value["shards"])})
        fault = next(_faults(manifest), None)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise DamagedStore(f"{name} has missing, unknown or ill-formed fields: {error}", hint) from None
    if fault:
        raise DamagedStore(f"{name}: {fault}", hint)
    if manifest.fingerprint != sha256_json(manifest.provenance):
        raise DamagedStore(f"{name}: the provenance does not give the fingerprint {manifest.fingerprint[:16]}", hint)
    return manifest


def _faults(manifest: Manifest) -> Iterator[str]:
    """What contradicts itself or could lead a reader out of the store."""
    counts = (manifest.rows, manifest.positions, manifest.top_k, manifest.max_positions, manifest.shard_rows)
    if not all(isinstance(count, int) and count > 0 for count in (*counts, manifest.block_rows, manifest.vocab_size)):
        yield "rows, positions, top_k, max_positions, shard_rows, block_rows and vocab_size must be positive"
    if manifest.complete is not True:
        yield "it does not describe a complete store"
    if manifest.format not in FORMATS:
        yield f"format {manifest.format!r}, expected one of {', '.join(FORMATS)}"
    if manifest.vocab_size > MAX_VOCAB_SIZE:
        yield f"vocab_size {manifest.vocab_size}, at most {MAX_VOCAB_SIZE} can be"
    if tuple(manifest.subsets) not in (MAIN_SUBSETS, SUBSETS) or sum(manifest.subsets.values()) != manifest.rows:
        yield f"subsets {manifest.subsets} are not {' and '.join(MAIN_SUBSETS)} of {manifest.rows} rows together"
    if manifest.rows != sum(s.rows for s in manifest.shards) or manifest.positions != sum(
        s.positions for s in manifest.shards
    ):
        yield "rows or positions are not the sums of those of the shards"
    yield from _shard_faults(manifest)
    for name, digest in manifest.attachments.items():
        if not _ATTACHMENT.fullmatch(name) or not _SHA256.fullmatch(digest):
            yield f"attachment {name!r} is not a file of a folder of the store"


def _shard_faults(manifest: Manifest) -> Iterator[str]:
    for index, shard in enumerate(manifest.shards):
        first = index * manifest.shard_rows
        if shard.name != shard_name(index, manifest.format):
            yield f"shard {index} is named {shard.name!r}, expected {shard_name(index, manifest.format)}"
        if shard.rows != min(manifest.shard_rows, manifest.rows - first):
            yield f"shard {index} has {shard.rows} rows, not those of the plan"
        if not isinstance(shard.bytes, int) or shard.bytes < 1 or not _SHA256.fullmatch(shard.sha256):
            yield f"shard {index} has no size or no sha256"
        if shard.value_dtype not in VALUE_DTYPES or shard.logsumexp is not manifest.logsumexp:
            yield f"shard {index} has values {shard.value_dtype!r} or no log-sum-exp where others have one"
    if manifest.value_dtype != common_dtype(shard.value_dtype for shard in manifest.shards):
        yield f"value_dtype {manifest.value_dtype!r} is not that of the shards"


def read_entry(location: Location, plan: Plan, index: int) -> Shard | None:
    """A shard's entry by its side file, None where there is none; NotAsWritten if it is not one of this plan's shard."""
    raw = location.read(plan.side_name(index))
    if raw is None:
        return None
    name = location.name_of(plan.side_name(index))
    try:
        shard = Shard(**read_signed(raw, name, SELF_HASH, REPAIR_HINT, unsigned=True))
    except TypeError as error:
        raise NotAsWritten(f"{name} is not the entry of a shard: {error}", REPAIR_HINT) from None
    if shard.name != plan.shard_name(index) or shard.rows != len(plan.shard_range(index)):
        raise NotAsWritten(f"{name} is the entry of another shard", REPAIR_HINT)
    return shard


def no_manifest(location: Location) -> UserError:
    """The error of a place without a manifest: IncompleteStore where a store was begun."""
    plan = read_plan(location)
    if plan is None:
        return UserError(f"{location} is not a store: it has no {MANIFEST_NAME}", "make one with `duet teacher-logits`")
    done = len(plan.written(location.entries()))
    return IncompleteStore(
        f"the store {location} is incomplete: {done} of {plan.num_shards} shards are written, and {MANIFEST_NAME} is missing",
        "run `duet teacher-logits` with the same config: it resumes at the next shard",
    )
