"""The plan, written before any work, an entry per shard, and the manifest, written last: what a store holds and from where.

`manifest.json` is the only sign of completeness. Its fields are a contract with other programs (docs/store-format.md).
Whatever it says is checked before it is used: a store may come from somebody else. Each of these files carries its own
hash. The plan and the entries stay in a complete store, where only `duet cache repair` reads them: to write the manifest
anew. It restores them from the manifest in turn.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from duet.cache.codec import MAX_VOCAB_SIZE, VALUE_DTYPES, Layout, common_dtype
from duet.cache.errors import UserError
from duet.cache.files import Damaged, read_signed, sha256_json, signed
from duet.cache.location import Location
from duet.cache.record import SUBSETS

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
FORMATS = {"arrow": "arrow", "zarr": "zarr.zip"}  # format: how the names of its shards end
BLOCK_POSITIONS = 4096
REPAIR_HINT = "run: duet cache repair STORE --config FILE, with the config that made it"
_ATTACHMENT = re.compile(r"[a-z]+/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIGNED = "self_sha256"  # in plan and entries; a shard's entry has a `sha256` already


@dataclass(frozen=True)
class Plan:
    """Everything fixed before the first row: shard i holds rows `i*shard_rows` up to the next shard's first row."""

    subsets: dict[str, int]  # rows of each subset, which lie in this order
    shard_rows: int
    top_k: int
    max_positions: int
    vocab_size: int
    provenance: dict[str, Any]  # every setting that can change the stored numbers, readable
    format: str = "arrow"
    compression: str = "none"
    values: str = "lossless"
    attachments: dict[str, str] = dataclasses.field(default_factory=dict)  # other files of the store and their sha256
    format_version: int = FORMAT_VERSION

    @property
    def rows(self) -> int:
        return sum(self.subsets.values())

    @property
    def fingerprint(self) -> str:
        return sha256_json(self.provenance)

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def block_rows(self) -> int:
        """Rows per block: what is read at once."""
        return block_rows(self.max_positions)

    @property
    def layout(self) -> Layout:
        return Layout(self.top_k, self.vocab_size)

    def shard_range(self, index: int) -> range:
        """The plan's row numbers in shard `index`."""
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows))

    def shard_name(self, index: int) -> str:
        return shard_name(index, self.format)

    def side_name(self, index: int) -> str:
        """The file that says that shard `index` is written."""
        return side_name(index)

    def written(self, names: Collection[str]) -> list[int]:
        """Indices of the shards that are written, going by the names of the store's files."""
        return [index for index in range(self.num_shards) if self.side_name(index) in names]

    def rows_of(self, shards: Iterable[int]) -> int:
        """Rows of these shards together."""
        return sum(len(self.shard_range(index)) for index in shards)

    def as_json(self) -> dict[str, Any]:
        """What its file holds."""
        return signed(dataclasses.asdict(self), _SIGNED)

    def differing(self, other: Plan | Manifest) -> list[str]:
        """Names of the fields that differ, but for the attachments; a manifest has no `values`."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "attachments"]
        return [name for name in names if hasattr(other, name) and getattr(other, name) != getattr(self, name)]


def block_rows(max_positions: int) -> int:
    """Rows of a block: BLOCK_POSITIONS positions or somewhat fewer."""
    return max(1, BLOCK_POSITIONS // max_positions)


def side_name(index: int) -> str:
    return f"shard-{index:05d}.json"


def shard_name(index: int, store_format: str) -> str:
    return f"shard-{index:05d}.{FORMATS[store_format]}"


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
        return signed(dataclasses.asdict(self), _SIGNED)


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
        return Layout(self.top_k, self.vocab_size)

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
        raise UserError("some shards have a log-sum-exp and some have none", "make the store anew with one engine")
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


def store_name(fingerprint: str, store_format: str) -> str:
    """Name of a store under a folder of stores: one per fingerprint and format."""
    return fingerprint[:16] if store_format == "arrow" else f"{fingerprint[:16]}.{store_format}"


def read_manifest(location: Location) -> Manifest:
    """Read a complete store's manifest; anything else in its place is a UserError that says what was found."""
    name = location.name_of(MANIFEST_NAME)
    raw = location.read(MANIFEST_NAME)
    if raw is None:
        raise UserError(*no_manifest(location))
    value = read_signed(raw, name, "sha256", REPAIR_HINT)
    check_version(value, name)
    hint = "whoever signed it changed it: make the store anew"
    try:
        manifest = Manifest(**{**value, "shards": tuple(Shard(**shard) for shard in value["shards"])})
        fault = next(_faults(manifest), None)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} has missing, unknown or ill-formed fields: {error}", hint) from None
    if fault:
        raise UserError(f"{name}: {fault}", hint)
    if manifest.fingerprint != sha256_json(manifest.provenance):
        raise UserError(f"{name}: the provenance does not give the fingerprint {manifest.fingerprint[:16]}", hint)
    return manifest


def check_version(value: dict[str, Any], name: str) -> None:
    """Refuse a format that this program does not know."""
    version = value.get("format_version")
    if not isinstance(version, int):
        raise UserError(f"{name} has no format_version", "this is not a store of ours")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{name} has format_version {version}, this program reads {FORMAT_VERSION}",
            "upgrade with: pip install --upgrade duet-unlearn",
        )
    if version < FORMAT_VERSION:
        raise UserError(
            f"{name} has format_version {version}, which was never released; this program reads {FORMAT_VERSION}",
            "remove the store and run `duet teacher-logits` again",
        )


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
    if tuple(manifest.subsets) != SUBSETS or sum(manifest.subsets.values()) != manifest.rows:
        yield f"subsets {manifest.subsets} are not {' and '.join(SUBSETS)} of {manifest.rows} rows together"
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


def read_plan(location: Location) -> Plan | None:
    """The plan that a store was begun with, or None where there is none."""
    raw = location.read(PLAN_NAME)
    if raw is None:
        return None
    name = location.name_of(PLAN_NAME)
    value = read_signed(raw, name, _SIGNED, REPAIR_HINT, unsigned=True)
    check_version(value, name)
    try:
        plan = Plan(**value)
    except TypeError as error:
        raise Damaged(f"{name} is not a plan: {error}", REPAIR_HINT) from None
    if plan.values not in ("lossless", *VALUE_DTYPES):
        raise Damaged(f"{name} is not a plan: its values are {plan.values!r}", REPAIR_HINT)
    return plan


def read_entry(location: Location, plan: Plan, index: int) -> Shard | None:
    """A shard's entry by its side file, None where there is none; Damaged if it is not one of this plan's shard."""
    raw = location.read(plan.side_name(index))
    if raw is None:
        return None
    name = location.name_of(plan.side_name(index))
    try:
        shard = Shard(**read_signed(raw, name, _SIGNED, REPAIR_HINT, unsigned=True))
    except TypeError as error:
        raise Damaged(f"{name} is not the entry of a shard: {error}", REPAIR_HINT) from None
    if shard.name != plan.shard_name(index) or shard.rows != len(plan.shard_range(index)):
        raise Damaged(f"{name} is the entry of another shard", REPAIR_HINT)
    return shard


def is_signed(raw: bytes) -> bool:
    """Whether a plan or an entry, which was read, carries its own hash: those of earlier versions do not."""
    return f'"{_SIGNED}"'.encode() in raw


def no_manifest(location: Location) -> tuple[str, str]:
    """What to say, and a hint, of a place without a manifest."""
    plan = read_plan(location)
    if plan:
        names = location.entries()
        done = len(plan.written(names))
        return (
            f"the store {location} is incomplete: {done} of {plan.num_shards} shards are written, and {MANIFEST_NAME} is "
            "missing",
            "run `duet teacher-logits` with the same config: it resumes at the next shard",
        )
    return f"{location} is not a store: it has no {MANIFEST_NAME}", "make one with `duet teacher-logits`"
