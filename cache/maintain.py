"""Looking after stores: verify, repair, convert, list, and remove what nobody needs. Removes nothing that we did not write."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache.errors import UserError
from cache.files import TEMPORARY
from cache.leases import Leases
from cache.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, Plan, read_manifest, read_plan
from cache.places import Folder, Place, check_file
from cache.reader import Store
from cache.writer import LEASE_S, LEASES_NAME, StoreWriter, written_shard

OURS = re.compile(
    rf"{MANIFEST_NAME}|{PLAN_NAME}|shard-\d{{5,}}\.(json|arrow|zarr\.zip)|{LEASES_NAME}/.*|{TEMPORARY.pattern}"
)


def verify(place: Place, manifest: Manifest, hashed: bool = True) -> Iterator[str]:
    """Describe each file that is missing, of another size or (`hashed`) of other bytes than the manifest says."""
    for shard in manifest.shards:
        if fault := check_file(place, shard.name, shard.bytes, shard.sha256, hashed):
            yield fault
    yield from _damaged_attachments(place, manifest.attachments, hashed).values()


def _damaged_attachments(place: Place, attachments: dict[str, str], hashed: bool = True) -> dict[str, str]:
    """Name -> what is wrong with it."""
    found = {name: check_file(place, name, place.size(name) or 0, sha, hashed) for name, sha in attachments.items()}
    return {name: fault for name, fault in found.items() if fault}


def invalidate(place: Place, plan: Plan) -> list[int]:
    """Make a store incomplete where it is damaged: removes the manifest and the files that are not as they were written.

    Returns the shards that are to be written again; a `StoreWriter` does that, and restores attachments.
    """
    bad = []
    place.remove(MANIFEST_NAME)
    for index in range(plan.num_shards):
        shard = written_shard(place, plan, index)
        if shard is None or check_file(place, shard.name, shard.bytes, shard.sha256):
            bad.append(index)
            place.remove(plan.side_name(index))
            place.remove(plan.shard_name(index))
    for name in _damaged_attachments(place, plan.attachments):
        place.remove(name)
    return bad


def convert(source: Place, target: Place, store_format: str, compression: str) -> Manifest:
    """Write the same rows in another format; stored bits are taken over as they are. Resumes like any writing."""
    store = Store(source)
    manifest = store.manifest
    plan = Plan(
        subsets=manifest.subsets,
        shard_rows=manifest.shard_rows,
        top_k=manifest.top_k,
        max_positions=manifest.max_positions,
        vocab_size=manifest.vocab_size,
        provenance=manifest.provenance,
        format=store_format,
        compression=compression,
        values=manifest.value_dtype,
    )
    attachments = {name: source.read(name) or b"" for name in manifest.attachments}
    with StoreWriter(target, plan, attachments) as writer:
        while writer.missing():
            while shard := writer.claim():
                shard.take_over(store.blocks(shard.index), manifest.shards[shard.index])
                writer.publish(shard)
            writer.wait()
            time.sleep(0.2 if writer.missing() else 0)  # others are writing what is left
        return writer.finalise(manifest.environment)


@dataclass(frozen=True)
class Found:
    """A store under a folder of stores."""

    place: Place
    state: str  # "complete", "incomplete", "being written" or "damaged"
    rows: int
    num_bytes: int
    format: str
    unused_days: float | None  # None on object storage, which does not know


def find_stores(root: Place) -> list[Found]:
    """The stores among a folder and its sub-folders, or the folder itself."""
    places = [root, *(root / name for name in root.folders())]
    return [_found(at) for at in places if any(at.size(name) is not None for name in (PLAN_NAME, MANIFEST_NAME))]


def _found(place: Place) -> Found:
    sizes = place.sizes()
    num_bytes = sum(sizes.values())
    unused = _unused_days(place, sizes) if isinstance(place, Folder) else None
    try:
        if place.size(MANIFEST_NAME) is not None:
            manifest = read_manifest(place)
            return Found(place, "complete", manifest.rows, num_bytes, manifest.format, unused)
        plan = read_plan(place)
    except UserError:
        return Found(place, "damaged", 0, num_bytes, "?", unused)
    held = isinstance(place, Folder) and Leases(place.path / LEASES_NAME, LEASE_S).held()
    state = "being written" if held else "incomplete"
    return Found(place, state, plan.rows if plan else 0, num_bytes, plan.format if plan else "?", unused)


def _unused_days(place: Folder, names: Iterable[str]) -> float:
    """Since anything was written to it or its manifest was read; what a writer moves meanwhile does not count."""
    used = [0.0]
    for name in names:
        with suppress(FileNotFoundError):
            used.append((place.path / name).lstat().st_mtime)
    return (time.time() - max(used)) / 86400


def removable(root: Folder, unused_days: float | None) -> list[Found]:
    """Incomplete stores that nobody is writing and, if `unused_days` is given, complete ones not used for so long."""
    limit = math.inf if unused_days is None else unused_days
    return [
        found
        for found in find_stores(root)
        if found.state == "incomplete" or (found.state == "complete" and (found.unused_days or 0) > limit)
    ]


def remove_store(path: Path) -> list[str]:
    """Remove a store's files, the manifest first; returns what was left because it is not ours."""
    place = Folder(path)
    plan = read_plan(place)
    names = place.names()
    ours = {name for name in names if OURS.fullmatch(name)} | (set(plan.attachments) & set(names) if plan else set())
    place.remove(MANIFEST_NAME)
    for name in sorted(ours - {PLAN_NAME}):
        place.remove(name)
    place.remove(PLAN_NAME)
    folders = sorted((folder for folder in path.rglob("*") if folder.is_dir()), reverse=True)
    for folder in [*folders, path]:
        if not any(folder.iterdir()):
            folder.rmdir()
    return sorted(set(names) - ours)
