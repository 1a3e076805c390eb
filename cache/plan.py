"""The plan of a store: everything that is fixed before the first row, the names of the store's files, and how a store begins.

`plan.json` is written before any work. It stays in a complete store, where only `duet cache repair` reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from duet.cache.codec import VALUE_DTYPES, Layout
from duet.cache.errors import DamagedStore, UserError
from duet.cache.files import NotAsWritten, json_bytes, read_signed, sha256_json, signed
from duet.cache.location import Location

FORMAT_VERSION = 2
PLAN_NAME = "plan.json"
FORMATS = {"arrow": "arrow", "zarr": "zarr.zip"}  # format: how the names of its shards end
BLOCK_POSITIONS = 4096
REPAIR_HINT = "run: duet cache repair STORE --config FILE, with the config that made it"
SELF_HASH = "self_sha256"  # in plan and entries; a shard's entry has a `sha256` already


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
        return Layout(self.top_k, self.vocab_size, is_drawn(self.provenance))

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
        return signed(dataclasses.asdict(self), SELF_HASH)

    def differing(self, other: object) -> list[str]:
        """Names of the fields that differ, but for the attachments; a manifest has no `values`."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "attachments"]
        return [name for name in names if hasattr(other, name) and getattr(other, name) != getattr(self, name)]


def ids_kind(provenance: Mapping[str, Any]) -> str:
    """Which ids a store keeps: "top_k", the likeliest, "sampled" or "given"."""
    ids = provenance.get("ids") if isinstance(provenance, dict) else None
    return ids.get("kind", "top_k") if isinstance(ids, dict) else "top_k"


def is_drawn(provenance: Mapping[str, Any]) -> bool:
    """Whether a store's ids were drawn, and come with the number of their draws."""
    return ids_kind(provenance) == "sampled"


def block_rows(max_positions: int) -> int:
    """Rows of a block: BLOCK_POSITIONS positions or somewhat fewer."""
    return max(1, BLOCK_POSITIONS // max_positions)


def side_name(index: int) -> str:
    return f"shard-{index:05d}.json"


def shard_name(index: int, store_format: str) -> str:
    return f"shard-{index:05d}.{FORMATS[store_format]}"


def store_name(fingerprint: str, store_format: str) -> str:
    """Name of a store under a folder of stores: one per fingerprint and format."""
    return fingerprint[:16] if store_format == "arrow" else f"{fingerprint[:16]}.{store_format}"


def check_version(value: dict[str, Any], name: str) -> None:
    """Refuse a format that this program does not know."""
    version = value.get("format_version")
    if not isinstance(version, int):
        raise DamagedStore(f"{name} has no format_version", "this is not a store of Duet's")
    if version > FORMAT_VERSION:
        raise DamagedStore(
            f"{name} has format_version {version}, this program reads {FORMAT_VERSION}",
            "upgrade with: pip install --upgrade duet-unlearn",
        )
    if version < FORMAT_VERSION:
        raise DamagedStore(
            f"{name} has format_version {version}, which was never released; this program reads {FORMAT_VERSION}",
            "remove the store and run `duet teacher-logits` again",
        )


def read_plan(location: Location) -> Plan | None:
    """The plan that a store was begun with, or None where there is none."""
    raw = location.read(PLAN_NAME)
    if raw is None:
        return None
    name = location.name_of(PLAN_NAME)
    value = read_signed(raw, name, SELF_HASH, REPAIR_HINT, unsigned=True)
    check_version(value, name)
    try:
        plan = Plan(**value)
    except TypeError as error:
        raise NotAsWritten(f"{name} is not a plan: {error}", REPAIR_HINT) from None
    if plan.values not in ("lossless", *VALUE_DTYPES):
        raise NotAsWritten(f"{name} is not a plan: its values are {plan.values!r}", REPAIR_HINT)
    return plan


def is_signed(raw: bytes) -> bool:
    """Whether a plan or an entry, which was read, carries its own hash: those of earlier versions do not."""
    return f'"{SELF_HASH}"'.encode() in raw


def planned(plan: Plan, attachments: dict[str, bytes]) -> Plan:
    """The plan of a store that gets these attachments."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(attachments.items())}
    return dataclasses.replace(plan, attachments=hashes)


def check_same_plan(location: Location, there: object, plan: Plan) -> None:
    """Refuse to write a store by another plan than the one that it was begun with."""
    if differing := plan.differing(there):
        shown = ", ".join(
            f"{name} {getattr(there, name)!r} there and {getattr(plan, name)!r} now"
            for name in differing
            if name != "provenance"
        )
        raise UserError(
            f"{location} was begun with another plan: {shown or 'provenance differs'}",
            "set it back, name another store.dir, or remove the directory if nobody needs it",
        )


def begin(location: Location, plan: Plan, attachments: dict[str, bytes]) -> Plan:
    plan = planned(plan, attachments)
    found = read_plan(location)
    if found is None and any(_is_foreign(name) for name in location.names() if name not in attachments):
        found = read_plan(location)  # or another writer has begun it meanwhile
        if found is None:
            raise UserError(
                f"{location} is not empty and is not a store", "name an empty or new directory as store.dir"
            )
    if found is None:
        for name, data in attachments.items():
            location.write(name, data)
        location.write(PLAN_NAME, json_bytes(plan.as_json()))
        return plan
    check_same_plan(location, found, plan)
    for name, digest in found.attachments.items():
        if location.size(name) is None:
            if plan.attachments.get(name) != digest:
                raise UserError(
                    f"{location.name_of(name)} is missing and would not be written as it was",
                    "restore it, or install the versions of transformers and tokenizers that wrote it",
                )
            location.write(name, attachments[name])
    return found


def _is_foreign(name: str) -> bool:
    return not name.rpartition("/")[2].startswith(".")
