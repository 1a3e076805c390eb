"""`duet cache …`: looking into stores and after them. None of it needs torch or vLLM, but `repair`, which runs stage one,
and `find`, which reads the data as stage one does."""

from __future__ import annotations

import pwd
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from cache import maintain
from cache.errors import UserError
from cache.leases import Leases
from cache.manifest import MANIFEST_NAME, PLAN_NAME, Plan, read_manifest, read_plan, store_name
from cache.places import Folder, Place, place_of
from cache.writer import LEASE_S, LEASES_NAME
from pipeline.terminal import say, say_json, show


def list_stores(root: str) -> None:
    """One line per store of a folder."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("store", "state", "format"):
        table.add_column(column, overflow="fold")
    for column in ("rows", "MB", "last used, days ago"):
        table.add_column(column, justify="right")
    for found in maintain.find_stores(place_of(root)):
        unused = "?" if found.unused_days is None else f"{found.unused_days:.1f}"
        size = f"{found.num_bytes / 1e6:.2f}"
        table.add_row(str(found.place), found.state, found.format, str(found.rows), size, unused)
    if not table.row_count:
        say(f"no stores in {root}")
        return
    show(table, result=True)


def find_stores(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say which stores a config uses and what is there of them; a UserError where one is not complete."""
    from pipeline.capture import prepare_teacher
    from pipeline.config import load_config
    from stages import teacher

    config = load_config(config_path, overrides)
    found = {}
    for name, settings in config.teacher_settings().items():
        prepared = prepare_teacher(config, settings)
        plans = [teacher.plan_for(prepared, config.store, engine) for engine in teacher.engine_order(settings.engine)]
        stores = [_state(config.store_root / store_name(plan.fingerprint, plan.format), plan) for plan in plans]
        complete = (store for store in stores if store["state"] == "complete")
        found[name] = next(complete, max(stores, key=lambda store: store["rows_there"]))  # of equal ones the first
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
        raise UserError(
            f"{len(missing)} of this config's {len(found)} stores is not complete: {missing[0]}",
            f"run: duet teacher-logits --config {shlex.quote(config_path)}{more}",
        )


def _state(place: Place, plan: Plan) -> dict[str, Any]:
    """What is there of a store. When it was begun, and by whom, only a file system says."""
    complete = place.size(MANIFEST_NAME) is not None
    there = place.entries()
    rows = plan.rows_of(plan.written(there))
    begun, owner, writers = None, None, 0
    if isinstance(place, Folder) and PLAN_NAME in there:
        stat = (place.path / PLAN_NAME).stat()
        begun = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds")
        owner = _user_name(stat.st_uid)
        writers = 0 if complete else Leases(place.path / LEASES_NAME, LEASE_S).num_holders()
    return {
        "path": str(place),
        "fingerprint": plan.fingerprint,
        "engine": plan.provenance["engine"],
        "state": "complete" if complete else "incomplete" if PLAN_NAME in there else "absent",
        "rows": plan.rows,
        "rows_there": rows,
        "living_writers": writers,
        "begun": begun,
        "owner": owner,
        "environment": read_manifest(place).environment if complete else {},
    }


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # of another machine
        return str(uid)


def inspect_store(store: str, as_json: bool) -> None:
    """Print a complete store's manifest, whole as JSON or its main lines."""
    place = place_of(store)
    manifest = read_manifest(place)
    if as_json:
        say_json(manifest.as_json())
        return
    say(f"{place}: {manifest.format}, compression {manifest.compression}, {len(manifest.shards)} shards")
    for subset, rows in manifest.subsets.items():
        say(f"{subset}: {rows} rows")
    per_token = manifest.shard_bytes / (manifest.positions * manifest.top_k)
    say(f"{manifest.positions} positions of {manifest.top_k} ids; {per_token:.2f} bytes per kept token")
    say(f"logits: {manifest.value_dtype}, largest error {manifest.value_error:.3g}; log-sum-exp: {manifest.logsumexp}")
    say(f"fingerprint {manifest.fingerprint}")
    for key, value in manifest.provenance.items():
        say(f"{key}: {value}")


def verify_store(store: str) -> None:
    """Check every byte of a store; a damaged one is a UserError that names the first fault."""
    place = place_of(store)
    manifest = read_manifest(place)
    faults = list(maintain.verify(place, manifest))
    if faults:
        raise UserError(
            f"{len(faults)} of the store's files are damaged: {faults[0]}",
            f"run: duet cache repair {place} --config FILE, with the config that made it",
        )
    say(f"{place}: all {len(manifest.shards)} shards are as they were written")


def repair_store(store: str, config_path: str, overrides: tuple[str, ...]) -> None:
    """Write the damaged and missing shards anew, with the engine that wrote the others."""
    from pipeline.capture import prepare_teacher, store_line, write_stores
    from pipeline.config import load_config
    from pipeline.run import StopSignal
    from stages import teacher

    config = load_config(config_path, overrides)
    place = _of_config(place_of(store), config.store_root)
    plan = read_plan(place)
    if plan is None:
        raise UserError(f"{place} has no plan: it is not a store", "run `duet teacher-logits` to make one")
    engine = plan.provenance["engine"].split()[0]
    teachers = [(settings, prepare_teacher(config, settings)) for settings in config.teacher_settings().values()]
    plans = [teacher.plan_for(prepared, config.store, engine) for _, prepared in teachers]
    whose = next((number for number, expected in enumerate(plans) if expected.fingerprint == plan.fingerprint), None)
    if whose is None:
        old, new = plan.provenance, plans[0].provenance
        differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        raise UserError(
            f"{place} was made by another config: {differing[0]} is {old.get(differing[0])} there "
            f"and {new.get(differing[0])} now",
            "name the config, and install the engine's version, that made it",
        )
    bad = maintain.invalidate(place, plan)
    if not bad and place.size(MANIFEST_NAME) is None:
        say(f"{place}: every shard is as it was written; writing its manifest anew")
    _, prepared = teachers[whose]
    [result] = write_stores(config, engine, [prepared], StopSignal())
    say(f"wrote {result.rows_written} rows of {len(bad)} shards anew: {store_line(result.place)}")


def _of_config(place: Place, root: Place) -> Place:
    if str(place).rstrip("/").rpartition("/")[0] != str(root):
        raise UserError(f"{place} is not among this config's stores, {root}", "add --set store.dir=FOLDER_OF_THE_STORE")
    return place


def convert_store(source: str, target: str, store_format: str, compression: str) -> None:
    """The same rows in another format."""
    manifest = maintain.convert(place_of(source), place_of(target), store_format, compression)
    before = read_manifest(place_of(source)).shard_bytes
    say(f"{target}: {manifest.format}, {manifest.rows} rows, {manifest.shard_bytes / before:.2f} of the bytes")


def collect_garbage(root: str, unused_days: float | None, yes: bool) -> None:
    """List, and with `yes` remove, stores that nobody needs."""
    folder = place_of(root)
    if not isinstance(folder, Folder):
        raise UserError(
            f"{root} is a URL: object storage does not tell who writes a store and when one was read",
            "list the stores with `duet cache ls`, remove them with the tools of your storage",
        )
    found = maintain.removable(folder, unused_days)
    for store in found:
        left = maintain.remove_store(Path(str(store.place))) if yes else []
        done = "removed" if yes else "would remove"
        say(
            f"{done} {store.place}: {store.state}, {store.num_bytes / 1e6:.2f} MB, unused for {store.unused_days:.1f} days"
        )
        for name in left:
            say(f"kept {store.place.name_of(name)}: it is not ours")
    if not found:
        say(f"nothing to remove in {root}")
    elif not yes:
        say("add --yes to remove them")
