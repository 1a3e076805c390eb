"""`duet cache …`: inspect, verify, repair and clean up stores. None of it needs torch or vLLM, except `repair`, which runs
stage one, and `find`, which reads the data as stage one does."""

from __future__ import annotations

import pwd
import shlex
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from duet.cache import maintain
from duet.cache.errors import IncompleteStore, UserError
from duet.cache.leases import Leases
from duet.cache.location import Folder, Location, location_of
from duet.cache.manifest import MANIFEST_NAME, read_manifest
from duet.cache.plan import PLAN_NAME, planned, store_name
from duet.cache.writer import LEASE_S, LEASES_NAME, StoreWriter
from duet.pipeline.run.terminal import say, say_json, show

if TYPE_CHECKING:
    from duet.stages.teacher.plan import TeacherStore


def list_stores(root: str) -> None:
    """One line per store of a folder."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("store", "state", "format"):
        table.add_column(column, overflow="fold")
    for column in ("rows", "MB", "last used, days ago"):
        table.add_column(column, justify="right")
    for found in maintain.find_stores(location_of(root)):
        unused = "?" if found.unused_days is None else f"{found.unused_days:.1f}"
        size = f"{found.num_bytes / 1e6:.2f}"
        table.add_row(str(found.location), found.state, found.format, str(found.rows), size, unused)
    if not table.row_count:
        say(f"no stores in {root}")
        return
    show(table, result=True)


def find_stores(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say which stores a config uses and what is there of them; a UserError where one is not complete."""
    from duet.pipeline.config.load import load_config
    from duet.pipeline.run.stores import teacher_stores

    config = load_config(config_path, overrides)
    found = {}
    for of_teacher in teacher_stores(config):
        states = [_state(store) for store in of_teacher.of_each_engine()]
        complete = (state for state in states if state["state"] == "complete")
        found[of_teacher.name] = next(
            complete, max(states, key=lambda state: state["rows_there"])
        )  # of equals the first
    if as_json:
        say_json(found)
    for name, store in () if as_json else found.items():
        of = f"teacher {name}: " if config.teachers else ""
        by = f"; begun {store['begun']} by {store['owner']}" if store["begun"] else ""
        held = f", held by {store['living_writers']} living writers" if store["living_writers"] else ""
        say(f"{of}{store['path']}: {store['state']}, {store['rows_there']} of {store['rows']} rows are there{held}{by}")
        for key, value in store["environment"].items():
            say(f"  {key}: {value}")
    missing = [store["path"] for store in found.values() if store["state"] != "complete"]
    if missing:
        more = "".join(f" --set {shlex.quote(override)}" for override in overrides)
        is_not = "is not" if len(missing) == 1 else "are not"
        raise IncompleteStore(
            f"{len(missing)} of this config's {len(found)} stores {is_not} complete: {missing[0]}",
            f"run: duet teacher-logits --config {shlex.quote(config_path)}{more}",
        )


def _state(store: TeacherStore) -> dict[str, Any]:
    """How much of a store is there. When it was begun, and by whom, only a file system says."""
    location, plan, complete = store.location, store.plan, store.is_complete
    there = location.entries()
    rows = plan.rows_of(plan.written(there))
    begun, owner, writers = None, None, 0
    if isinstance(location, Folder) and PLAN_NAME in there:
        stat = (location.path / PLAN_NAME).stat()
        begun = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds")
        owner = _user_name(stat.st_uid)
        writers = 0 if complete else Leases(location.path / LEASES_NAME, LEASE_S).num_holders()
    return {
        "path": str(location),
        "fingerprint": plan.fingerprint,
        "engine": plan.provenance["engine"],
        "state": "complete" if complete else "incomplete" if PLAN_NAME in there else "absent",
        "rows": plan.rows,
        "rows_there": rows,
        "living_writers": writers,
        "begun": begun,
        "owner": owner,
        "environment": read_manifest(location).environment if complete else {},
    }


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # of another machine
        return str(uid)


def inspect_store(store: str, as_json: bool) -> None:
    """Print a complete store's manifest, whole as JSON or its main lines."""
    location = location_of(store)
    manifest = read_manifest(location)
    if as_json:
        say_json(manifest.as_json())
        return
    say(f"{location}: {manifest.format}, compression {manifest.compression}, {len(manifest.shards)} shards")
    for subset, rows in manifest.subsets.items():
        say(f"{subset}: {rows} rows")
    per_token = manifest.shard_bytes / (manifest.positions * manifest.top_k)
    say(f"{manifest.positions} positions of {manifest.top_k} ids; {per_token:.2f} bytes per kept token")
    say(f"logits: {manifest.value_dtype}, largest error {manifest.value_error:.3g}; log-sum-exp: {manifest.logsumexp}")
    say(f"fingerprint {manifest.fingerprint}")
    for key, value in manifest.provenance.items():
        say(f"{key}: {value}")


def verify_store(store: str) -> None:
    """Check every byte of a store, complete or not; a damaged one is a UserError that names the first fault."""
    location = location_of(store)
    found = maintain.check(location)
    if found.faults:
        raise UserError(
            f"{len(found.faults)} of the store's files are damaged: {found.faults[0]}",
            f"run: duet cache repair {location} --config FILE, with the config that made it",
        )
    if found.complete:
        say(f"{location}: all {found.shards} shards and all other files are as they were written")
    else:
        say(
            f"{location}: unfinished, {found.written} of {found.shards} shards are written, all files are as they were "
            "written; `duet teacher-logits` with the same config goes on"
        )
    for names, why in ((found.unread, "nothing reads"), (found.unsigned, "earlier versions wrote without a hash")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            say(f"not checked, files that {why}: {', '.join(names[:3])}{more}")


def repair_store(store: str, config_path: str, overrides: tuple[str, ...]) -> None:
    """Bring back what is damaged or missing: shards with the engine that wrote the others, the rest from what is left."""
    from duet.pipeline.commands.teacher_logits import write_stores
    from duet.pipeline.config.load import load_config
    from duet.pipeline.run.directory import StopSignal
    from duet.pipeline.run.stores import store_line, teacher_stores
    from duet.stages.engines.choose import engine_order
    from duet.stages.models.tokenizers import tokenizer_files

    config = load_config(config_path, overrides)
    location = _of_config(location_of(store), config.store_root)
    engines = _engines(location, engine_order("auto"))
    mine = _same_fingerprint(location, [one.under(name) for one in teacher_stores(config) for name in engines])
    attachments = tokenizer_files(mine.prepared.tokenizer)
    bad = maintain.invalidate(location, planned(mine.plan, attachments))
    if location.size(MANIFEST_NAME) is not None:
        with StoreWriter(location, mine.plan, attachments):
            say(f"{location}: every shard is as it was written, and so are all other files now")
        return
    if not bad:
        say(f"{location}: every shard is as it was written; writing its manifest again")
    [result] = write_stores([mine], mine.engine, StopSignal())
    say(f"wrote {result.rows_written} rows of {len(bad)} shards again: {store_line(result.location)}")


def _engines(location: Location, all_engines: list[str]) -> list[str]:
    """The engine that wrote a store, or all, where neither manifest nor plan is left."""
    provenance = maintain.provenance_of(location)
    if provenance is None and location.size(MANIFEST_NAME) is None and location.size(PLAN_NAME) is None:
        raise UserError(f"{location} has no plan: it is not a store", "run `duet teacher-logits` to make one")
    return all_engines if provenance is None else [provenance["engine"].split()[0]]


def _same_fingerprint(location: Location, stores: Sequence[TeacherStore]) -> TeacherStore:
    """The store whose plan is that of the one at `location`, by its provenance or, where that is lost, by its name."""
    provenance = maintain.provenance_of(location)
    for store in stores:
        name = store_name(store.plan.fingerprint, store.plan.format)
        if store.plan.provenance == provenance:
            return store
        if provenance is None and str(location).rstrip("/").endswith(f"/{name}"):
            return store
    old, new = provenance or {}, stores[0].plan.provenance
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    raise UserError(
        f"{location} was made by another config: {differing[0]} is {old.get(differing[0])} there and "
        f"{new.get(differing[0])} now"
        if old
        else f"{location} was made by another config, or its name is another: nothing is left of its manifest and its plan",
        "name the config, and install the engine's version, that made it",
    )


def _of_config(location: Location, root: Location) -> Location:
    if str(location).rstrip("/").rpartition("/")[0] != str(root):
        raise UserError(
            f"{location} is not among this config's stores, {root}", "add --set store.dir=FOLDER_OF_THE_STORE"
        )
    return location


def convert_store(source: str, target: str, store_format: str, compression: str) -> None:
    """The same rows in another format."""
    manifest = maintain.convert(location_of(source), location_of(target), store_format, compression)
    before = read_manifest(location_of(source)).shard_bytes
    say(f"{target}: {manifest.format}, {manifest.rows} rows, {manifest.shard_bytes / before:.2f} of the bytes")


def collect_garbage(root: str, unused_days: float | None, yes: bool) -> None:
    """List, and with `yes` remove, stores that nobody needs."""
    folder = location_of(root)
    if not isinstance(folder, Folder):
        raise UserError(
            f"{root} is a URL: object storage does not record who writes a store or when it was read",
            "list the stores with `duet cache ls`, remove them with the tools of your storage",
        )
    found = maintain.removable(folder, unused_days)
    for store in found:
        left = maintain.remove_store(Path(str(store.location))) if yes else []
        done = "removed" if yes else "would remove"
        say(
            f"{done} {store.location}: {store.state}, {store.num_bytes / 1e6:.2f} MB, unused for {store.unused_days:.1f} days"
        )
        for name in left:
            say(f"kept {store.location.name_of(name)}: it is not Duet's")
    if not found:
        say(f"nothing to remove in {root}")
    elif not yes:
        say("add --yes to remove them")


def dequantised_models(remove: bool) -> None:
    """List, and with `remove` delete, the models that GGUF files were dequantised to."""
    from duet.stages.models.gguf import list_dequantised, models_dir

    found = list_dequantised()
    for model in found:
        if remove:
            shutil.rmtree(model.folder)
        say(f"{'removed ' if remove else ''}{model.file}, {model.num_bytes / 1e6:.1f} MB: {model.folder}")
    if not found:
        say(f"no dequantised models in {models_dir()}")
