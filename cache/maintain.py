"""Looking after stores: verify, repair, convert, list, and remove what nobody needs. Removes nothing that we did not write."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from duet.cache.errors import DamagedStore, NotPermitted
from duet.cache.files import TEMPORARY, NotAsWritten, json_bytes
from duet.cache.leases import Leases
from duet.cache.location import Folder, Location, check_file, read_attachments
from duet.cache.manifest import MANIFEST_NAME, Manifest, Shard, no_manifest, read_entry, read_manifest
from duet.cache.plan import PLAN_NAME, Plan, check_same_plan, is_signed, read_plan, side_name
from duet.cache.reader import Store
from duet.cache.writer import LEASE_S, LEASES_NAME, StoreWriter, written_shard

T = TypeVar("T")
OURS = re.compile(
    rf"{MANIFEST_NAME}|{PLAN_NAME}|shard-\d{{5,}}\.(json|arrow|zarr\.zip)|{LEASES_NAME}/.*|{TEMPORARY.pattern}"
)


def verify(location: Location, manifest: Manifest, hashed: bool = True) -> Iterator[str]:
    """Describe each file that readers need and that is missing, of another size or (`hashed`) of other bytes.

    `check` also looks at the other files.
    """
    for shard in manifest.shards:
        if fault := check_file(location, shard.name, shard.bytes, shard.sha256, hashed):
            yield fault
    yield from _damaged_attachments(location, manifest.attachments, hashed).values()


def _damaged_attachments(location: Location, attachments: dict[str, str], hashed: bool = True) -> dict[str, str]:
    """Name -> what is wrong with it."""
    found = {
        name: check_file(location, name, location.size(name) or 0, sha, hashed) for name, sha in attachments.items()
    }
    return {name: fault for name, fault in found.items() if fault}


@dataclass(frozen=True)
class Checked:
    """A store, complete or not, of which every byte was looked at."""

    complete: bool
    shards: int
    written: int
    faults: tuple[str, ...]  # files that are missing or not as they were written
    unread: tuple[str, ...]  # names of files that nothing reads, which were not checked
    unsigned: tuple[str, ...]  # names of files of an earlier version, without a hash of their own: only their form was


def check(location: Location) -> Checked:
    """Look at every file of a store; a UserError where there is none, or what describes it is damaged."""
    if location.size(MANIFEST_NAME) is not None:
        return _check_complete(location, read_manifest(location))
    plan = read_plan(location)
    if plan is None:
        raise no_manifest(location)
    return _check_unfinished(location, plan)


def _check_complete(location: Location, manifest: Manifest) -> Checked:
    faults, copies = list(verify(location, manifest)), _copies(manifest)
    for name, expected in copies.items():
        raw = location.read(name)
        if raw is None or raw not in expected:
            faults.append(f"{location.name_of(name)} is {'missing' if raw is None else 'not as it was written'}")
    try:
        plan = read_plan(location)
        if plan is None or plan.differing(manifest) or plan.attachments != manifest.attachments:
            faults.append(
                f"{location.name_of(PLAN_NAME)} is {'missing' if plan is None else 'not that of the manifest'}"
            )
    except NotAsWritten as error:
        faults.append(error.what)
    ours = {MANIFEST_NAME, PLAN_NAME, *copies, *manifest.attachments, *(shard.name for shard in manifest.shards)}
    unread = sorted(set(location.names()) - ours)
    return Checked(True, len(manifest.shards), len(manifest.shards), tuple(faults), tuple(unread), ())


def _copies(manifest: Manifest) -> dict[str, tuple[bytes, ...]]:
    """Names of the side files and the bytes that each may have: signed, or as earlier versions wrote it."""
    return {
        side_name(index): (json_bytes(shard.as_json()), json_bytes(dataclasses.asdict(shard)))
        for index, shard in enumerate(manifest.shards)
    }


def _check_unfinished(location: Location, plan: Plan) -> Checked:
    names = location.names()
    written = plan.written(names)
    faults = [fault for index in written if (fault := _shard_fault(location, plan, index))]
    faults += _damaged_attachments(location, plan.attachments).values()
    if len(written) == plan.num_shards:
        faults.append(f"{location.name_of(MANIFEST_NAME)} is missing, though all {plan.num_shards} shards are written")
    sides = [plan.side_name(index) for index in written]
    ours = {PLAN_NAME, *sides, *plan.attachments, *(plan.shard_name(index) for index in written)}
    unsigned = tuple(name for name in (PLAN_NAME, *sides) if not is_signed(location.read(name) or b""))
    unread = sorted(set(names) - ours)
    return Checked(False, plan.num_shards, len(written), tuple(faults), tuple(unread), unsigned)


def _shard_fault(location: Location, plan: Plan, index: int) -> str | None:
    """What is wrong with a written shard or its side file."""
    try:
        shard = read_entry(location, plan, index)
    except NotAsWritten as error:
        return error.what
    if shard is None:
        return f"{location.name_of(plan.side_name(index))} is missing"
    return check_file(location, shard.name, shard.bytes, shard.sha256, whose=plan.side_name(index))


def invalidate(location: Location, plan: Plan) -> list[int]:
    """Make a store unfinished where it is damaged, and bring back what the rest of it, or `plan`, tells.

    Returns the shards that are to be written again; a `StoreWriter` does that, and restores attachments. Where a manifest
    is as it was written and all shards are, it stays. Until it goes, the store is the damaged one that it was; after that
    it is an unfinished one: to be stopped in between harms nothing. `plan` names attachments where nothing else does.
    """
    manifest = _undamaged(read_manifest, location) if location.size(MANIFEST_NAME) is not None else None
    found = _undamaged(read_plan, location)
    for there in (manifest, found):
        if there:
            check_same_plan(location, there, plan)
    attachments = (manifest or found or plan).attachments
    entries = _entries(location, plan, manifest)
    bad = [index for index in range(plan.num_shards) if not _is_whole(location, entries.get(index))]
    _restore(location, PLAN_NAME, json_bytes(dataclasses.replace(plan, attachments=attachments).as_json()))
    for index in range(plan.num_shards):
        if index in bad:
            location.remove(plan.side_name(index))
        else:
            _restore(location, plan.side_name(index), json_bytes(entries[index].as_json()))
    for name in _damaged_attachments(location, attachments):
        location.remove(name)
    if bad or manifest is None:
        location.remove(MANIFEST_NAME)
    for index in bad:
        location.remove(plan.shard_name(index))
    return bad


def provenance_of(location: Location) -> dict[str, Any] | None:
    """What the manifest or, where that is missing or damaged, the plan tells; None where both are."""
    manifest = _undamaged(read_manifest, location) if location.size(MANIFEST_NAME) is not None else None
    there = manifest or _undamaged(read_plan, location)
    return there.provenance if there else None


def _undamaged(read: Callable[[Location], T | None], location: Location) -> T | None:
    try:
        return read(location)
    except NotAsWritten:
        return None


def _entries(location: Location, plan: Plan, manifest: Manifest | None) -> dict[int, Shard]:
    """What is known of the shards, by index."""
    if manifest:
        return dict(enumerate(manifest.shards))
    found = ((index, written_shard(location, plan, index)) for index in range(plan.num_shards))
    return {index: shard for index, shard in found if shard}


def _is_whole(location: Location, shard: Shard | None) -> bool:
    return shard is not None and check_file(location, shard.name, shard.bytes, shard.sha256) is None


def _restore(location: Location, name: str, data: bytes) -> None:
    if location.read(name) != data:
        location.write(name, data)


def convert(source: Location, target: Location, store_format: str, compression: str) -> Manifest:
    """Write the same rows in another format; stored bits are taken over as they are. Resumes like any writing."""
    store = Store(source)
    manifest, begun = store.manifest, _undamaged(read_plan, source)
    plan = Plan(
        subsets=manifest.subsets,
        shard_rows=manifest.shard_rows,
        top_k=manifest.top_k,
        max_positions=manifest.max_positions,
        vocab_size=manifest.vocab_size,
        provenance=manifest.provenance,
        format=store_format,
        compression=compression,
        values=begun.values if begun else manifest.value_dtype,  # as the config says that may repair it
    )
    attachments = read_attachments(source, manifest.attachments)
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

    location: Location
    state: str  # "complete", "incomplete", "being written", "damaged" or "not readable"
    rows: int
    num_bytes: int
    format: str
    unused_days: float | None  # None on object storage, which does not know


def find_stores(root: Location) -> list[Found]:
    """The stores among a folder and its sub-folders, or the folder itself; one that others may not enter counts as a store."""
    places = [root, *(root / name for name in root.folders())]
    return [found for found in map(_found, places) if found]


def _found(location: Location) -> Found | None:
    """What lies there; None where that is not a store."""
    num_bytes, unused = 0, None
    try:
        if all(location.size(name) is None for name in (PLAN_NAME, MANIFEST_NAME)):
            return None
        sizes = location.sizes()
        num_bytes = sum(sizes.values())
        unused = _unused_days(location, sizes) if isinstance(location, Folder) else None
        if location.size(MANIFEST_NAME) is not None:
            manifest = read_manifest(location)
            return Found(location, "complete", manifest.rows, num_bytes, manifest.format, unused)
        plan = read_plan(location)
    except (DamagedStore, NotPermitted) as error:
        state = "damaged" if isinstance(error, DamagedStore) else "not readable"
        return Found(location, state, 0, num_bytes, "?", unused)
    held = isinstance(location, Folder) and Leases(location.path / LEASES_NAME, LEASE_S).held()
    state = "being written" if held else "incomplete"
    return Found(location, state, plan.rows if plan else 0, num_bytes, plan.format if plan else "?", unused)


def _unused_days(location: Folder, names: Iterable[str]) -> float:
    """Since anything was written to it or its manifest was read; what a writer moves meanwhile does not count."""
    used = [0.0]
    for name in names:
        with suppress(FileNotFoundError):
            used.append((location.path / name).lstat().st_mtime)
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
    """Remove a store's files, the manifest first; returns the files left because they are not Duet's."""
    location = Folder(path)
    described = read_manifest(location) if location.size(MANIFEST_NAME) is not None else read_plan(location)
    names = location.names()
    ours = {name for name in names if OURS.fullmatch(name)} | (
        set(described.attachments if described else ()) & set(names)
    )
    location.remove(MANIFEST_NAME)
    for name in sorted(ours - {PLAN_NAME}):
        location.remove(name)
    location.remove(PLAN_NAME)
    folders = sorted((folder for folder in path.rglob("*") if folder.is_dir()), reverse=True)
    for folder in [*folders, path]:
        if not any(folder.iterdir()):
            folder.rmdir()
    return sorted(set(names) - ours)
